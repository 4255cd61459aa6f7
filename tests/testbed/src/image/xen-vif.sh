#!/usr/bin/busybox sh
# Plugs a guest's network card into its bridge. Run by xl.
export PATH=/usr/bin:/usr/sbin
case $1 in online | add) ;; *) exit 0 ;; esac
bridge=$(xenstore-read "$XENBUS_PATH/bridge")
ip link set "$vif" mtu "$(cat "/sys/class/net/$bridge/mtu")" master "$bridge" up
xenstore-write "$XENBUS_PATH/hotplug-status" connected
