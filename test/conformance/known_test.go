package conformance

// known are the specs that may fail in a test node, directly on containerd as well as through crishim, and why.
var known = map[string]string{
	"[sig-node] PrivilegedPod [NodeConformance] should enable privileged commands [LinuxOnly]":                                                         "makes a dummy network device, which not each kernel has",
	"[sig-node] ContainerMetrics [LinuxOnly] [NodeConformance] when querying /metrics/cadvisor should report container metrics":                        "wants statistics of block devices, of which a node's cgroups may have none",
	"[sig-node] Summary API [NodeConformance] when querying /stats/summary should report resource usage through the stats api":                         "wants cgroups for the runtime and the system, which a node has not",
	"[sig-node] Kubelet when scheduling a read only busybox container should not write to root filesystem [LinuxOnly] [NodeConformance] [Conformance]": "wants busybox's words for an error of its shell, and the image has bash",
}
