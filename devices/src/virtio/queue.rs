//! A split virtqueue with its notifications, as one owner sees it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use blanket_memory::iovec::{read_bytes, write_bytes};
use blanket_memory::{GuestRam, IoVec, dirty, iovec};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;

/// Pieces that one request may have in all: what `readv` and `writev` take.
const MAX_PIECES: usize = 1024;

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR: u64 = 16;

/// A virtqueue in use.
///
/// A ring that breaks the rules (a bad index, a loop, a buffer outside memory)
/// makes the whole device ask for a reset, and the queue stays silent from
/// then on; see [`VirtQueue::fail`].
pub struct VirtQueue {
    /// Index of the queue in its device.
    pub index: u16,
    /// The ring's state.
    pub queue: Queue,
    /// The driver's notifications arrive here.
    pub kick: EventFd,
    ram: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    broken: bool,
}

/// The buffers of one request: process memory behind the guest's descriptors.
#[derive(Debug, Default)]
pub struct Buffers {
    /// What the device reads, in order.
    pub readable: Vec<IoVec>,
    /// What the device writes, in order, after all readable ones.
    pub writable: Vec<IoVec>,
}

impl Buffers {
    /// Forgets all pieces but keeps the room.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}

impl VirtQueue {
    /// Wraps a queue that the driver has set up.
    #[must_use]
    pub fn new(
        index: u16,
        queue: Queue,
        kick: EventFd,
        ram: GuestRam,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index,
            queue,
            kick,
            ram,
            interrupt,
            broken: false,
        }
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Clears the notification; call it first when `kick` is readable.
    pub fn take_kick(&self) {
        // An empty eventfd (EAGAIN) is no news.
        let _ = self.kick.read();
    }

    /// The next request's head index, its pieces of memory in `buffers`.
    /// `None` when the ring is empty or broken.
    ///
    /// Give the head back with [`VirtQueue::push`] in any case.
    pub fn pop(&mut self, buffers: &mut Buffers) -> Option<u16> {
        buffers.clear();
        if self.broken {
            return None;
        }
        let mut available = match self.queue.iter(&self.ram) {
            Ok(available) => available,
            Err(error) => {
                self.fail(&format!("available ring: {error}"));
                return None;
            }
        };
        let chain = available.next()?;
        let head = chain.head_index();
        match collect(&self.ram, chain, buffers) {
            Ok(()) => Some(head),
            Err(message) => {
                buffers.clear();
                self.fail(message);
                None
            }
        }
    }

    /// Puts the last popped request back: the next `pop` gives it again.
    pub fn unpop(&mut self) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Hands a request back with `len` bytes written. Tell the driver with
    /// [`VirtQueue::notify`] at the end of the batch.
    pub fn push(&mut self, head: u16, len: u32) {
        if self.broken {
            return;
        }
        self.written(head);
        if let Err(error) = self.queue.add_used(&self.ram, head, len) {
            self.fail(&format!("used ring: {error}"));
        }
    }

    /// Notes that a request's writable buffers were written, of which it tells
    /// the driver next. (A driver that has changed the descriptors meanwhile
    /// breaks its own memory, where it is carried elsewhere.)
    pub(super) fn written(&self, head: u16) {
        if !dirty::is_on(&self.ram) {
            return;
        }
        let (mut table, mut size) = (self.queue.desc_table(), u32::from(self.queue.size()));
        let (mut next, mut left) = (head, size);
        let mut indirect = false;
        while left > 0 && u32::from(next) < size {
            let at = GuestAddress(table.wrapping_add(DESCRIPTOR * u64::from(next)));
            let Ok(descriptor) = self.ram.read_obj::<Descriptor>(at) else {
                return;
            };
            left -= 1;
            if descriptor.refers_to_indirect_table() {
                if std::mem::replace(&mut indirect, true) {
                    // No table leads to another.
                    return;
                }
                (table, size) = (descriptor.addr().0, descriptor.len() / DESCRIPTOR as u32);
                (next, left) = (0, size);
                continue;
            }
            if descriptor.is_write_only() {
                dirty::mark(&self.ram, descriptor.addr(), descriptor.len() as usize);
            }
            if !descriptor.has_next() {
                return;
            }
            next = descriptor.next();
        }
    }

    /// Interrupts the driver if it wants to know about what was pushed.
    pub fn notify(&mut self) {
        if self.broken {
            return;
        }
        match self.queue.needs_notification(&self.ram) {
            Ok(true) => self.interrupt.queue(self.index),
            Ok(false) => {}
            Err(error) => self.fail(&format!("used event: {error}")),
        }
    }

    /// Asks the driver for notifications. True if requests came meanwhile: go
    /// on with `pop` then.
    pub fn enable_kicks(&mut self) -> bool {
        !self.broken
            && match self.queue.enable_notification(&self.ram) {
                Ok(more) => more,
                Err(error) => {
                    self.fail(&format!("available event: {error}"));
                    false
                }
            }
    }

    /// Tells the driver that notifications are not needed for now.
    pub fn disable_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&self.ram)
        {
            self.fail(&format!("used flags: {error}"));
        }
    }

    /// Whether the ring holds a request that nobody has popped.
    #[must_use]
    pub fn has_available(&self) -> bool {
        !self.broken
            && self
                .queue
                .avail_idx(&self.ram, Ordering::Acquire)
                .is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Marks the queue as broken and asks the driver for a reset.
    pub fn fail(&mut self, message: &str) {
        if !self.broken {
            tracing::warn!(queue = self.index, message, "the guest broke a virtqueue");
            self.broken = true;
            self.interrupt.needs_reset();
        }
    }

    /// Whether the queue has been marked as broken.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

/// Reads a chain's descriptors, each once.
fn collect(
    ram: &GuestRam,
    chain: DescriptorChain<&GuestRam>,
    buffers: &mut Buffers,
) -> Result<(), &'static str> {
    let mut total = 0usize;
    for descriptor in chain {
        let descriptor: Descriptor = descriptor;
        let len = descriptor.len() as usize;
        total = total
            .checked_add(len)
            .filter(|total| u32::try_from(*total).is_ok())
            .ok_or("a request longer than 4 GiB")?;
        let list = if descriptor.is_write_only() {
            &mut buffers.writable
        } else if buffers.writable.is_empty() {
            &mut buffers.readable
        } else {
            return Err("a readable buffer behind a writable one");
        };
        if len > 0 {
            iovec::push(ram, descriptor.addr(), len, list)
                .map_err(|_| "a buffer outside guest memory")?;
        }
        if buffers.readable.len() + buffers.writable.len() > MAX_PIECES {
            return Err("a request of more than 1024 pieces");
        }
    }
    Ok(())
}

/// Registers a kick (or any descriptor) for reading under `token`.
///
/// # Errors
/// epoll does not take it.
pub fn watch(
    ops: &mut event_manager::EventOps,
    fd: &impl std::os::fd::AsRawFd,
    token: u32,
) -> io::Result<()> {
    ops.add(event_manager::Events::with_data(
        fd,
        token,
        vmm_sys_util::epoll::EventSet::IN,
    ))
    .map_err(io::Error::other)
}
