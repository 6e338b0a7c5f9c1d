#!/bin/sh
# Writes a tar of an image's file system to standard output: image.sh LOWERDIR DIRECTORY
# LOWERDIR is overlay's option: the root file system of a node with what the image is for. DIRECTORY/upper is laid over it.
# Like root.sh, it runs in mount and process namespaces of its own.
set -eu
lower=$1 dir=$2
mkdir "$dir/merged"
# Read-only: with an upper directory, overlay changes directories while tar reads them, for which tar fails.
mount -t overlay overlay -o "lowerdir=$dir/upper:$lower" "$dir/merged"
# Without what makes it a node, and what only dpkg needs.
tar --create --numeric-owner --sort=name --directory "$dir/merged" \
	--exclude='./var/lib/apt' --exclude='./var/lib/dpkg' --exclude='./var/cache/*' --exclude='./usr/share/perl*' --exclude='./usr/lib/cni' \
	--exclude='./usr/bin/containerd*' --exclude='./usr/bin/ctr' --exclude='./usr/bin/crun' --exclude='./usr/sbin/runc' .
umount "$dir/merged"
