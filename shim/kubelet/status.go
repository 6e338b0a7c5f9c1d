package kubelet

import (
	"context"
	"errors"
	"fmt"
)

// The states of a switch.
const (
	Enabled     = "enabled"     // the kubelet talks to crishim, or will when it starts
	Disabled    = "disabled"    // it does not, and was not told to
	Overwritten = "overwritten" // Enable has told it to, and something else wins
)

// Status is what there is to know of a node's switch.
type Status struct {
	State    string   `json:"state"`
	Endpoint Setting  `json:"endpoint"`        // what the kubelet uses, or will when it starts
	Image    *Setting `json:"image,omitempty"` // its image service, if it is not the same
	Running  bool     `json:"running"`
	// Connected is whether the kubelet is connected to crishim.
	Connected bool     `json:"connected"`
	DropIn    string   `json:"drop_in,omitempty"` // what Enable has written
	Notes     []string `json:"notes,omitempty"`   // what somebody should look at
}

// Status looks, and changes nothing.
func (n *Node) Status(ctx context.Context) (*Status, error) {
	unit, err := n.Systemd.Unit(ctx)
	if err != nil {
		return nil, err
	}
	d, err := n.readDropIn()
	if errors.Is(err, errChanged) {
		// It may well have its effect.
		s, statusErr := n.status(unit, &dropIn{})
		if statusErr != nil {
			return nil, statusErr
		}
		s.Notes = append(s.Notes, err.Error())
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	return n.status(unit, d)
}

// status is Status with a drop-in that was read, nil for none. Of one that is empty it is known only that it is there.
func (n *Node) status(unit *Unit, d *dropIn) (*Status, error) {
	planned, err := n.planned(unit)
	if err != nil {
		return nil, err
	}
	now := planned
	s := &Status{Running: unit.Running}
	note := func(format string, args ...any) { s.Notes = append(s.Notes, fmt.Sprintf(format, args...)) }
	if unit.Running {
		if now, err = n.running(unit); err != nil {
			return nil, err
		}
		s.Connected = connected(unit.Pid, n.Listen) == nil
	} else {
		note("%s is not running: it is %s", Service, unit.State)
	}
	s.Endpoint = now.Runtime
	if now.Image.Value != "" {
		s.Image = &now.Image
	}
	uses, willUse := n.isCrishim(now.Runtime.Value), n.isCrishim(planned.Runtime.Value)
	if d != nil {
		s.DropIn = dropInPath
	}
	switch {
	case d == nil && uses:
		s.State = Enabled
		if willUse {
			note("not by crishim kubelet enable, but by %s", now.Runtime.Source)
		}
	case d == nil:
		s.State = Disabled
	case uses && willUse:
		s.State = Enabled
	default:
		s.State = Overwritten
	}
	if s.State == Overwritten && !willUse {
		note("%s points the kubelet elsewhere, in spite of %s", planned.Runtime.Source, dropInPath)
	}
	if uses != willUse {
		note("the kubelet will use %s (%s) when it is started again", planned.Runtime.Value, planned.Runtime.Source)
	}
	if s.State == Enabled && s.Running && !s.Connected {
		note("the kubelet is not connected to crishim: see journalctl -u %s", Service)
	}
	if unit.Outdated {
		note("files of %s have changed: run systemctl daemon-reload", Service)
	}
	if d != nil && d.command != "" {
		if !n.isCrishim(d.endpoint) {
			note("crishim listens at %s now, by its configuration: run crishim kubelet enable again", address(n.Listen))
		}
		switch command, err := n.command(unit); {
		case err != nil:
			note("%v", err)
		case command != d.command:
			note("what %s runs has changed since, to %q: run crishim kubelet enable again, which takes that over", Service, command)
		}
	}
	return s, nil
}
