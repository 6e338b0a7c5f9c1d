#!/bin/sh
# Installs packages on top of the root file system of a test node: layer.sh ROOT DIRECTORY SUITE PACKAGE…
# DIRECTORY, which must not exist yet, becomes what an overlay over ROOT has to have above it; ROOT stays as it is.
# Like root.sh, it runs in mount and process namespaces of its own.
set -eu
root=$1 layer=$2 suite=$3
shift 3
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

work=$layer.work
mkdir "$layer" "$work" "$work/work" "$work/merged"
merged=$work/merged
mount -t overlay overlay -o "lowerdir=$root,upperdir=$layer,workdir=$work/work" "$merged"
mount -t proc proc "$merged/proc"
mount --rbind /dev "$merged/dev"
inside() {
	chroot "$merged" "$@" >>"$work/log" 2>&1 </dev/null || {
		tail -n 20 "$work/log" >&2
		exit 1
	}
}
printf '#!/bin/sh\nexit 101\n' >"$merged/usr/sbin/policy-rc.d"
chmod 0755 "$merged/usr/sbin/policy-rc.d"
inside apt-get update
inside apt-get install -y -qq -t "$suite" "$@"
inside apt-get clean
umount -R "$merged/dev" "$merged/proc"
rm -rf "$merged"/var/lib/apt/lists/* "$merged/usr/sbin/policy-rc.d"
umount "$merged"
rm -rf "$work"
