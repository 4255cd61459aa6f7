//! A virtqueue (virtio 1.2, 2.7) from the driver's side, in memory that is
//! shared with a device which may lie.
//!
//! What the driver has to remember it remembers here. Of the shared memory only
//! what the device writes is read, each value once, and checked.

use std::sync::atomic::{Ordering, fence};

use blanket_memory::{GuestRam, IoVec, iovec};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Entries of a ring, and its buffers: of the longest frame there are 60.
pub(super) const SIZE: u16 = 1024;
/// Bytes of a buffer.
pub(super) const BUFFER: usize = 4096;
/// Where the available ring lies, behind the descriptors.
const AVAILABLE: u64 = 16 * SIZE as u64;
/// Where the used ring lies.
const USED: u64 = AVAILABLE + 4096;
/// Where the buffers lie.
const BUFFERS: u64 = USED + 12288;
/// Bytes that a ring takes with its buffers.
pub(super) const BYTES: u64 = BUFFERS + SIZE as u64 * BUFFER as u64;

/// How a device broke a ring's rules.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// There cannot be so many.
    #[error("{0} buffers used at once")]
    Index(u16),
    /// It used what it was not given.
    #[error("buffer {0} used, which it does not have")]
    Buffer(u32),
    /// It wrote more than there is room for, or no header.
    #[error("{0} bytes in a buffer")]
    Length(u32),
    /// A frame in more buffers than it used, or than a frame takes.
    #[error("a frame in {0} buffers")]
    Count(u16),
    /// The ring is not in its memory.
    #[error("the ring's memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// The driver's end of a ring.
pub(super) struct Ring {
    ram: GuestRam,
    base: u64,
    /// All buffers, one behind the other.
    buffers: IoVec,
    next_available: u16,
    next_used: u16,
    /// By head: how many buffers of the chain the device has.
    lent: Vec<u16>,
}

impl Ring {
    /// A ring without buffers at `base` in `ram`, whose memory is all zeros.
    pub(super) fn new(ram: &GuestRam, base: u64) -> Result<Self, Broken> {
        let mut pieces = Vec::new();
        let len = usize::from(SIZE) * BUFFER;
        iovec::push(ram, GuestAddress(base + BUFFERS), len, &mut pieces)?;
        let [buffers] = pieces[..] else {
            return Err(Broken::Memory(GuestMemoryError::GuestAddressOverflow));
        };
        Ok(Self {
            ram: ram.clone(),
            base,
            buffers,
            next_available: 0,
            next_used: 0,
            lent: vec![0; SIZE.into()],
        })
    }

    /// Addresses of the descriptors, the available and the used ring.
    pub(super) fn places(&self) -> [u64; 3] {
        [0, AVAILABLE, USED].map(|offset| self.base + offset)
    }

    /// The first `len` bytes of a buffer.
    pub(super) fn buffer(&self, index: u16, len: usize) -> IoVec {
        let mut piece = self.buffers;
        piece.advance(usize::from(index) * BUFFER);
        piece.truncate(len.min(BUFFER));
        piece
    }

    /// Lends the device a chain of buffers with `len` bytes in all, which it
    /// sees with [`Ring::publish`].
    pub(super) fn lend(&mut self, chain: &[u16], len: usize, write: bool) -> Result<(), Broken> {
        let Some(head) = chain.first() else {
            return Ok(());
        };
        let mut left = len;
        for (i, index) in chain.iter().enumerate() {
            let next = chain.get(i + 1);
            let mut flags = if write { VRING_DESC_F_WRITE } else { 0 };
            if next.is_some() {
                flags |= VRING_DESC_F_NEXT;
            }
            let n = left.min(BUFFER);
            left -= n;
            let at = self.base + BUFFERS + u64::from(*index) * BUFFER as u64;
            let next = next.copied().unwrap_or(0);
            let descriptor = Descriptor::new(at, n as u32, flags as u16, next);
            let slot = GuestAddress(self.base + 16 * u64::from(*index));
            self.ram.write_obj(RawDescriptor::from(descriptor), slot)?;
        }
        let slot = self.base + AVAILABLE + 4 + 2 * u64::from(self.next_available % SIZE);
        self.ram.write_obj(head.to_le(), GuestAddress(slot))?;
        self.next_available = self.next_available.wrapping_add(1);
        if let Some(lent) = self.lent.get_mut(usize::from(*head)) {
            *lent = chain.len() as u16;
        }
        Ok(())
    }

    /// Shows the device what was lent. True if it wants to be told.
    pub(super) fn publish(&mut self) -> Result<bool, Broken> {
        let index = GuestAddress(self.base + AVAILABLE + 2);
        self.ram
            .store(self.next_available.to_le(), index, Ordering::Release)?;
        // The device writes its wish, then looks at the index: as in a lock,
        // both sides must have stored before they load.
        fence(Ordering::SeqCst);
        let flags = GuestAddress(self.base + USED);
        let flags: u16 = self.ram.load(flags, Ordering::Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// Whether the device is to tell of used buffers.
    pub(super) fn want_calls(&self, wanted: bool) -> Result<(), Broken> {
        let flags = if wanted {
            0
        } else {
            VRING_AVAIL_F_NO_INTERRUPT
        };
        let place = GuestAddress(self.base + AVAILABLE);
        self.ram
            .store((flags as u16).to_le(), place, Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// How many chains the device has used and nobody has taken back.
    pub(super) fn used(&self) -> Result<u16, Broken> {
        let index = GuestAddress(self.base + USED + 2);
        let index: u16 = self.ram.load(index, Ordering::Acquire)?;
        let count = u16::from_le(index).wrapping_sub(self.next_used);
        let lent = self.next_available.wrapping_sub(self.next_used);
        if count > lent {
            return Err(Broken::Index(count));
        }
        Ok(count)
    }

    /// Takes the next of [`Ring::used`] chains back: its head, of how many
    /// buffers it was, and how many bytes the device says that it wrote.
    pub(super) fn take_back(&mut self) -> Result<(u16, u16, u32), Broken> {
        let slot = self.base + USED + 4 + 8 * u64::from(self.next_used % SIZE);
        let element: u64 = self.ram.read_obj(GuestAddress(slot))?;
        let element = u64::from_le(element);
        let (id, len) = (element as u32, (element >> 32) as u32);
        let lent = self.lent.get_mut(id as usize).filter(|lent| **lent > 0);
        let count = std::mem::take(lent.ok_or(Broken::Buffer(id))?);
        self.next_used = self.next_used.wrapping_add(1);
        // It is below the ring's size.
        Ok((id as u16, count, len))
    }
}
