package main

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"crishim/shim/kubelet"
)

func TestPrintStatus(t *testing.T) {
	status := &kubelet.Status{
		State: kubelet.Overwritten, Endpoint: kubelet.Setting{Value: "unix:///run/a.sock", Source: "--container-runtime-endpoint in /etc/default/kubelet"},
		Image: &kubelet.Setting{Value: "unix:///run/i.sock", Source: "x"}, Running: true, DropIn: "/d", Notes: []string{"look at this"},
	}
	var text, json bytes.Buffer
	if err := errors.Join(printStatus(&text, status, "text"), printStatus(&json, status, "json")); err != nil {
		t.Fatal(err)
	}
	const want = `overwritten
endpoint       unix:///run/a.sock, by --container-runtime-endpoint in /etc/default/kubelet
image service  unix:///run/i.sock, by x
drop-in        /d
connected      no
note           look at this
`
	if text.String() != want {
		t.Errorf("got\n%s\nwant\n%s", text.String(), want)
	}
	for _, want := range []string{`"state": "overwritten"`, `"value": "unix:///run/a.sock"`, `"connected": false`, `"drop_in": "/d"`, `"notes": [`} {
		if !strings.Contains(json.String(), want) {
			t.Errorf("JSON has no %s:\n%s", want, json.String())
		}
	}
	if err := printStatus(&text, status, "yaml"); err == nil || !strings.Contains(err.Error(), "text or json") {
		t.Errorf("error is %v", err)
	}
}

func TestNoSystemd(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		t.Skip("systemd runs here, and its kubelet is not the tests': see test/vm")
	}
	for command, code := range map[string]int{"enable": 1, "disable": 1, "status": 2} {
		_, err := execute(t, "kubelet", command)
		if err == nil || !strings.Contains(err.Error(), "systemd") || exitCode(err) != code {
			t.Errorf("%s: %v, code %d", command, err, exitCode(err))
		}
	}
}
