//! The driver's side of a virtqueue, for tests of device models.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Interrupt, VirtQueue};

/// Guest memory of `size` bytes from address 0.
pub(crate) fn ram(size: usize) -> GuestRam {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// Counts a device's interrupts.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    queue: AtomicUsize,
    config: AtomicUsize,
    reset: AtomicUsize,
}

impl Interrupts {
    /// For used buffers, of all queues.
    pub(crate) fn queue_count(&self) -> usize {
        self.queue.load(Ordering::SeqCst)
    }

    /// For changes of the configuration space.
    pub(crate) fn config_count(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }

    /// Requests for a reset: how often the device called itself broken.
    pub(crate) fn reset_count(&self) -> usize {
        self.reset.load(Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, _: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }
    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
}

/// A buffer of a request: address, length, whether the device writes to it.
pub(crate) type Buffer = (u64, u32, bool);

/// A driver with one virtqueue in guest memory.
///
/// The rings lie at `base`, the buffers wherever the test puts them. The
/// driver wants every interrupt, and descriptors are reused in a circle: keep
/// fewer of them in flight than the queue has.
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) interrupts: Arc<Interrupts>,
    index: u16,
    base: u64,
    size: u16,
    kick: EventFd,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Driver {
    /// Queue `index` with `size` entries and its rings in 32 bytes per entry
    /// (and a few) from `base`, a multiple of 16.
    pub(crate) fn new(ram: &GuestRam, index: u16, base: u64, size: u16) -> Self {
        Self {
            ram: ram.clone(),
            interrupts: Arc::default(),
            index,
            base,
            size,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            next_descriptor: 0,
            available: 0,
            used: 0,
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's side of the queue.
    pub(crate) fn queue(&self, event_idx: bool) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.available_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        VirtQueue::new(
            self.index,
            queue,
            self.kick.try_clone().unwrap(),
            self.ram.clone(),
            Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
        )
    }

    /// Writes descriptor `index` as it is, without making it available.
    pub(crate) fn describe(&self, index: u16, descriptor: Descriptor) {
        let addr = GuestAddress(self.base + 16 * u64::from(index));
        self.ram
            .write_obj(RawDescriptor::from(descriptor), addr)
            .unwrap();
    }

    /// Makes the chain that begins at `head` available, without a kick.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.ram
            .store(
                self.available,
                GuestAddress(self.available_ring() + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, &(addr, len, write)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let (flags, next) = flags(write, i + 1 < buffers.len(), self.next_descriptor);
            self.describe(index, Descriptor::new(addr, len, flags, next));
        }
        self.offer(head);
        head
    }

    /// As [`Driver::add`], in an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (i, &(addr, len, write)) in buffers.iter().enumerate() {
            let next = u16::try_from(i + 1).unwrap();
            let (flags, next) = flags(write, i + 1 < buffers.len(), next);
            let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            let addr = GuestAddress(table + 16 * i as u64);
            self.ram.write_obj(descriptor, addr).unwrap();
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let len = u32::try_from(16 * buffers.len()).unwrap();
        self.describe(
            head,
            Descriptor::new(table, len, u16::try_from(VRING_DESC_F_INDIRECT).unwrap(), 0),
        );
        self.offer(head);
        head
    }

    /// Notifies the device.
    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Whether the device wants a notification for what was offered last
    /// (`VIRTIO_F_EVENT_IDX` only).
    pub(crate) fn kick_wanted(&self) -> bool {
        let addr = self.used_ring() + 4 + 8 * u64::from(self.size);
        let event: u16 = self.ram.read_obj(GuestAddress(addr)).unwrap();
        event == self.available.wrapping_sub(1)
    }

    /// The next used buffer: head and bytes written.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .ram
            .load(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        let id: u32 = self.ram.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.ram.read_obj(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        // Under EVENT_IDX the driver asks for an interrupt for the next one.
        let event = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.ram.write_obj(self.used, GuestAddress(event)).unwrap();
        Some((u16::try_from(id).unwrap(), len))
    }

    /// Waits for the next used buffer.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let mut used = None;
        until("a used buffer", || {
            used = self.used();
            used.is_some()
        });
        used.unwrap()
    }
}

fn flags(write: bool, more: bool, next: u16) -> (u16, u16) {
    let mut flags = 0;
    if write {
        flags |= VRING_DESC_F_WRITE;
    }
    if more {
        flags |= VRING_DESC_F_NEXT;
    }
    (u16::try_from(flags).unwrap(), if more { next } else { 0 })
}

/// Waits until `done` holds.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within 30 s");
        std::thread::sleep(Duration::from_micros(100));
    }
}
