#!/bin/sh
# After files have come: dpkg says "configure" and the version that was there before, rpm says how many versions there are now.
# At its first installation crishim is enabled and started where that is the custom, on Debian. The kubelet is never touched.
set -e
case "$1 $2" in
"configure ") when=first ;;
"1 ") when=first-rpm ;;
configure* | [2-9]*) when=again ;;
*) exit 0 ;; # dpkg takes something back
esac
running=
[ ! -d /run/systemd/system ] || running=yes

[ -z "$running" ] || systemctl daemon-reload
if [ -e /usr/lib/tmpfiles.d/crishim.conf ] && command -v systemd-tmpfiles >/dev/null; then
	systemd-tmpfiles --create crishim.conf || true
fi
# A unit that somebody has masked, or that does not start, does not spoil the installation.
case $when in
first) systemctl enable crishim.socket crishim.service || true ;;
first-rpm) systemctl preset crishim.socket crishim.service || true ;;
esac
[ -n "$running" ] && [ $when != first-rpm ] || exit 0
for unit in crishim.socket crishim.service; do
	! systemctl --quiet is-enabled $unit || systemctl start $unit || true
done
# The socket stays systemd's meanwhile: connections wait.
[ $when = first ] || systemctl try-restart crishim.service || true
