#!/usr/bin/busybox sh
# Tells Xen's block back end which device is meant. Run by xl.
export PATH=/usr/bin:/usr/sbin
[ "$1" = add ] || exit 0
device=$(xenstore-read "$XENBUS_PATH/params")
xenstore-write "$XENBUS_PATH/physical-device" "$(stat -L -c '%t:%T' "$device")"
xenstore-write "$XENBUS_PATH/physical-device-path" "$device"
xenstore-write "$XENBUS_PATH/hotplug-status" connected
