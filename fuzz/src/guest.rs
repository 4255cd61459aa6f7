//! A guest: its memory, and what it does to a device's queues.

use arbitrary::Arbitrary;
use blanket_memory::GuestRam;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of guest memory, in two regions that touch.
pub const RAM: u64 = 0x8_0000;
/// From one queue's rings to the next one's.
pub const STRIDE: u64 = 0x4000;
/// Where buffers are put.
pub const BUFFERS: u64 = 0x2_0000;
/// Offsets of the available and the used ring behind the descriptors.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// Fresh guest memory.
///
/// # Panics
/// There is no memory.
#[must_use]
pub fn ram() -> GuestRam {
    let half = RAM as usize / 2;
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(RAM / 2), half)])
        .expect("guest memory")
}

/// Everything that a guest does in one run.
#[derive(Arbitrary, Debug)]
pub struct Session {
    /// Features that it accepts, of those offered.
    pub features: u64,
    /// How it sets up the queues; the last one counts for the rest.
    pub queues: Vec<Setup>,
    /// What it does then.
    pub steps: Vec<Step>,
}

/// How a queue is set up.
#[derive(Arbitrary, Clone, Copy, Debug, Default)]
pub struct Setup {
    /// log2 of its size.
    pub size: u8,
    /// The ring indices to begin with.
    pub next: u16,
    /// Not enabled at all.
    pub absent: bool,
    /// Where the rings lie, if not at their usual places.
    pub rings: Option<[u16; 3]>,
}

/// One thing that a guest, or the world outside, does.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Makes a chain of buffers available, as a driver should (but for what the
    /// buffers are).
    Request {
        /// Which queue.
        queue: u8,
        /// By an indirect table.
        indirect: bool,
        /// The chain.
        buffers: Vec<Buffer>,
    },
    /// Writes a descriptor.
    Descriptor {
        /// Which queue.
        queue: u8,
        /// Which descriptor.
        index: u8,
        /// Address, mostly within memory.
        address: u32,
        /// Length in bytes.
        len: u32,
        /// Flags.
        flags: u8,
        /// The next one.
        next: u8,
    },
    /// Sets the available ring's index to anything.
    Available {
        /// Which queue.
        queue: u8,
        /// The index.
        value: u16,
    },
    /// Writes anywhere in memory.
    Memory {
        /// Where, in units of 4 bytes.
        at: u16,
        /// What.
        bytes: Vec<u8>,
    },
    /// Notifies the device and lets it work.
    Kick(u8),
    /// Lets the device work.
    Turn,
    /// Writes the device's configuration space.
    Config {
        /// Where.
        offset: u8,
        /// What.
        bytes: [u8; 2],
    },
    /// Something comes from outside.
    Peer(Vec<u8>),
    /// The VM moves: pause, save, restore, resume.
    Move,
    /// The driver resets the device and sets it up again.
    Reset,
}

/// A buffer of a request.
#[derive(Arbitrary, Clone, Debug)]
pub struct Buffer {
    /// The device writes to it.
    pub writable: bool,
    /// Where it lies, in units of 8 bytes.
    pub at: u16,
    /// Its length in bytes, if it is more than `bytes` has.
    pub len: u16,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// The driver's side of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    /// Entries.
    pub size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    table: u16,
}

impl Rings {
    /// Queue `index` of at most `most` entries.
    #[must_use]
    pub fn new(index: usize, most: u16, setup: Setup) -> Self {
        let base = index as u64 * STRIDE;
        let [descriptors, available, used] = setup.rings.map_or(
            [base, base + AVAILABLE, base + USED],
            |[descriptors, available, used]| {
                // Anywhere in memory, as aligned as they must be (2.7).
                let [a, b, c] = [descriptors, available, used].map(u64::from);
                [a << 4, b << 1, c << 2].map(|at| at % RAM)
            },
        );
        Self {
            size: (1 << (setup.size % 16)).min(most),
            descriptors,
            available,
            used,
            next: setup.next,
            table: 0,
        }
    }

