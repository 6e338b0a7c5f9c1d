// Package systemd has the text of the shipped unit, for tests that run crishim as it says where there is no systemd.
package systemd

import _ "embed"

// Service is crishim.service; @BINDIR@ stands for the directory of the binary.
//
//go:embed crishim.service
var Service string
