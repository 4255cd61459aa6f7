//! From the guest to the TAP.

use std::io;
use std::sync::Arc;

use blanket_drivers::tap::{HEADER_LEN, TapQueue};
use blanket_memory::IoVec;

use super::super::VirtQueue;
use super::super::queue::Buffers;
use super::metrics::Direction;

/// Frames that are sent before others have their turn.
const BUDGET: usize = 128;

/// The longest frame: a 64 KiB datagram with its Ethernet and VLAN headers.
const LONGEST: usize = HEADER_LEN + 14 + 4 + 65536;

pub(super) struct Tx {
    tap: Arc<TapQueue>,
    buffers: Buffers,
}

impl Tx {
    pub(super) fn new(tap: &Arc<TapQueue>) -> Self {
        Self {
            tap: Arc::clone(tap),
            buffers: Buffers::default(),
        }
    }

    /// Sends what the driver has made available; true if there may be more.
    pub(super) fn send(&mut self, queue: &mut VirtQueue, metrics: &Direction) -> bool {
        queue.disable_kicks();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(head) = queue.pop(&mut self.buffers) else {
                if queue.enable_kicks() {
                    queue.disable_kicks();
                    continue;
                }
                more = false;
                break;
            };
            self.send_one(metrics);
            queue.push(head, 0);
        }
        queue.notify();
        more
    }

    fn send_one(&self, metrics: &Direction) {
        let frame = &self.buffers.readable;
        let len = IoVec::total(frame);
        if !(HEADER_LEN..=LONGEST).contains(&len) {
            metrics.refuse_one();
            return;
        }
        // SAFETY: the pieces lie in guest memory, which the queue keeps mapped.
        match unsafe { self.tap.writev(frame) } {
            Ok(_) => metrics.passed(len - HEADER_LEN),
            Err(error) if has_no_room(&error) => metrics.drop_one(),
            Err(_) => metrics.refuse_one(),
        }
    }
}

fn has_no_room(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM)
    )
}