    /// The queue as the device is given it, or nothing if a transport would
    /// refuse it.
    ///
    /// # Panics
    /// A queue is made wrong here.
    #[must_use]
    pub fn queue(&self, ram: &GuestRam, most: u16, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(most).expect("a power of two");
        queue.set_size(self.size);
        let [descriptors, available, used] = self
            .addresses()
            .map(|address| (Some(address as u32), Some((address >> 32) as u32)));
        queue.set_desc_table_address(descriptors.0, descriptors.1);
        queue.set_avail_ring_address(available.0, available.1);
        queue.set_used_ring_address(used.0, used.1);
        queue.set_next_avail(self.next);
        queue.set_next_used(self.next);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(ram).then_some(queue)
    }

    /// Addresses of descriptors, available ring and used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Writes to guest memory, as far as there is some.
    pub fn write(ram: &GuestRam, at: u64, bytes: &[u8]) {
        // What lies outside is no memory: nothing to write to.
        let _ = ram.write_slice(bytes, GuestAddress(at));
    }

    /// Sets both indices in memory to what the queue begins with.
    pub fn begin(&self, ram: &GuestRam) {
        Self::write(ram, self.available + 2, &self.next.to_le_bytes());
        Self::write(ram, self.used + 2, &self.next.to_le_bytes());
    }

    /// Writes a descriptor to a table.
    pub fn descriptor(ram: &GuestRam, at: u64, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        Self::write(ram, at, &address.to_le_bytes());
        Self::write(ram, at + 8, &len.to_le_bytes());
        Self::write(ram, at + 12, &flags.to_le_bytes());
        Self::write(ram, at + 14, &next.to_le_bytes());
    }

    /// Where descriptor `index` lies.
    #[must_use]
    pub fn descriptor_at(&self, index: u16) -> u64 {
        self.descriptors + 16 * u64::from(index % self.size)
    }

    /// Makes a chain available: (address, length, device writes) each.
    pub fn offer(&mut self, ram: &GuestRam, buffers: &[(u64, u32, bool)], indirect: bool) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        const INDIRECT: u16 = 4;
        /// Room for an indirect table behind the rings.
        const TABLE: u64 = 0x3000;
        let head = self.table % self.size;
        let table = self.descriptors + TABLE;
        for (i, (address, len, writable)) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            let flags = (u16::from(!last) * NEXT) | (u16::from(*writable) * WRITE);
            let (at, next) = if indirect {
                (table + 16 * i as u64, i as u16 + 1)
            } else {
                let index = head.wrapping_add(i as u16);
                (self.descriptor_at(index), (index + 1) % self.size)
            };
            Self::descriptor(ram, at, (*address, *len, flags, next));
        }
        if indirect {
            let len = 16 * buffers.len() as u32;
            let at = self.descriptor_at(head);
            Self::descriptor(ram, at, (table, len, INDIRECT, 0));
        }
        let step = if indirect { 1 } else { buffers.len() as u16 };
        self.table = head.wrapping_add(step);
        let slot = u64::from(self.next % self.size);
        Self::write(ram, self.available + 4 + 2 * slot, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.announce(ram, self.next);
    }

    /// Sets the available ring's index.
    pub fn announce(&mut self, ram: &GuestRam, index: u16) {
        self.next = index;
        Self::write(ram, self.available + 2, &index.to_le_bytes());
    }

    /// The available ring's index as it was last set.
    #[must_use]
    pub fn next(&self) -> u16 {
        self.next
    }

    /// The used ring's index.
    ///
    /// # Panics
    /// The ring is not in memory.
    #[must_use]
    pub fn used_index(&self, ram: &GuestRam) -> u16 {
        ram.read_obj(GuestAddress(self.used + 2))
            .expect("a used ring")
    }

    /// Bytes written for the request that was used last.
    ///
    /// # Panics
    /// The ring is not in memory.
    #[must_use]
    pub fn last_used_len(&self, ram: &GuestRam) -> u32 {
        let slot = self.used_index(ram).wrapping_sub(1) % self.size;
        ram.read_obj(GuestAddress(self.used + 4 + 8 * u64::from(slot) + 4))
            .expect("a used ring")
    }
}
