package node

import (
	"context"
	_ "embed" // for the stand-in of systemd
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

const (
	suiteDir = "/run/suite"
	// SuiteReports is where a run of the suite leaves what it writes, in the node: report.json, which is ginkgo's, kubelet.log, services.log.
	SuiteReports = "/var/log/suite"
)

//go:embed systemd-standin.sh
var systemdStandIn []byte

// SuiteCommand returns a command that runs specs of the suite, which arguments of ginkgo's select, with a kubelet of its own in front
// of a socket of the node. What specs ask of the runtime themselves goes to that socket, too. API server and etcd run in a process of the
// suite. The node is one with Options.Suite whose runtime runs. It has had no other kubelet, and no other run of the suite.
func (n *Node) SuiteCommand(ctx context.Context, endpoint string, args ...string) (*exec.Cmd, error) {
	if err := n.prepareSuite(ctx, endpoint); err != nil {
		return nil, fmt.Errorf("prepare suite: %w", err)
	}
	ginkgo := []string{suiteDir + "/ginkgo", "run", "--no-color", "--silence-skips", "--output-dir=" + SuiteReports, "--json-report=report.json"}
	suite := []string{suiteDir + "/e2e_node.test", "--",
		"--k8s-bin-dir=" + suiteDir, "--node-name=" + n.hostname, "--prepull-images=false", "--report-dir=" + SuiteReports,
		"--container-runtime-endpoint=unix://" + endpoint, "--image-service-endpoint=unix://" + endpoint,
		"--kubelet-config-file=" + kubeletConfigFile, "--kubelet-flags=--node-ip=" + nodeAddress}
	// It writes into its working directory.
	return n.Command(ctx, "sh", slices.Concat([]string{"-c", `cd /data && exec "$@"`, "sh"}, ginkgo, args, suite)...), nil
}

// prepareSuite makes the node ready for the suite: its programs, what its kubelet reads, and what starts that.
func (n *Node) prepareSuite(ctx context.Context, endpoint string) error {
	programs, err := Suite(ctx)
	if err != nil {
		return err
	}
	kubelet, err := Tool(ctx, suiteModule)
	if err != nil {
		return err
	}
	for _, dir := range []string{suiteDir, SuiteReports, filepath.Dir(kubeletConfigFile)} {
		if err := os.MkdirAll(n.Path(dir), 0o755); err != nil {
			return err
		}
	}
	for target, source := range map[string]string{
		suiteDir + "/kubelet":       kubelet,
		suiteDir + "/ginkgo":        filepath.Join(programs, "ginkgo"),
		suiteDir + "/e2e_node.test": filepath.Join(programs, "e2e_node.test"),
	} {
		// Never what is bound already: to write there is to write into the cache.
		file, err := os.OpenFile(n.Path(target), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
		if err != nil {
			return err
		}
		file.Close()
		if err := n.Bind(source, target); err != nil {
			return err
		}
	}
	for _, name := range []string{"systemd-run", "systemctl", "sudo"} {
		if err := os.WriteFile(n.Path("/usr/local/bin/"+name), systemdStandIn, 0o755); err != nil {
			return err
		}
	}
	config := n.kubeletConfig(KubeletOptions{RuntimeEndpoint: endpoint})
	for key, value := range map[string]any{
		// As in the configuration that Kubernetes itself runs its suite with: its specs count on these intervals.
		"cgroupRoot":                       "/",
		"podCIDR":                          "10.100.0.0/24",
		"volumeStatsAggPeriod":             "10s",
		"fileCheckFrequency":               "10s",
		"evictionPressureTransitionPeriod": "30s",
		"serializeImagePulls":              false,
	} {
		config[key] = value
	}
	delete(config, "syncFrequency")
	delete(config, "resolvConf") // the specs expect one
	content, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.Path(kubeletConfigFile), content, 0o644); err != nil {
		return err
	}
	return n.addAddress(ctx)
}
