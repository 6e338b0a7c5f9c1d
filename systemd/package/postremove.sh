#!/bin/sh
# After files have gone. What dpkg purges is the configuration and the records of checkpoints in flight. Archives are never removed: they are where the
# kubelet has them, and belong to whoever has asked for them.
set -e
case "$1" in
remove | purge | 0) rm -rf /run/crishim ;; # sockets at which nobody listens any more
esac
if [ "$1" = purge ]; then
	rm -rf /etc/crishim
	# The directory may be a file system of its own.
	[ ! -d /var/lib/crishim ] || find /var/lib/crishim -mindepth 1 -delete
	rmdir /var/lib/crishim 2>/dev/null || true
	rm -f /etc/systemd/system/multi-user.target.wants/crishim.service /etc/systemd/system/sockets.target.wants/crishim.socket
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
