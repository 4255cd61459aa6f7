//! From the guest to the other end.

use std::sync::Arc;

use super::super::VirtQueue;
use super::super::queue::Buffers;
use crate::net::{Direction, FrameQueue, send};

/// Frames that are sent before others have their turn.
const BUDGET: usize = 128;

pub(super) struct Tx {
    frames: Arc<dyn FrameQueue>,
    buffers: Buffers,
}

impl Tx {
    pub(super) fn new(frames: &Arc<dyn FrameQueue>) -> Self {
        Self {
            frames: Arc::clone(frames),
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
        // SAFETY: the pieces lie in guest memory, which the queue keeps mapped.
        unsafe { send(&*self.frames, &self.buffers.readable, metrics) };
    }
}
