//! The device's side of a split virtqueue (virtio 1.2, 2.7).
//!
//! Everything in it may change at any time, and each value is read once. What
//! makes no sense ends the connection: there is no way to go on.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use thiserror::Error;
use vm_memory::VolatileSlice;

use super::event::{self, Kick};
use super::memory::{Log, Memory};

/// Descriptors for one frame at most.
pub(super) const CHAIN: usize = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// `VIRTQ_USED_F_NO_NOTIFY`, and `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_EVENT: u16 = 1;

/// How a front end broke a ring's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Broken {
    /// More is available than the ring has.
    #[error("more is available than the ring has")]
    Available,
    /// A descriptor is not in its table.
    #[error("a descriptor that is not in its table")]
    Index,
    /// A chain that is endless, or too long.
    #[error("a chain of very many descriptors")]
    Chain,
    /// A table in a table, or one of odd length.
    #[error("a malformed indirect table")]
    Table,
    /// A buffer is not in memory.
    #[error("a buffer that is not in memory")]
    Buffer,
    /// A buffer to write where one to read is due, or the other way.
    #[error("a buffer of the wrong direction")]
    Direction,
    /// It took memory away that is in use.
    #[error("memory was taken away")]
    Cut,
}

/// What a front end says of where a ring is: its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// The guest's address of the used ring, if its changes are noted.
    pub(super) log: Option<u64>,
}

/// Where a ring is in this process.
#[derive(Clone, Copy, Debug)]
struct Places {
    descriptors: NonNull<u8>,
    available: NonNull<u8>,
    used: NonNull<u8>,
    log: Option<u64>,
}

impl Places {
    fn find(addresses: &Addresses, size: u16, memory: &Memory) -> Option<Self> {
        let size = usize::from(size);
        Some(Self {
            descriptors: memory.pointer(addresses.descriptors, 16 * size, 16)?,
            available: memory.pointer(addresses.available, 6 + 2 * size, 2)?,
            used: memory.pointer(addresses.used, 6 + 8 * size, 4)?,
            log: addresses.log,
        })
    }
}

/// A descriptor, read once.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(words: [u64; 2]) -> Self {
        let [addr, rest] = words.map(u64::from_le);
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// Bytes of a cache's line, and those of a buffer that are fetched ahead: a
/// small frame with its header.
const LINE: usize = 64;
const FETCHED: usize = 2 * LINE;

