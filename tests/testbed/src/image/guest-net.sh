#!/bin/sh
# Gives the first network card the address on the kernel command line.
argument() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p" | tail -n 1; }
address=$(argument blanket.ip)
gateway=$(argument blanket.gw)
ip link set lo up
for card in /sys/class/net/e*; do
    [ -e "$card" ] || continue
    ip link set "${card##*/}" up
    [ -z "$address" ] || ip address add "$address" dev "${card##*/}"
    [ -z "$gateway" ] || ip route add default via "$gateway"
    break
done
