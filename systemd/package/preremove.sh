#!/bin/sh
# Before files go: dpkg says "remove" or "upgrade", rpm how many versions there will be. A node whose kubelet talks to crishim would be
# without a runtime: crishim does not go before that is changed.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	if ! crishim kubelet disable; then
		echo "crishim is not removed: the kubelet may still need it. See crishim kubelet status." >&2
		exit 1
	fi
	systemctl stop crishim.service crishim.socket
fi
# dpkg remembers until purge what is enabled.
[ "$1" != 0 ] || systemctl disable crishim.service crishim.socket || true
