#!/bin/sh
# Installs what tests and demo need of the machine itself, where it is missing: a C compiler, without which there is no race
# detector, and debootstrap. Everything else is in the node's own root file system. With "vm" also what the virtual machine needs,
# QEMU and mke2fs, and rpm, which reads packages; with "disks" what makes the file systems that benchmarks are run on.
set -eu
missing=
command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
command -v debootstrap >/dev/null || missing="$missing debootstrap"
if [ "${1:-}" = vm ]; then
	command -v mke2fs >/dev/null || missing="$missing e2fsprogs"
	command -v qemu-system-x86_64 >/dev/null || missing="$missing qemu-system-x86"
	command -v rpm >/dev/null || missing="$missing rpm"
fi
if [ "${1:-}" = disks ]; then
	command -v mkfs.ext4 >/dev/null || missing="$missing e2fsprogs"
	command -v mkfs.xfs >/dev/null || missing="$missing xfsprogs"
	command -v mkfs.btrfs >/dev/null || missing="$missing btrfs-progs"
fi
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing on this machine:$missing: install it, or run this as root on Debian" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
