#!/bin/sh
# Installs what tests and demo need of the machine itself, where it is missing: a C compiler, without which there is no race
# detector, and debootstrap. Everything else is in the node's own root file system.
set -eu
missing=
command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
command -v debootstrap >/dev/null || missing="$missing debootstrap"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing on this machine:$missing: install it, or run this as root on Debian" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
