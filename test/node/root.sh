#!/bin/sh
# Builds the root file system of a test node: root.sh DIRECTORY, which must not exist yet.
# It runs in mount and process namespaces of its own, so that it leaves nothing behind however it ends.
# The script names a mirror nowhere: the machine's own apt sources say which one, or debootstrap's default does.
set -eu
root=$1
suite=trixie
# CRIU comes from a later suite: trixie's cannot dump an inet socket on kernels since 6.16.
criu_suite=forky
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

mirror=
if command -v apt-get >/dev/null; then
	# Security and third-party archives carry another label.
	mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' | sed -n 's/^Debian \(http[^ ]*\)$/\1/p' | head -n 1)
fi
debootstrap --variant=minbase "$suite" "$root" ${mirror:+"$mirror"} >"$root.log" 2>&1 || {
	tail -n 20 "$root.log" >&2
	exit 1
}

# What debootstrap used serves the later suite, too. A mirror that stands still, or a clock that is ahead, lets its index
# expire; the signature is still verified, and nothing but tests runs in this root.
source=$(sed -n 's/^deb \([^ ]*\) .*/\1/p' "$root/etc/apt/sources.list" | head -n 1)
cat >"$root/etc/apt/sources.list" <<EOF
deb $source $suite main
deb [check-valid-until=no] $source $criu_suite main
EOF
cat >"$root/etc/apt/apt.conf.d/90node" <<EOF
APT::Default-Release "$suite";
APT::Install-Recommends "false";
Acquire::Languages "none";
Dpkg::Options { "--force-unsafe-io"; "--path-exclude=/usr/share/doc/*"; "--path-exclude=/usr/share/man/*"; "--path-exclude=/usr/share/locale/*"; };
EOF
if command -v apt-config >/dev/null; then
	apt-config dump Acquire | grep -i '::Proxy' >"$root/etc/apt/apt.conf.d/91proxy" || true
fi
# Nothing is started by its installation.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"

mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
inside() {
	chroot "$root" "$@" >>"$root.log" 2>&1 </dev/null || {
		tail -n 20 "$root.log" >&2
		exit 1
	}
}
inside apt-get update
inside apt-get install -y -qq containerd runc crun containernetworking-plugins \
	iptables nftables iproute2 busybox-static procps \
	e2fsprogs xfsprogs btrfs-progs
# crun loads libcriu2 for its own checkpoints and restores.
inside apt-get install -y -qq -t "$criu_suite" criu libcriu2
# This suite's own, which shows what an older one says, is put aside; libnet1 is what it needs beyond.
inside apt-get install -y -qq libnet1
inside sh -c "cd /tmp && apt-get download -qq criu/$suite && dpkg-deb -x criu_*.deb /opt/criu-$suite && rm criu_*.deb"
inside apt-get clean
inside criu --version
umount -R "$root/dev" "$root/proc"

rm -rf "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/locale/* "$root/usr/sbin/policy-rc.d"
rm -f "$root.log"
