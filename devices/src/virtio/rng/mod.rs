//! The entropy source (virtio 1.2, 5.4): the node's `getrandom` for the guest.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blanket_memory::IoVec;
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::queue::{Buffers, watch};
use super::{Activation, Device, QueueHandler, VirtQueue};
use crate::worker::Handler;

/// Device type (virtio 1.2, 5.4.1).
const KIND: u16 = 4;
/// Bytes that one request gets at most; the driver asks again for more.
const MAX_REQUEST: usize = 64 << 10;
/// Bytes that are given before other devices have their turn.
const BUDGET: usize = 256 << 10;
/// Requests that are served before other devices have their turn.
const MAX_REQUESTS: usize = 64;

/// System calls of the thread that serves the device.
pub const SYSCALLS: &[libc::c_long] = &[libc::SYS_getrandom];

/// An entropy source.
pub struct Rng {
    name: String,
    served: Arc<AtomicU64>,
}

impl Rng {
    /// An entropy source.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            served: Arc::default(),
        }
    }
}

impl Device for Rng {
    fn kind(&self) -> u16 {
        KIND
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let queue = activation.queues.into_iter().next();
        let queue = queue.ok_or_else(|| io::Error::other("the driver enabled no queue"))?;
        Ok(vec![Box::new(Source {
            queue: [queue],
            buffers: Buffers::default(),
            served: Arc::clone(&self.served),
        })])
    }

    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        drop(handlers);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes", self.served.load(Ordering::Relaxed))]
    }
}

struct Source {
    queue: [VirtQueue; 1],
    buffers: Buffers,
    served: Arc<AtomicU64>,
}

impl Source {
    /// Fills what the driver has made available; true if there may be more.
    fn serve(&mut self) -> bool {
        let queue = &mut self.queue[0];
        let (mut more, mut given) = (true, 0);
        for _ in 0..MAX_REQUESTS {
            if given >= BUDGET {
                break;
            }
            let Some(head) = queue.pop(&mut self.buffers) else {
                more = queue.enable_kicks();
                if more {
                    continue;
                }
                break;
            };
            let n = fill(&self.buffers.writable);
            given += n;
            // MAX_REQUEST fits.
            queue.push(head, n as u32);
        }
        queue.notify();
        self.served.fetch_add(given as u64, Ordering::Relaxed);
        more
    }
}

/// Fills the first [`MAX_REQUEST`] bytes of `pieces`; returns how many there
/// were.
fn fill(pieces: &[IoVec]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let mut left = *piece;
        left.truncate(MAX_REQUEST - done);
        while !left.is_empty() {
            // SAFETY: the piece lies in guest memory, which the queue keeps
            // mapped. The guest may write there too: any bytes are random.
            let n = unsafe { libc::getrandom(left.as_ptr().cast(), left.len(), 0) };
            let Ok(n) = usize::try_from(n) else {
                // A signal came first: what is there is enough.
                return done;
            };
            left.advance(n);
            done += n;
        }
    }
    done
}

impl MutEventSubscriber for Source {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = watch(ops, &self.queue[0].kick, 0) {
            tracing::error!(%error, "the entropy queue cannot be watched");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue[0].take_kick();
        if self.serve() {
            self.kick();
        }
    }
}

impl Handler for Source {
    fn kick(&mut self) {
        if let Err(error) = self.queue[0].kick.write(1) {
            tracing::error!(%error, "the entropy queue cannot be woken");
        }
    }
}

impl QueueHandler for Source {
    fn queues(&self) -> &[VirtQueue] {
        &self.queue
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, Interrupts, ram};
    use super::*;
    use crate::worker::Worker;
    use vm_memory::{Bytes, GuestAddress};

    fn source(driver: &Driver) -> Source {
        Source {
            queue: [driver.queue(true)],
            buffers: Buffers::default(),
            served: Arc::default(),
        }
    }

    #[test]
    fn buffers_are_filled_up_to_the_bound_and_nothing_else_is_touched() {
        let memory = ram(1 << 20);
        let mut driver = Driver::new(&memory, 0, 0, 16);
        driver.add(&[(0x1_0000, 100, true), (0x2_0000, 0x2_0000, true)]);
        driver.add(&[(0x8000, 64, false)]);
        assert!(!source(&driver).serve());
        assert_eq!(driver.used().unwrap(), (0, MAX_REQUEST as u32));
        assert_eq!(driver.used().unwrap().1, 0);
        let mut bytes = vec![0; 0x2_0000];
        memory
            .read_slice(&mut bytes, GuestAddress(0x2_0000))
            .unwrap();
        let (filled, rest) = bytes.split_at(MAX_REQUEST - 100);
        assert!(rest.iter().all(|&byte| byte == 0));
        // All 256 values occur in 64 KiB of random bytes.
        assert_eq!(
            filled
                .iter()
                .collect::<std::collections::HashSet<_>>()
                .len(),
            256
        );
        assert_eq!(driver.interrupts.queue_count(), 1);
    }

    #[test]
    fn what_the_device_has_written_is_noted() {
        use blanket_memory::dirty;
        let memory = ram(1 << 20);
        let mut driver = Driver::new(&memory, 0, 0, 16);
        driver.add(&[(0x1_0000, 100, true), (0x2_0ff0, 0x2000, true)]);
        driver.add(&[(0x8000, 64, false)]);
        dirty::start(&memory).unwrap();
        source(&driver).serve();
        let runs = dirty::take(&memory).runs(&memory, 4096);
        let noted = |at| runs.contains(&(GuestAddress(at), 4096));
        for page in [0x1_0000, 0x2_0000, 0x2_1000, 0x2_2000] {
            assert!(noted(page), "{page:#x} {runs:x?}");
        }
        // Nor is more noted than that and the ring.
        assert!(!noted(0x8000) && runs.len() <= 6, "{runs:x?}");
    }

    #[test]
    fn a_greedy_driver_gets_everything_in_several_turns() {
        let memory = ram(1 << 20);
        let mut driver = Driver::new(&memory, 0, 0, 16);
        for _ in 0..8 {
            driver.add(&[(0x1_0000, 0x1_0000, true)]);
        }
        let mut source = source(&driver);
        assert!(source.serve());
        assert!(source.serve());
        assert!(!source.serve());
        assert_eq!(source.served.load(Ordering::Relaxed), 8 << 16);
    }

    #[test]
    fn the_device_serves_its_driver_on_a_worker() {
        let memory = ram(1 << 20);
        let mut driver = Driver::new(&memory, 0, 0, 16);
        let mut device = Rng::new("rng0");
        let activation = |queues| Activation {
            ram: memory.clone(),
            features: 0,
            queues,
            interrupt: Arc::new(Interrupts::default()),
        };
        assert!(device.activate(activation(Vec::new())).is_err());
        let mut handlers = device
            .activate(activation(vec![driver.queue(true)]))
            .unwrap();
        driver.add(&[(0x1_0000, 32, true)]);
        let worker = Worker::spawn("rng", Box::new(|| Ok(()))).unwrap();
        worker.add(handlers.remove(0)).unwrap();
        assert_eq!(driver.wait_used().1, 32);
        driver.add(&[(0x1_0000, 16, true)]);
        driver.kick();
        assert_eq!(driver.wait_used().1, 16);
        drop(worker);
        assert_eq!(device.metrics(), [("bytes", 48)]);
    }
}
