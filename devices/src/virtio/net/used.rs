//! Used buffers that the driver must see all at once.
//!
//! A frame in several merged buffers counts for the driver only when all of
//! them are used (virtio 1.2, 5.1.6.4.1): a driver that polls would otherwise
//! find a frame with buffers missing. So the ring's index moves once a frame.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::super::{Interrupt, VirtQueue};

pub(super) struct UsedFrames {
    interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last considered for an interrupt.
    considered: Wrapping<u16>,
}

impl UsedFrames {
    pub(super) fn new(queue: &VirtQueue, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            interrupt,
            considered: Wrapping(queue.queue.next_used()),
        }
    }

    /// Hands back the buffers of one frame, as (head, bytes written).
    pub(super) fn push(&self, queue: &mut VirtQueue, buffers: &[(u16, u32)]) {
        let Some((last, others)) = buffers.split_last() else {
            return;
        };
        let next = queue.queue.next_used();
        for (i, (head, len)) in others.iter().enumerate() {
            queue.written(*head);
            let slot = next.wrapping_add(i as u16) % queue.queue.size();
            let address = queue.queue.used_ring() + 4 + 8 * u64::from(slot);
            // `struct virtq_used_elem`: index, then length (2.7.8).
            let element = (u64::from(*head) | u64::from(*len) << 32).to_le();
            if let Err(error) = queue.ram().write_obj(element, GuestAddress(address)) {
                queue.fail(&format!("used ring: {error}"));
                return;
            }
        }
        queue
            .queue
            .set_next_used(next.wrapping_add(others.len() as u16));
        // This one stores the index, and with it publishes them all.
        queue.push(last.0, last.1);
    }

    /// Interrupts the driver if it wants to know about what was pushed.
    pub(super) fn notify(&mut self, queue: &mut VirtQueue) {
        let used = Wrapping(queue.queue.next_used());
        if used == self.considered || queue.is_broken() {
            return;
        }
        match wants_interrupt(queue, self.considered, used) {
            Ok(wanted) => {
                self.considered = used;
                if wanted {
                    self.interrupt.queue(queue.index);
                }
            }
            Err(error) => queue.fail(&format!("used event: {error}")),
        }
    }
}

/// Whether the driver wants an interrupt for the used buffers from `old` to
/// `new` (virtio 1.2, 2.7.7.2).
fn wants_interrupt(
    queue: &VirtQueue,
    old: Wrapping<u16>,
    new: Wrapping<u16>,
) -> Result<bool, GuestMemoryError> {
    // The driver writes its wish, then looks at the index: as in a lock, both
    // sides must have stored before they load.
    fence(Ordering::SeqCst);
    let available = queue.queue.avail_ring();
    if queue.queue.event_idx_enabled() {
        let address = available + 4 + 2 * u64::from(queue.queue.size());
        let event: u16 = queue.ram().load(GuestAddress(address), Ordering::Relaxed)?;
        Ok(new - Wrapping(u16::from_le(event)) - Wrapping(1) < new - old)
    } else {
        let flags: u16 = queue
            .ram()
            .load(GuestAddress(available), Ordering::Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
