//! What KVM knows of the guests of a guest hypervisor: nested state.
//!
//! On AMD's processors, that is also whether the hypervisor has interrupts held
//! back (GIF), which it has around each entry to its guest. Not every KVM has it:
//! KVM-PVM says EINVAL. There the guest has no such guests.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
    kvm_nested_state,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Bytes of the part that is always there.
const HEAD: usize = size_of::<kvm_nested_state>();
const MOST: usize = size_of::<KvmNestedStateBuffer>();
/// No page.
const NONE: u64 = u64::MAX;

/// `struct kvm_nested_state`, as bytes; none where KVM has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NestedState(Vec<u8>);

impl NestedState {
    /// A vCPU's, which does not run.
    pub(super) fn read(fd: &VcpuFd) -> Self {
        let mut buffer = KvmNestedStateBuffer::empty();
        match fd.nested_state(&mut buffer) {
            Ok(_) => Self::of(&buffer),
            Err(_) => Self::default(),
        }
    }

    fn of(buffer: &KvmNestedStateBuffer) -> Self {
        let len = (buffer.size as usize).clamp(HEAD, MOST);
        // SAFETY: the structure is plain data without padding, all of it was
        // zeros before KVM wrote it, and the length is at most its own.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const *buffer).cast::<u8>(), len) };
        Self(bytes.to_vec())
    }

    /// The structure; none if these bytes are none.
    fn buffer(&self) -> Option<KvmNestedStateBuffer> {
        if !(HEAD..=MOST).contains(&self.0.len()) {
            return None;
        }
        let mut buffer = KvmNestedStateBuffer::empty();
        // SAFETY: the structure is plain data, and has room for them.
        unsafe {
            let to = (&raw mut buffer).cast::<u8>();
            std::ptr::copy_nonoverlapping(self.0.as_ptr(), to, self.0.len());
        }
        // KVM reads as much.
        buffer.size = self.0.len() as u32;
        Some(buffer)
    }

    /// Whether it is that of a vCPU after power-on, which need not be carried.
    pub(super) fn is_idle(&self) -> bool {
        let Some(buffer) = self.buffer() else {
            return self.0.is_empty();
        };
        match u32::from(buffer.format) {
            KVM_STATE_NESTED_FORMAT_SVM => u32::from(buffer.flags) == KVM_STATE_NESTED_GIF_SET,
            KVM_STATE_NESTED_FORMAT_VMX => {
                // SAFETY: the format says that this is the part; any bits are
                // valid integers.
                let vmx = unsafe { buffer.hdr.vmx };
                buffer.flags == 0 && vmx.vmxon_pa == NONE && vmx.vmcs12_pa == NONE
            }
            _ => false,
        }
    }

    /// Has a vCPU leave a guest of its guest's, if it runs one.
    pub(super) fn leave(fd: &VcpuFd) {
        let mut now = KvmNestedStateBuffer::empty();
        if fd.nested_state(&mut now).is_ok() && !Self::of(&now).is_idle() {
            // What it refuses here, it says of the registers.
            let _ = fd.set_nested_state(&idle(now.format));
        }
    }

    /// Writes it to a vCPU that has its system registers, and is in no guest of its
    /// guest's. There is nothing to be done where it is idle.
    pub(super) fn write(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        if self.is_idle() {
            return Ok(());
        }
        let buffer = self.buffer();
        let buffer = buffer.ok_or_else(|| kvm_ioctls::Error::new(libc::EINVAL))?;
        fd.set_nested_state(&buffer)
    }
}

/// A vCPU's in no guest of its guest's.
fn idle(format: u16) -> KvmNestedStateBuffer {
    let mut buffer = KvmNestedStateBuffer::empty();
    buffer.size = HEAD as u32;
    buffer.format = format;
    if u32::from(format) == KVM_STATE_NESTED_FORMAT_SVM {
        buffer.flags = KVM_STATE_NESTED_GIF_SET as u16;
    } else {
        buffer.hdr.vmx.vmxon_pa = NONE;
        buffer.hdr.vmx.vmcs12_pa = NONE;
    }
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_runs_no_guests_of_its_guests_has_nothing_to_carry() {
        for format in [KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX] {
            let state = NestedState::of(&idle(format as u16));
            assert!(state.is_idle() && state.0.len() == HEAD);
        }
        assert!(NestedState::default().is_idle());
    }

    #[test]
    fn what_is_in_use_comes_back_as_it_was_and_damage_is_refused() {
        // A hypervisor of AMD's that holds interrupts back.
        let mut buffer = idle(KVM_STATE_NESTED_FORMAT_SVM as u16);
        buffer.flags = 0;
        assert!(!NestedState::of(&buffer).is_idle());
        // In its guest.
        buffer.flags = KVM_STATE_NESTED_GIF_SET as u16 | 1;
        buffer.hdr.svm.vmcb_pa = 0x5000;
        buffer.size = 128 + 4096;
        let state = NestedState::of(&buffer);
        assert!(!state.is_idle());
        let back = state.buffer().unwrap();
        assert_eq!(NestedState::of(&back), state);
        assert_eq!(back.size, 128 + 4096);
        for damaged in [vec![0; HEAD - 1], vec![0; MOST + 1]] {
            let damaged = NestedState(damaged);
            assert!(damaged.buffer().is_none() && !damaged.is_idle());
        }
        // One of Intel's that has entered VMX operation.
        let mut vmx = idle(KVM_STATE_NESTED_FORMAT_VMX as u16);
        vmx.hdr.vmx.vmxon_pa = 0x7000;
        assert!(!NestedState::of(&vmx).is_idle());
    }
}
