package conformance

import "regexp"

// checkpointSpec is skipped, by itself, where the runtime cannot checkpoint.
const checkpointSpec = "[sig-node] Checkpoint Container [Feature:CheckpointContainer] will checkpoint a container out of a pod"

// allSpecs are the arguments of ginkgo's that select what the long form runs.
func allSpecs() []string {
	return []string{"--timeout=40m", "--procs=8", "--label-filter=(NodeConformance && !Serial && !Slow && !Flaky) || Feature:CheckpointContainer"}
}

// some are the specs that the short form runs: each way in which a kubelet uses a runtime, by what takes the least time. Those that restart
// the kubelet are serial, and ginkgo runs them last.
var some = []string{
	checkpointSpec,

	// Exec, logs
	"[sig-node] Pods should support remote command execution over websockets [NodeConformance] [Conformance]",
	"[sig-node] Pods should support retrieving logs from the container over websockets [NodeConformance] [Conformance]",
	"[sig-node] Kubelet when scheduling a busybox command in a pod should print the output to logs [NodeConformance] [Conformance]",
	"[sig-node] KubeletManagedEtcHosts should test kubelet managed /etc/hosts file [NodeConformance] [Conformance]",
	"[sig-node] ContainerLogPath [NodeConformance] Pod with a container printed log to stdout should print log to correct log path",

	// Probes
	`[sig-node] Probing container should be restarted with a exec "cat /tmp/health" liveness probe [NodeConformance] [Conformance]`,
	"[sig-node] Probing container should be restarted with a /healthz http liveness probe [NodeConformance] [Conformance]",
	"[sig-node] Probing container with readiness probe should not be ready before initial delay and never restart [NodeConformance] [Conformance]",
	"[sig-node] Probing container should be restarted with an exec liveness probe with timeout [MinimumKubeletVersion:1.20] [NodeConformance]",

	// Hooks
	"[sig-node] Container Lifecycle Hook when create a pod with lifecycle hook should execute poststart exec hook properly [NodeConformance] [Conformance]",
	"[sig-node] Container Lifecycle Hook when create a pod with lifecycle hook should execute prestop exec hook properly [NodeConformance] [Conformance]",
	"[sig-node] Container Lifecycle Hook when create a pod with lifecycle hook should execute poststart http hook properly [NodeConformance] [Conformance]",
	"[sig-node] Container Lifecycle Hook when create a pod with lifecycle hook should execute prestop http hook properly [NodeConformance] [Conformance]",

	// Init and sidecar containers
	"[sig-node] InitContainer [NodeConformance] should invoke init containers on a RestartAlways pod [Conformance]",
	"[sig-node] InitContainer [NodeConformance] should not start app containers and fail the pod if init containers fail on a RestartNever pod [Conformance]",
	"[sig-node] [Feature:SidecarContainers] Containers Lifecycle when initializing an init container after a restartable init container " +
		"Should begin initializing the pod, restartPolicy=Always",
	"[sig-node] [Feature:SidecarContainers] Containers Lifecycle when A pod with restartable init containers is terminating when " +
		"The containers exit successfully should terminate sidecars in reverse order after all main containers have exited",

	// Resize
	"[sig-node] Pod InPlace Resize Container [FeatureGate:InPlacePodVerticalScaling] [Beta] Guaranteed QoS pod, one container - increase CPU & memory",
	"[sig-node] Pod InPlace Resize Container [FeatureGate:InPlacePodVerticalScaling] [Beta] " +
		"Burstable QoS pod, one container - decrease CPU (NotRequired) & memory (RestartContainer)",

	// Restarts of the kubelet
	"[sig-node] [Serial] Containers Lifecycle when The kubelet restarts when a Pod is initialized and running " +
		"should not restart any completed init container after the kubelet restart",
}

// someSpecs are the arguments of ginkgo's that select those.
func someSpecs() []string {
	args := []string{"--timeout=10m", "--procs=8"}
	for _, name := range some {
		args = append(args, "--focus= "+regexp.QuoteMeta(name)+"$") // the suite's own name is in front
	}
	return args
}
