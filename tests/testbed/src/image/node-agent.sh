#!/usr/bin/busybox sh
# Serves the command channel on the virtio port that is meant for it, or on Xen's console.
export PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin HOME=/root
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = blanket.agent ] && exec blanket-agent serve "/dev/${port##*/}"
done
! grep -qs xen /sys/hypervisor/type || exec blanket-agent serve /dev/hvc0
sleep 1
