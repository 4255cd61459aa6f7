#!/usr/bin/busybox sh
# The first program of a guest: drivers, then either the root disk or the agent.
export PATH=/usr/bin:/usr/sbin
/usr/bin/busybox mount -t proc proc /proc
/usr/bin/busybox mount -t devtmpfs devtmpfs /dev
read -r uptime _ </proc/uptime
echo "guest: init after $uptime s" >/dev/console
mount -t sysfs sysfs /sys
if grep -qs xen /sys/hypervisor/type; then
    modprobe -a xen_blkfront xen_netfront af_packet
else
    modprobe -a virtio_pci virtio_blk virtio_net virtio_console evdev button af_packet
    cat /sys/bus/virtio/devices/*/modalias | xargs modprobe -abq
fi

argument() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p" | tail -n 1; }
root=$(argument root)
if [ -n "$root" ]; then
    # Disks are found in the background.
    tries=0
    until device=$(findfs "$root" 2>/dev/null) && [ -b "$device" ] || [ $tries -ge 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    access=rw
    grep -qw ro /proc/cmdline && access=ro
    mkdir -p /newroot
    if mount -o "$access" "$device" /newroot; then
        mount --move /dev /newroot/dev
        mount --move /proc /newroot/proc
        mount --move /sys /newroot/sys
        exec switch_root /newroot /sbin/init
    fi
    echo "guest: cannot mount $root" >/dev/console
fi
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
hostname guest
testbed-net
exec init
