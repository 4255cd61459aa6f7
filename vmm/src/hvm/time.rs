//! The guest's time stands still while it is paused.
//!
//! Both clocks that guests read are held: KVM's paravirtual clock and the
//! time-stamp counter. So a guest's monotonic clock and its watchdogs know of no
//! pause. Its time of day is late afterwards by the pause, as under other
//! monitors on KVM: the guest's NTP client sets it, from a server or from the
//! node's clock (`ptp_kvm`).

use std::arch::x86_64::_rdtsc;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::vcpu::Vcpu;

// Section 4.80 of Linux' "The Definitive KVM API Documentation".
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The clocks at the moment in which the guest was stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped {
    /// Nanoseconds of the paravirtual clock. Not every KVM has it.
    pub(super) clock: Option<u64>,
    /// The node's time-stamp counter.
    pub(super) tsc: u64,
}

impl Stopped {
    /// Looks at the clocks of a machine whose vCPUs have just stopped.
    pub(super) fn now(vm: &VmFd) -> Self {
        Self {
            clock: vm.get_clock().ok().map(|clock| clock.clock),
            // SAFETY: reading the counter has no preconditions.
            tsc: unsafe { _rdtsc() },
        }
    }

    /// Lets the clocks go on from there.
    pub(super) fn go_on(self, vm: &VmFd, vcpus: &[Vcpu]) {
        // SAFETY: reading the counter has no preconditions.
        let since = unsafe { _rdtsc() }.wrapping_sub(self.tsc);
        for vcpu in vcpus {
            // Linux before 5.16 has no offset to set: the counter has gone on.
            if let Err(error) = hold_back(&vcpu.paused_fd(), since) {
                tracing::debug!(%error, "the time-stamp counter goes on over a pause");
            }
        }
        // KVM computes the paravirtual clock from the counter: it comes after.
        let clock = self.clock.map(|clock| kvm_clock_data {
            clock,
            ..Default::default()
        });
        if let Some(Err(error)) = clock.map(|clock| vm.set_clock(&clock)) {
            tracing::warn!(%error, "the guest's clock goes on over a pause");
        }
    }
}

/// Takes `ticks` off a vCPU's time-stamp counter.
fn hold_back(vcpu: &VcpuFd, ticks: u64) -> Result<(), errno::Error> {
    let mut offset = 0_u64;
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(&mut offset) as u64,
        ..Default::default()
    };
    // SAFETY: the attribute names a `u64`, which KVM writes and which lives on.
    if unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR(), &attribute) } < 0 {
        return errno::errno_result();
    }
    offset = offset.wrapping_sub(ticks);
    let attribute = kvm_device_attr {
        addr: std::ptr::from_ref(&offset) as u64,
        ..attribute
    };
    // SAFETY: the attribute names a `u64`, which KVM reads.
    if unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR(), &attribute) } < 0 {
        return errno::errno_result();
    }
    Ok(())
}
