#!/usr/bin/busybox sh
# Brings a node up: file systems, drivers, addresses, payload disks. Then the agent is started.
export PATH=/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /usr/local/bin /dev/hugepages
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t hugetlbfs hugetlbfs /dev/hugepages
ln -s /proc/self/fd /dev/fd

# Processors but the first start at the end: see `blanket-agent hold`.
start_processors() {
    if [ -e /dev/kvm ]; then
        blanket-agent hold >/run/held 2>&1 &
        until [ -s /run/held ]; do sleep 0.02; done
    fi
    for processor in /sys/devices/system/cpu/cpu[1-9]*; do
        [ ! -e "$processor/online" ] || echo 1 >"$processor/online"
    done
}

# Drivers of what is there; virtio devices show up when virtio_pci is loaded.
for bus in pci acpi virtio xen; do
    cat /sys/bus/$bus/devices/*/modalias 2>/dev/null | sort -u | xargs modprobe -abq
done
case " $(grep -m1 ^flags /proc/cpuinfo) " in
*" svm "*) modprobe kvm_amd ;;
*" vmx "*) modprobe kvm_intel ;;
esac
# SCSI disks name no module.
[ ! -e /sys/class/scsi_host ] || modprobe -q sd_mod
modprobe -a tun vhost_net bridge
if grep -qs xen /sys/hypervisor/type; then
    modprobe -a xen_evtchn xen_gntdev xen_gntalloc xen_privcmd xenfs
    mount -t xenfs xenfs /proc/xen
fi

arguments() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p"; }
hostname "$(arguments blanket.name)"
ip link set lo up
mtu=$(arguments blanket.mtu) metadata=$(arguments blanket.metadata)
for pair in $(arguments blanket.net); do
    mac=${pair%=*} address=${pair#*=}
    for card in /sys/class/net/*; do
        [ "$(cat "$card/address")" = "$mac" ] || continue
        card=${card##*/}
        [ -z "$mtu" ] || ip link set "$card" mtu "$mtu"
        ip link set "$card" up
        [ -z "$address" ] || ip address add "$address" dev "$card"
        # Through the first card.
        [ -z "$metadata" ] || ip route add "$metadata" dev "$card"
        metadata=
    done
done

# Disks are found in the background.
disks=$(arguments blanket.disks) tries=0
until [ "$(ls /sys/block | grep -c -e '^[vsn][dv]' -e '^xvd')" -ge "$disks" ] || [ $tries -ge 200 ]; do
    sleep 0.05
    tries=$((tries + 1))
done
payload() {
    mkdir -p "/payload/$2"
    mount -t ext4 -o noatime "/dev/$1" "/payload/$2"
    [ ! -x "/payload/$2/activate" ] || "/payload/$2/activate"
}
for disk in /sys/block/vd*; do
    serial=$(cat "$disk/serial" 2>/dev/null)
    case $serial in
    payload-*) payload "${disk##*/}" "${serial#payload-}" ;;
    esac
done
# Xen's disks have no serial numbers.
for pair in $(arguments blanket.payload); do
    payload "${pair%=*}" "${pair#*=}"
done
start_processors
# Programs run on the others, if the first is to be spared.
if grep -qw blanket.spare /proc/cmdline; then
    taskset -p "$(printf %x $(((1 << $(grep -c ^processor /proc/cpuinfo)) - 2)))" $$ >/dev/null
fi
exec init
