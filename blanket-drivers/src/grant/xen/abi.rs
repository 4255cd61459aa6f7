//! The drivers' calls (Linux's `include/uapi/xen/{gntalloc,gntdev,evtchn}.h`).
//! Their numbers say neither direction nor more than the least size.

use vmm_sys_util::ioctl::_IOC_NONE;
use vmm_sys_util::ioctl_ioc_nr;

const GRANTS: u32 = b'G' as u32;
const EVENTS: u32 = b'E' as u32;

ioctl_ioc_nr!(GNTDEV_MAP_GRANT_REF, _IOC_NONE, GRANTS, 0, 24);
ioctl_ioc_nr!(GNTDEV_UNMAP_GRANT_REF, _IOC_NONE, GRANTS, 1, 16);
ioctl_ioc_nr!(GNTALLOC_ALLOC_GREF, _IOC_NONE, GRANTS, 5, 24);
ioctl_ioc_nr!(GNTALLOC_DEALLOC_GREF, _IOC_NONE, GRANTS, 6, 16);
// The same of both drivers.
ioctl_ioc_nr!(SET_UNMAP_NOTIFY, _IOC_NONE, GRANTS, 7, 16);
ioctl_ioc_nr!(EVTCHN_BIND_INTERDOMAIN, _IOC_NONE, EVENTS, 1, 8);
ioctl_ioc_nr!(EVTCHN_BIND_UNBOUND_PORT, _IOC_NONE, EVENTS, 2, 4);
ioctl_ioc_nr!(EVTCHN_UNBIND, _IOC_NONE, EVENTS, 3, 4);
ioctl_ioc_nr!(EVTCHN_NOTIFY, _IOC_NONE, EVENTS, 4, 4);

/// `GNTALLOC_FLAG_WRITABLE`.
pub(super) const WRITABLE: u16 = 1;

/// `UNMAP_NOTIFY_CLEAR_BYTE`, `UNMAP_NOTIFY_SEND_EVENT`.
pub(super) const CLEAR_BYTE: u32 = 1;
pub(super) const SEND_EVENT: u32 = 2;

/// Which pages: `struct ioctl_gntdev_unmap_grant_ref`, and (where the last
/// field is padding) `ioctl_gntalloc_dealloc_gref`.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Range {
    pub(super) index: u64,
    pub(super) count: u32,
    pad: u32,
}

impl Range {
    pub(super) fn new(index: u64, count: u32) -> Self {
        Self {
            index,
            count,
            pad: 0,
        }
    }
}

/// `struct ioctl_gntdev_unmap_notify`, `ioctl_gntalloc_unmap_notify`.
#[repr(C)]
pub(super) struct Notify {
    pub(super) index: u64,
    pub(super) action: u32,
    pub(super) port: u32,
}
