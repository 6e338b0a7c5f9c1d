// Package systemd holds what is installed beside the binary: the units, and the configuration file.
package systemd

import _ "embed"

// Config is the configuration file as it is installed. Each key stands in it once, with its comment and its default, which is what crishim goes
// by: shim/config takes the defaults from here.
//
//go:embed config.toml
var Config string

// Service is crishim.service, by which tests run crishim where there is no systemd; @BINDIR@ stands for the directory of the binary.
//
//go:embed crishim.service
var Service string
