#!/bin/sh
# Runs the command of a virtual machine: its output goes to the second serial port, its exit status to the third. Then the machine ends.
# What rows of test/matrix need and few machines have is made first.
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
(
	set -e
	echo 16 >/proc/sys/vm/nr_hugepages
	dd if=/dev/zero of=/data/swap bs=1M count=64 status=none
	chmod 600 /data/swap
	mkswap -q /data/swap
	swapon /data/swap
	exec /etc/crishim-test/command
) </dev/null >/dev/ttyS1 2>&1
echo $? >/dev/ttyS2
systemctl poweroff --force --force
