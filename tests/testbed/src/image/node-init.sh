#!/usr/bin/busybox sh
# The first program of a node. The root of an initramfs cannot be exchanged by pivot_root(2),
# which programs that confine themselves use. So the root becomes a mount on top of it.
/usr/bin/busybox mount --bind / /newroot
cd /newroot
/usr/bin/busybox mount --move . /
exec /usr/bin/busybox chroot . /usr/sbin/testbed-rc
