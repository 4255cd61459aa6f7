#!/usr/bin/busybox sh
# Xen's host domain: starts Xen's daemons and the node, and ends with the node.
export PATH=/usr/bin:/usr/sbin:/usr/lib/xen-4.17/bin
/usr/bin/busybox mount -t proc proc /proc
/usr/bin/busybox mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/xen /run/xenstored /run/lock /var/log/xen /var/lib/xen
ln -sfn /run /var/run
ln -sfn /run/lock /var/lock
ln -sfn /run/xenstored /var/lib/xenstored

for bus in pci virtio; do
    cat /sys/bus/$bus/devices/*/modalias | sort -u | xargs modprobe -abq
done
modprobe -a xen_evtchn xen_gntdev xen_gntalloc xen_privcmd xenfs xen_netback xen_blkback bridge tun
mount -t xenfs xenfs /proc/xen

xenstored --pid-file /run/xenstored.pid
xen-init-dom0
xenconsoled --pid-file=/run/xenconsoled.pid

arguments() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p"; }
ip link set lo up
number=0
for mac in $(arguments blanket.bridges | tr , ' '); do
    for card in /sys/class/net/*; do
        [ "$(cat "$card/address")" = "$mac" ] || continue
        ip link add "br$number" type bridge forward_delay 0
        # Jumbo frames, where the node's provider has them.
        ip link set "${card##*/}" mtu 9001 master "br$number" up
        ip link set "br$number" mtu 9001 up
    done
    number=$((number + 1))
done

for disk in /sys/block/vd*; do
    serial=$(cat "$disk/serial")
    case $serial in
    node-*) cat "/dev/${disk##*/}" >"/run/$serial" ;;
    esac
done

# It lasts as long as the node.
xl create -F /etc/xen/node.cfg &
node=$!
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" != blanket.agent ] || agent=/dev/${port##*/}
done
# The node is the first domain.
until console=$(xenstore-read /local/domain/1/console/tty 2>/dev/null) && [ -c "$console" ]; do
    [ -e /proc/$node ] || break
    sleep 0.1
done
blanket-agent join "$agent" "$console" &
[ ! -x /etc/xen/beside ] || /etc/xen/beside &
wait $node
poweroff -f
