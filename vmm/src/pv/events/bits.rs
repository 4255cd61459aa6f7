//! The bits of event channels in guest memory.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use blanket_memory::GuestRam;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::Places;
use crate::pv::abi::SharedInfo;

/// Access to what guest and hypervisor share. The guest may write it at any time.
pub(super) struct Bits {
    pub(super) memory: GuestRam,
    pub(super) places: Places,
}

impl Bits {
    pub(super) fn ring_for(&self, port: u32, value: u8) {
        let at = GuestAddress(self.places.doorbells.0 + u64::from(port));
        let _ = self.memory.write_obj(value, at);
    }

    pub(super) fn pending_word(&self, word: u64) -> u64 {
        self.places.shared_info.0 + offset_of!(SharedInfo, evtchn_pending) as u64 + word * 8
    }

    pub(super) fn mask_word(&self, word: u64) -> u64 {
        self.places.shared_info.0 + offset_of!(SharedInfo, evtchn_mask) as u64 + word * 8
    }

    /// An operation on a word that the guest changes meanwhile. All places are
    /// checked to be in memory before they are used; elsewhere, it reads 0.
    fn atomic(&self, at: u64, operation: impl FnOnce(&AtomicU64) -> u64) -> u64 {
        let slice = self.memory.get_slice(GuestAddress(at), 8);
        slice
            .ok()
            .and_then(|slice| {
                let value = slice.get_atomic_ref(0).ok().map(operation);
                slice.bitmap().mark_dirty(0, 8);
                value
            })
            .unwrap_or(0)
    }

    pub(super) fn load(&self, at: u64) -> u64 {
        self.atomic(at, |word| word.load(Ordering::SeqCst))
    }

    pub(super) fn store(&self, at: u64, value: u64) {
        self.atomic(at, |word| word.swap(value, Ordering::SeqCst));
    }

    pub(super) fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.atomic(at, |word| word.fetch_or(bits, Ordering::SeqCst))
    }

    pub(super) fn fetch_and(&self, at: u64, bits: u64) -> u64 {
        self.atomic(at, |word| word.fetch_and(bits, Ordering::SeqCst))
    }

    pub(super) fn swap_byte(&self, at: u64, value: u8) {
        if let Ok(slice) = self.memory.get_slice(GuestAddress(at), 1)
            && let Ok(byte) = slice.get_atomic_ref::<AtomicU8>(0)
        {
            byte.swap(value, Ordering::SeqCst);
            slice.bitmap().mark_dirty(0, 1);
        }
    }
}

/// Where a port's bit is: (word, bit).
pub(super) fn place(port: u32) -> (u64, u64) {
    (u64::from(port / 64), 1 << (port % 64))
}