/// Has the processor fetch what is at `place`, which may be anywhere.
fn prefetch(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing is read, and nothing happens if nothing is there.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// An entry's number. It lies apart from others: a processor that has written one
/// and reads two at once waits until all that it has written is where others see
/// it, and to guests' memory that takes longer than all else with a frame.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(4))]
struct Index(u16);

/// A ring that is served.
#[derive(Debug)]
pub(super) struct Ring {
    addresses: Addresses,
    places: Places,
    /// Keeps what `places` points to.
    memory: Memory,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// The next entry to take, and the end of those known to be available.
    next: Index,
    seen: Index,
    /// The next entry to hand back, the end of those that the driver knows
    /// of, and of those that it was told of.
    used: Index,
    published: Index,
    told: Index,
    /// Tells of available buffers, and of used ones.
    kick: Kick,
    pub(super) call: Option<OwnedFd>,
    /// Whether frames may pass.
    pub(super) enabled: bool,
}

// SAFETY: the pointers are into `memory`, which goes along and does not care
// which thread it is used by.
unsafe impl Send for Ring {}

/// How a ring is set up.
pub(super) struct Setup {
    pub(super) size: u16,
    pub(super) addresses: Addresses,
    pub(super) features: u64,
    pub(super) kick: Kick,
    pub(super) call: Option<OwnedFd>,
    pub(super) enabled: bool,
}

impl Ring {
    /// A ring whose buffers have all been handed back that were taken: it goes
    /// on where the used ring ends, so that what a predecessor had taken and
    /// not handed back is taken again.
    ///
    /// `None`: it is not in memory.
    pub(super) fn new(setup: Setup, memory: &Memory) -> Option<Self> {
        let places = Places::find(&setup.addresses, setup.size, memory)?;
        let mut ring = Self {
            addresses: setup.addresses,
            places,
            memory: memory.clone(),
            size: setup.size,
            event_idx: false,
            indirect: false,
            next: Index::default(),
            seen: Index::default(),
            used: Index::default(),
            published: Index::default(),
            told: Index::default(),
            kick: setup.kick,
            call: setup.call,
            enabled: setup.enabled,
        };
        ring.set_features(setup.features);
        let at = ring.used_word(2).load(Ordering::Acquire);
        let at = u16::from_le(at);
        (ring.next.0, ring.seen.0) = (at, at);
        (ring.used.0, ring.published.0, ring.told.0) = (at, at, at);
        Some(ring)
    }

    pub(super) fn set_features(&mut self, features: u64) {
        use virtio_bindings::virtio_ring as bits;
        self.event_idx = features & 1 << bits::VIRTIO_RING_F_EVENT_IDX != 0;
        self.indirect = features & 1 << bits::VIRTIO_RING_F_INDIRECT_DESC != 0;
    }

    /// Goes on in other memory, or at another place. False, and nothing
    /// changed: it is not there.
    pub(super) fn move_to(&mut self, addresses: Option<Addresses>, memory: &Memory) -> bool {
        let addresses = addresses.unwrap_or(self.addresses);
        let Some(places) = Places::find(&addresses, self.size, memory) else {
            return false;
        };
        self.places = places;
        self.addresses = addresses;
        self.memory = memory.clone();
        true
    }

    /// The next entry that it would take.
    pub(super) fn position(&self) -> u16 {
        self.used.0
    }

    fn word(&self, base: NonNull<u8>, offset: usize) -> &AtomicU16 {
        // SAFETY: callers name words of the available and used ring, which
        // `Places::find` saw to be in memory, and aligned.
        unsafe { AtomicU16::from_ptr(base.as_ptr().add(offset).cast()) }
    }

    fn available_word(&self, offset: usize) -> &AtomicU16 {
        self.word(self.places.available, offset)
    }

    fn used_word(&self, offset: usize) -> &AtomicU16 {
        self.word(self.places.used, offset)
    }

    fn slot(&self, index: u16) -> usize {
        // A size is a power of two.
        usize::from(index & (self.size - 1))
    }

    /// How many chains can be taken.
    ///
    /// # Errors
    ///
    /// More than the ring has.
    pub(super) fn available(&mut self) -> Result<u16, Broken> {
        let have = self.seen.0.wrapping_sub(self.next.0);
        if have > 0 {
            return Ok(have);
        }
        self.look()
    }

    /// As [`Ring::available`], looking anew.
    pub(super) fn look(&mut self) -> Result<u16, Broken> {
        self.seen.0 = u16::from_le(self.available_word(2).load(Ordering::Acquire));
        let have = self.seen.0.wrapping_sub(self.next.0);
        if have > self.size {
            return Err(Broken::Available);
        }
        Ok(have)
    }

    /// The head of the chain `ahead` of the next one.
    fn head(&self, ahead: u16) -> Result<u16, Broken> {
        let slot = self.slot(self.next.0.wrapping_add(ahead));
        let head = self.available_word(4 + 2 * slot).load(Ordering::Relaxed);
        let head = u16::from_le(head);
        (head < self.size).then_some(head).ok_or(Broken::Index)
    }

    /// Gives `each` the buffers of the chain `ahead` of the next one (fewer
    /// than are available) with the guest's addresses; all of them are to be
    /// written by the device, or none. The chain's head. Each descriptor takes
    /// one off `budget`.
    ///
    /// # Errors
    ///
    /// See [`Broken`].
    pub(super) fn chain<'a>(
        &self,
        memory: &'a Memory,
        ahead: u16,
        write: bool,
        budget: &mut usize,
        each: &mut impl FnMut(u64, VolatileSlice<'a>),
    ) -> Result<u16, Broken> {
        let head = self.head(ahead)?;
        let mut index = head;
        loop {
            *budget = budget.checked_sub(1).ok_or(Broken::Chain)?;
            let descriptor = self.descriptor(index);
            if descriptor.flags & INDIRECT != 0 {
                // It is the last one of its chain.
                if !self.indirect || descriptor.flags & NEXT != 0 {
                    return Err(Broken::Table);
                }
                Self::table(memory, descriptor, write, budget, each)?;
                return Ok(head);
            }
            Self::buffer(memory, descriptor, write, each)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(head);
            }
            index = descriptor.next;
            if index >= self.size {
                return Err(Broken::Index);
            }
        }
    }

    /// The buffers of the chain in an indirect table.
    fn table<'a>(
        memory: &'a Memory,
        descriptor: Descriptor,
        write: bool,
        budget: &mut usize,
        each: &mut impl FnMut(u64, VolatileSlice<'a>),
    ) -> Result<(), Broken> {
        let entries = descriptor.len / 16;
        if !descriptor.len.is_multiple_of(16) || entries == 0 || entries > 1 << 15 {
            return Err(Broken::Table);
        }
        let table = memory
            .slice(descriptor.addr, descriptor.len as usize)
            .ok_or(Broken::Buffer)?;
        let mut index = 0;
        loop {
            *budget = budget.checked_sub(1).ok_or(Broken::Chain)?;
            let mut bytes = [0; 16];
            let entry = table.offset(16 * usize::from(index));
            if entry.map_or(0, |entry| entry.copy_to(&mut bytes[..])) != 16 {
                return Err(Broken::Index);
            }
            let words = u128::from_le_bytes(bytes);
            let entry = Descriptor::parse([(words as u64).to_le(), ((words >> 64) as u64).to_le()]);
            if entry.flags & INDIRECT != 0 {
                return Err(Broken::Table);
            }
            Self::buffer(memory, entry, write, each)?;
            if entry.flags & NEXT == 0 {
                return Ok(());
            }
            index = entry.next;
            if u32::from(index) >= entries {
                return Err(Broken::Index);
            }
        }
    }

    fn buffer<'a>(
        memory: &'a Memory,
        descriptor: Descriptor,
        write: bool,
        each: &mut impl FnMut(u64, VolatileSlice<'a>),
    ) -> Result<(), Broken> {
        if (descriptor.flags & WRITE != 0) != write {
            return Err(Broken::Direction);
        }
        memory
            .slices(descriptor.addr, descriptor.len as usize, each)
            .ok_or(Broken::Buffer)
    }

    /// Has the processor fetch the first buffers of the `count` chains from
    /// `ahead` on, of those that are known to be available: what another
    /// processor has written is far away, and to fetch many at a time takes
    /// little longer than one. What is read for it is not relied on.
    pub(super) fn fetch(&self, memory: &Memory, ahead: u16, count: u16) {
        let have = self.seen.0.wrapping_sub(self.next.0);
        for ahead in ahead..ahead.saturating_add(count).min(have) {
            let Ok(index) = self.head(ahead) else {
                return;
            };
            let descriptor = self.descriptor(index);
            if let Some(buffer) = memory.slice(descriptor.addr, FETCHED) {
                for line in (0..FETCHED).step_by(LINE) {
                    prefetch(buffer.ptr_guard().as_ptr().wrapping_add(line));
                }
            }
        }
    }

    /// A descriptor of the table; `index` is less than the ring's size.
    fn descriptor(&self, index: u16) -> Descriptor {
        let place = self.places.descriptors.as_ptr().cast::<[u64; 2]>();
        // SAFETY: the table has `size` entries, and `index` is one.
        let words = unsafe {
            place
                .add(usize::from(index & (self.size - 1)))
                .read_volatile()
        };
        Descriptor::parse(words)
    }

    /// Takes `count` chains, of those that are available.
    pub(super) fn take(&mut self, count: u16) {
        self.next.0 = self.next.0.wrapping_add(count);
    }

    /// Hands a chain back with `len` bytes written; the driver learns of it by
    /// [`Ring::publish`].
    pub(super) fn hand_back(&mut self, head: u16, len: u32, log: Option<&Log>) {
        let offset = 4 + 8 * self.slot(self.used.0);
        let element = (u64::from(head) | u64::from(len) << 32).to_le();
        // SAFETY: the used ring has `size` elements, and is in memory. It is
        // aligned to 4 bytes only.
        unsafe {
            let place = self.places.used.as_ptr().add(offset).cast::<u32>();
            place.write_volatile(element as u32);
            place.add(1).write_volatile((element >> 32) as u32);
        }
        self.note(log, offset, 8);
        self.used.0 = self.used.0.wrapping_add(1);
    }

    /// Keeps the last `count` chains that were handed back, which have not been
    /// published.
    pub(super) fn keep(&mut self, count: u16) {
        self.used.0 = self.used.0.wrapping_sub(count);
    }

    fn note(&self, log: Option<&Log>, offset: usize, len: usize) {
        if let (Some(log), Some(at)) = (log, self.places.log) {
            log.note(at.wrapping_add(offset as u64), len);
        }
    }

    /// Lets the driver know of what was handed back, and tells it if it wants
    /// to be told.
    pub(super) fn publish(&mut self, log: Option<&Log>) {
        if self.published.0 != self.used.0 {
            self.used_word(2)
                .store(self.used.0.to_le(), Ordering::Release);
            self.note(log, 2, 2);
            self.published.0 = self.used.0;
        }
        if self.told.0 == self.published.0 {
            return;
        }
        let before = std::mem::replace(&mut self.told.0, self.published.0);
        // What it wants is read after what was published is seen.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = 4 + 2 * usize::from(self.size);
            let event = u16::from_le(self.available_word(at).load(Ordering::Relaxed));
            let since = self.published.0.wrapping_sub(event).wrapping_sub(1);
            since < self.published.0.wrapping_sub(before)
        } else {
            u16::from_le(self.available_word(0).load(Ordering::Relaxed)) & NO_EVENT == 0
        };
        if wanted && let Some(call) = &self.call {
            event::tell(call);
        }
    }

    /// Tells the driver in any case: its notifications may have been lost with
    /// a predecessor.
    pub(super) fn tell(&self) {
        if let Some(call) = &self.call {
            event::tell(call);
        }
    }

    /// Asks the driver for notifications of what becomes available, or for
    /// none.
    pub(super) fn want_kicks(&mut self, wanted: bool, log: Option<&Log>) {
        if self.event_idx {
            // Without: the place is left behind, and so is not reached.
            if wanted {
                let at = 4 + 8 * usize::from(self.size);
                self.used_word(at)
                    .store(self.next.0.to_le(), Ordering::Relaxed);
                self.note(log, at, 2);
            }
        } else {
            let flags = if wanted { 0 } else { NO_EVENT };
            self.used_word(0).store(flags.to_le(), Ordering::Relaxed);
            self.note(log, 0, 2);
        }
        // Before what is available is looked at again.
        fence(Ordering::SeqCst);
    }

    /// Takes the notifications.
    pub(super) fn drain(&self) {
        self.kick.drain();
    }
}
