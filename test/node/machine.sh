#!/bin/sh
# Makes what a virtual machine boots from: machine.sh LOWERDIR DIRECTORY INIT
# LOWERDIR is overlay's option: the root file system of a node with systemd and a kernel. DIRECTORY, which must not exist yet, gets
# vmlinux, initrd, which runs INIT, and root.img, the root file system. Like root.sh, it runs in mount and process namespaces of its own.
set -eu
lower=$1 dir=$2 init=$3
export LC_ALL=C
mkdir "$dir" "$dir/upper" "$dir/work" "$dir/merged" "$dir/initrd"
merged=$dir/merged
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" "$merged"
release=$(ls "$merged/usr/lib/modules")

# The kernel itself, out of what unpacks itself: in a machine without hardware support that would take seconds at each start.
packed=$merged/boot/vmlinuz-$release
for offset in $(grep -abo "$(printf '\050\265\057\375')" "$packed" | cut -d : -f 1); do
	# What follows it is not of the archive: zstd says so, and has written all by then.
	tail -c "+$((offset + 1))" "$packed" | chroot "$merged" zstd -dcq >"$dir/vmlinux" 2>/dev/null || true
	[ "$(head -c 4 "$dir/vmlinux" | tail -c 3)" != ELF ] || break
done
[ "$(head -c 4 "$dir/vmlinux" | tail -c 3)" = ELF ] || {
	echo "no kernel packed by zstd in vmlinuz-$release" >&2
	exit 1
}

# What the kernel needs to reach its root file system, in the order of loading.
mkdir "$dir/initrd/bin" "$dir/initrd/modules"
cp "$merged/bin/busybox" "$dir/initrd/bin/busybox"
printf '%s' "$init" >"$dir/initrd/init"
chmod 0755 "$dir/initrd/init"
count=100
for module in virtio_pci virtio_blk ext4 overlay; do
	for file in $(chroot "$merged" modprobe -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
		name=$(basename "$file" .ko.xz)
		[ ! -e "$dir/initrd/modules/"*"-$name.ko" ] || continue
		chroot "$merged" xz -dc "$file" >"$dir/initrd/modules/$count-$name.ko"
		count=$((count + 1))
	done
done
(cd "$dir/initrd" && find . | "$merged/bin/busybox" cpio -o -H newc) >"$dir/initrd.cpio" 2>/dev/null
rm -r "$dir/initrd"
mv "$dir/initrd.cpio" "$dir/initrd"

# Drivers of hardware that this machine does not have are most of it.
rm -rf "$merged/boot"/* "$merged/usr/lib/modules/$release/kernel/sound"
for kind in gpu media infiniband iio scsi usb staging video hwmon input mmc mtd ata; do
	rm -rf "$merged/usr/lib/modules/$release/kernel/drivers/$kind"
done
for kind in wireless ethernet usb can; do
	rm -rf "$merged/usr/lib/modules/$release/kernel/drivers/net/$kind"
done
size=$(du -sm --apparent-size "$merged" | cut -f 1)
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$merged" "$dir/root.img" "$((size * 5 / 4 + 64))M"
umount "$merged"
rm -rf "$dir/upper" "$dir/work" "$merged"
