//! What every network interface does, whatever rings the guest has: frames
//! between a TAP and guest memory, the TAP's queues, and the counters.

mod metrics;
mod receive;
mod send;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blanket_drivers::tap::{Offloads, Tap};

pub(crate) use metrics::{Direction, Metrics};
pub(crate) use receive::{Frame, Outcome, Spill, TapWatch, copy_at, read_failed};
pub(crate) use send::{Sent, send};

/// The TAP of one interface with its counters.
pub(crate) struct Port {
    tap: Tap,
    pub(crate) metrics: Metrics,
    /// Queues in use: the TAP's queues from here on are detached.
    attached: Mutex<u16>,
}

impl Port {
    /// Takes the TAP with one queue in use.
    ///
    /// # Errors
    /// The TAP's spare queues cannot be detached.
    pub(crate) fn new(tap: Tap) -> io::Result<Self> {
        let port = Self {
            attached: Mutex::new(tap.queues().len() as u16),
            metrics: Metrics::default(),
            tap,
        };
        port.set_queues(1)?;
        Ok(port)
    }

    /// The TAP.
    pub(crate) fn tap(&self) -> &Tap {
        &self.tap
    }

    /// Queues in use.
    pub(crate) fn queues(&self) -> u16 {
        *self.attached()
    }

    fn attached(&self) -> MutexGuard<'_, u16> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the kernel send to the first `count` queues only.
    ///
    /// # Errors
    /// A queue cannot be attached or detached.
    pub(crate) fn set_queues(&self, count: u16) -> io::Result<()> {
        let mut attached = self.attached();
        let queues = self.tap.queues();
        while *attached < count {
            let queue = queues.get(usize::from(*attached));
            queue.map_or(Ok(()), |queue| queue.set_attached(true))?;
            *attached += 1;
        }
        while *attached > count.max(1) {
            let queue = queues.get(usize::from(*attached - 1));
            queue.map_or(Ok(()), |queue| queue.set_attached(false))?;
            *attached -= 1;
        }
        Ok(())
    }

    /// Brings the TAP to what a new driver expects: one queue, no offloads, and
    /// nothing that was segmented and summed up for the driver that is gone.
    pub(crate) fn clear(&self, device: &str) {
        if let Err(error) = self.set_queues(1) {
            tracing::warn!(device, %error, "a queue of the tap stays attached");
        }
        if let Err(error) = self.tap.set_offloads(Offloads::default()) {
            tracing::warn!(device, %error, "the tap keeps its offloads");
        }
        for queue in self.tap.queues() {
            queue.drain();
        }
    }
}
