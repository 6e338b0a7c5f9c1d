package vm

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// upgrade has systemd restart crishim, as the installation of another version does, while 20 pods are there, come and go, and one of them is
// dumped. No pod is any the worse for it, and the kubelet finds its node ready all the time.
func upgrade(t *testing.T, n *node.Node) {
	output(t, "crishim", "kubelet", "enable") // where this part runs alone
	systemctl(t, "start", "kubelet.service")
	k := meet(t, n)
	// An emulated machine takes longer for a call than the 5 s for which crishim waits, and for a checkpoint than 10 s.
	patient := "/etc/crishim/config.d/shutdown.toml"
	write(t, patient, "[shutdown]\ncheckpoints = \"2m\"\ncalls = \"20s\"\n")
	defer os.Remove(patient)
	systemctl(t, "reload", "crishim.service")
	names := func(kind string, count int) (all []string) {
		for i := range count {
			all = append(all, fmt.Sprintf("%s-%d", kind, i))
		}
		return all
	}
	stay, leave, come := names("stays", 6), names("leaves", 6), names("comes", 8)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	for _, name := range append(leave, stay...) {
		pod := cheap(name)
		if name == stay[0] {
			pod = node.Pod{Name: name, Command: []string{"/bin/workload", "memory", "64"}}
		}
		if err := k.WritePod(pod); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.WaitPods(ctx, append(leave, stay...), nil); err != nil {
		t.Fatal(err)
	}
	direct := n.Client(t, node.ContainerdSocket)
	before := containers(t, direct)
	since := cursor(t)

	log := n.PodLogFile(k.PodName(stay[0]), stay[0])
	node.WaitCount(t, 0, log)
	amid, churned := make(chan struct{}), make(chan error, 1)
	go func() { churned <- churn(ctx, k, leave, come, amid) }()
	select {
	case <-amid:
	case err := <-churned:
		t.Fatal(err)
	}
	// The kubelet is at it: calls to start and to end containers are on their way.
	next := k.PodName(come[len(come)/2])
	wait(t, "the sandbox of "+next, func() bool {
		sandboxes, err := direct.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
			State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY},
		}})
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(sandboxes.GetItems(), func(s *cri.PodSandbox) bool { return s.GetMetadata().GetName() == next })
	})
	held, ended := node.HoldCheckpoint(t, checkpoints, "", func() error {
		if err := removeArchives(); err != nil {
			return err
		}
		_, err := k.Checkpoint(ctx, k.PodName(stay[0]), stay[0], 0)
		return err
	})
	begin := time.Now()
	restarted := make(chan error, 1)
	go func() { restarted <- exec.Command("systemctl", "restart", "crishim.service").Run() }()
	wait(t, "systemd to stop crishim", func() bool { return property(t, "crishim.service", "ActiveState") == "deactivating" })
	held.Release()
	checkpointErr := <-ended
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	t.Logf("the restart took %s; the checkpoint in flight ended with %v", time.Since(begin), checkpointErr)
	archives := strings.Fields(n.Listing(t, checkpoints))
	if (checkpointErr == nil) != (len(archives) == 1) {
		t.Errorf("the checkpoint ended with %v and left %q", checkpointErr, archives)
	}
	if err := removeArchives(); err != nil {
		t.Fatal(err)
	}

	if err := <-churned; err != nil {
		t.Fatal(err)
	}
	if err := k.WaitPods(ctx, append(come, stay...), leave); err != nil {
		t.Fatal(err)
	}
	n.Unharmed(t, checkpoints, log)
	after := containers(t, direct)
	for _, name := range stay {
		if pod := k.PodName(name); len(before[pod]) != 1 || !maps.Equal(before[pod], after[pod]) {
			t.Errorf("the containers of %s were %v and are %v", pod, before[pod], after[pod])
		}
	}
	for _, name := range come {
		pod := k.PodName(name)
		for id, attempt := range after[pod] {
			if attempt != 0 || len(after[pod]) != 1 {
				t.Errorf("the containers of %s are %v, want one that was never restarted: %s", pod, after[pod], id)
			}
		}
	}
	ready(t, since)
	for _, name := range append(come, stay...) {
		if err := k.UnwritePod(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.WaitPods(ctx, nil, append(come, stay...)); err != nil {
		t.Error(err)
	}
}

// cheap is a pod in the node's network: of what a processor has to do for a pod a quarter is its own.
func cheap(name string) node.Pod {
	return node.Pod{Name: name, Spec: map[string]any{"hostNetwork": true}}
}

// churn has pods leave and come, one of each at a time: more at once, and an emulated processor takes half a minute for a call. It closes amid before
// half of them have come.
func churn(ctx context.Context, k *node.Kubelet, leave, come []string, amid chan<- struct{}) error {
	for i, name := range come {
		if i == len(come)/2 {
			close(amid)
		}
		if err := k.WritePod(cheap(name)); err != nil {
			return err
		}
		if i < len(leave) {
			if err := k.UnwritePod(leave[i]); err != nil {
				return err
			}
		}
		if err := k.WaitPods(ctx, []string{name}, nil); err != nil {
			return err
		}
	}
	return nil
}

// containers are all that containerd has, also those that have ended, by the names of their pods: ids, and how often the kubelet has started
// each again.
func containers(t *testing.T, client *node.Client) map[string]map[string]uint32 {
	t.Helper()
	list, err := client.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]map[string]uint32{}
	for _, c := range list.GetContainers() {
		pod := c.GetLabels()["io.kubernetes.pod.name"]
		if all[pod] == nil {
			all[pod] = map[string]uint32{}
		}
		all[pod][c.GetId()] = c.GetMetadata().GetAttempt()
	}
	return all
}

// ready fails the test if the kubelet has found its node not ready. Without an API server it has nobody to tell that; but it says in its journal
// that it looks after no pods, and that is for the same reasons: a runtime or a network that was not ready, or a list of pods that has not been
// renewed.
func ready(t *testing.T, since string) {
	t.Helper()
	said := journal(t, since, "--output=cat", "-u", "kubelet.service")
	if !strings.Contains(said, "SyncLoop ADD") {
		t.Error("the kubelet's journal tells nothing: this test shows less than it should")
	}
	for line := range strings.Lines(said) {
		for _, words := range []string{"Skipping pod synchronization", "PLEG is not healthy", "container runtime is down", "Container runtime network not ready"} {
			if strings.Contains(line, words) {
				t.Errorf("the kubelet finds its node not ready: %s", line)
			}
		}
	}
}
