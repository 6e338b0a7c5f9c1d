package kubelet

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The unit and the drop-in of Kubernetes' packages for Debian, and what kubeadm writes: see cmd/krel/templates in k8s.io/release.
const (
	kubeadmUnit = `[Unit]
Description=kubelet: The Kubernetes Node Agent
Wants=network-online.target

[Service]
ExecStart=/usr/bin/kubelet
Restart=always
StartLimitInterval=0

[Install]
WantedBy=multi-user.target
`
	kubeadmDropIn = `# Note: This dropin only works with kubeadm and kubelet v1.11+
[Service]
Environment="KUBELET_KUBECONFIG_ARGS=--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf"
Environment="KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml"
# This is a file that "kubeadm init" and "kubeadm join" generates at runtime, populating the KUBELET_KUBEADM_ARGS variable dynamically
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
# This is a file that the user can use for overrides of the kubelet args as a last resort.
EnvironmentFile=-/etc/default/kubelet
ExecStart=
ExecStart=/usr/bin/kubelet $KUBELET_KUBECONFIG_ARGS $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
`
	unitFile   = "/usr/lib/systemd/system/kubelet.service"
	kubeadmDir = "/usr/lib/systemd/system/kubelet.service.d"
	flagsEnv   = "/var/lib/kubelet/kubeadm-flags.env"
	extraArgs  = "/etc/default/kubelet"
	configFile = "/var/lib/kubelet/config.yaml"
)

// kubeadm is the tree of a node that kubeadm has joined, with more files, or others in the place of those.
func kubeadm(more map[string]string) map[string]string {
	files := map[string]string{
		unitFile:                        kubeadmUnit,
		kubeadmDir + "/10-kubeadm.conf": kubeadmDropIn,
		flagsEnv:                        `KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=unix://RUNTIME --pod-infra-container-image=registry.k8s.io/pause:3.10"` + "\n",
		extraArgs:                       "KUBELET_EXTRA_ARGS=\n",
		configFile:                      "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ncgroupDriver: systemd\n",
	}
	for name, content := range more {
		files[name] = content
	}
	return files
}

func tree(t *testing.T, n *Node, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := n.path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		content = strings.NewReplacer("RUNTIME", n.Runtime, "CRISHIM", n.Listen).Replace(content)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(n.path(units), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestTheEffectiveEndpoint(t *testing.T) {
	const config = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
	const dropIns = "KUBELET_EXTRA_ARGS=--config-dir=/etc/kubernetes/kubelet.conf.d\n"
	for _, test := range []struct {
		name          string
		files         map[string]string
		value, source string
		image         string
	}{
		{name: "kubeadm's flags", value: "unix:///RUNTIME", source: "--container-runtime-endpoint in " + flagsEnv,
			files: map[string]string{flagsEnv: `KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=unix:///RUNTIME --v=2"`}},
		{name: "the administrator's flags come later", value: "unix:///b", source: "--container-runtime-endpoint in " + extraArgs,
			files: map[string]string{extraArgs: "KUBELET_EXTRA_ARGS='--container-runtime-endpoint=unix:///b'"}},
		{name: "in two words", value: "/b", source: "--container-runtime-endpoint in " + extraArgs,
			files: map[string]string{extraArgs: "KUBELET_EXTRA_ARGS=--v 2 --container-runtime-endpoint \"/b\"\n"}},
		{name: "with underscores", value: "/b", source: "--container-runtime-endpoint in " + extraArgs,
			files: map[string]string{extraArgs: "KUBELET_EXTRA_ARGS=--container_runtime_endpoint=/b\n"}},
		{name: "a variable of a unit loses to a file", value: "unix:///a", source: "--container-runtime-endpoint in " + flagsEnv,
			files: map[string]string{
				kubeadmDir + "/05-x.conf": "[Service]\nEnvironment=KUBELET_EXTRA_ARGS=--container-runtime-endpoint=/b\n",
				flagsEnv:                  "KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=unix:///a\n"}},
		{name: "a variable of a unit", value: "/b", source: "--container-runtime-endpoint in Environment=KUBELET_EXTRA_ARGS of kubelet.service",
			files: map[string]string{
				kubeadmDir + "/05-x.conf": "[Service]\nEnvironment=\"KUBELET_EXTRA_ARGS=--v=2 --container-runtime-endpoint=/b\"\n",
				extraArgs:                 "# nothing\n"}},
		{name: "the command line itself", value: "/c", source: "--container-runtime-endpoint in ExecStart= of kubelet.service",
			files: map[string]string{kubeadmDir + "/10-kubeadm.conf": "[Service]\nExecStart=\nExecStart=/usr/bin/kubelet --container-runtime-endpoint=/c\n"}},
		{name: "in the middle of a word", value: "/run/d.sock", source: "--container-runtime-endpoint in /etc/default/kubelet",
			files: map[string]string{
				kubeadmDir + "/10-kubeadm.conf": "[Service]\nEnvironmentFile=/etc/default/kubelet\nExecStart=\nExecStart=/usr/bin/kubelet --container-runtime-endpoint=/run/${NAME}.sock\n",
				extraArgs:                       "NAME=d\n"}},
		{name: "the configuration file", value: "unix:///c", source: "containerRuntimeEndpoint in " + configFile,
			files: map[string]string{flagsEnv: "KUBELET_KUBEADM_ARGS=\n", configFile: config + "containerRuntimeEndpoint: unix:///c\n"}},
		{name: "a flag wins over it", value: "unix:///a", source: "--container-runtime-endpoint in " + flagsEnv,
			files: map[string]string{
				flagsEnv:   "KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=unix:///a\n",
				configFile: config + "containerRuntimeEndpoint: unix:///c\n"}},
		{name: "the last file of the directory", value: "unix:///e", source: "containerRuntimeEndpoint in /etc/kubernetes/kubelet.conf.d/more/20.conf",
			files: map[string]string{
				flagsEnv: "", extraArgs: dropIns,
				configFile:                                    config + "containerRuntimeEndpoint: unix:///c\n",
				"/etc/kubernetes/kubelet.conf.d/10.conf":      config + "containerRuntimeEndpoint: unix:///d\n",
				"/etc/kubernetes/kubelet.conf.d/more/20.conf": config + "containerRuntimeEndpoint: unix:///e\n",
				"/etc/kubernetes/kubelet.conf.d/30.yaml":      config + "containerRuntimeEndpoint: unix:///f\n",
				"/etc/kubernetes/kubelet.conf.d/40.conf":      config + "imageServiceEndpoint: unix:///i\n"},
			image: "unix:///i"},
		{name: "null stands for the default", value: defaultEndpoint, source: "the kubelet's default, by containerRuntimeEndpoint in /etc/kubernetes/kubelet.conf.d/10.conf",
			files: map[string]string{
				flagsEnv: "", extraArgs: dropIns,
				configFile:                               config + "containerRuntimeEndpoint: unix:///c\n",
				"/etc/kubernetes/kubelet.conf.d/10.conf": config + "containerRuntimeEndpoint: null\n"}},
		{name: "nothing", value: defaultEndpoint, source: "the kubelet's default", files: map[string]string{flagsEnv: ""}},
		{name: "an image service of its own", value: "unix:///a", source: "--container-runtime-endpoint in " + flagsEnv, image: "unix:///i",
			files: map[string]string{flagsEnv: "KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=unix:///a --image-service-endpoint=unix:///i\n"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			n, f := node(t, kubeadm(nil))
			n.Runtime, n.Listen = "RUNTIME", "CRISHIM" // not to be replaced
			tree(t, n, test.files)
			if err := f.Reload(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, err := n.planned(&f.unit)
			if err != nil {
				t.Fatal(err)
			}
			if want := (Setting{test.value, test.source}); got.Runtime != want {
				t.Errorf("got %q, want %q", got.Runtime, want)
			}
			if got.Image.Value != test.image {
				t.Errorf("the image service is at %q, want %q", got.Image.Value, test.image)
			}
		})
	}
}

func TestANodeThatKubeadmHasNotJoined(t *testing.T) {
	n, f := node(t, map[string]string{unitFile: kubeadmUnit, kubeadmDir + "/10-kubeadm.conf": kubeadmDropIn})
	if got, err := n.planned(&f.unit); err != nil || got.Runtime.Value != defaultEndpoint {
		t.Errorf("got %v, %v, want the default", got, err)
	}
}

func TestWhatCannotBeReadIsNamed(t *testing.T) {
	for name, files := range map[string]map[string]string{
		configFile: {configFile: "containerRuntimeEndpoint: [\n"},
		extraArgs:  {kubeadmDir + "/05-x.conf": "[Service]\nEnvironmentFile=" + extraArgs + "\n"},
	} {
		n, f := node(t, kubeadm(files))
		if name == extraArgs {
			if err := os.Remove(n.path(extraArgs)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := n.planned(&f.unit); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

// What systemd makes of such a file, by systemd.exec(5).
func TestEnvironmentFiles(t *testing.T) {
	for content, want := range map[string][]variable{
		"A=b\n":                         {{"A", "b"}},
		"A = b c  \nB=":                 {{"A", "b c"}, {"B", ""}},
		"# A=b\n; B=c\n  C=d":           {{"C", "d"}},
		"A='b c' \"d e\"f\n":            {{"A", "b cd ef"}},
		"A=\"b \\\" \\$ \\n\"\n":        {{"A", `b " $ \n`}},
		"A='b \\'\n":                    {{"A", `b \`}},
		"A=b \\\n  c\nB=d\n":            {{"A", "b   c"}, {"B", "d"}},
		"A=b'c'\n":                      {{"A", "b'c'"}},
		"A=b # c\n":                     {{"A", "b # c"}},
		"no assignment\nA=b\r\nB=c\r\n": {{"A", "b"}, {"B", "c"}},
		"A=\"b\nc\"\n":                  {{"A", "b\nc"}},
		"A=b\\ \n":                      {{"A", "b "}},
		"=b\n":                          {{"", "b"}},
		"":                              nil,
	} {
		if got := parseEnvironment(content); !slices.Equal(got, want) {
			t.Errorf("%q is %q, want %q", content, got, want)
		}
	}
}

func TestWordsOfAVariable(t *testing.T) {
	for text, want := range map[string][]string{
		" --a=b  --c 'd e' ": {"--a=b", "--c", "d e"},
		`--a="b c"d`:         {"--a=b cd"},
		`--a=b\ c`:           {"--a=b c"},
		`''`:                 {""},
		"":                   nil,
	} {
		if got := split(text); !slices.Equal(got, want) {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

// Whatever stands in a file, it is read.
func FuzzEnvironmentFile(f *testing.F) {
	for _, seed := range []string{"A=b\n", "A='b", "A=\"\\", "A=b\\\nc", "#\\\n", "=\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, content string) {
		for _, v := range parseEnvironment(content) {
			split(v.value)
			replace(v.value, map[string]word{})
		}
	})
}
