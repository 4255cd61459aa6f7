//! One virtqueue on one store.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blanket_drivers::store::{Completion, Operation, Request, Store};
use blanket_memory::IoVec;
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::metrics::Metrics;
use super::request::{Accepted, Action, ID_BYTES, Status, parse, take_status};
use crate::virtio::queue::{Buffers, watch, write_bytes};
use crate::virtio::{QueueHandler, VirtQueue};
use crate::worker::Handler;

const KICK: u32 = 0;
const STORE: u32 = 1;

/// Batches served in a row. A driver that keeps the ring busy must not keep
/// the worker from its other handlers and from being paused.
const MAX_ROUNDS: usize = 16;

/// What all queues of a disk share.
pub(super) struct Shared {
    /// The serial, padded with zeros.
    pub(super) id: [u8; ID_BYTES],
    /// Whether writes may complete before they are durable.
    pub(super) writeback: AtomicBool,
    /// Counters.
    pub(super) metrics: Arc<Metrics>,
    /// For the log.
    pub(super) name: String,
}

/// A request that the store has.
struct Pending {
    head: u16,
    status: IoVec,
    operation: Operation,
    /// Bytes of data that the driver gets.
    moved: u32,
    /// The write is done and waits for its own flush.
    flushing: bool,
}

/// Owns a virtqueue and the store that serves it.
pub(super) struct BlockHandler {
    // Before the queue: the store waits for what is in flight when it goes,
    // and the queue keeps guest memory mapped.
    store: Box<dyn Store>,
    queue: VirtQueue,
    accepted: Accepted,
    /// The driver knows no flush: every write is durable when it completes.
    write_through: bool,
    shared: Arc<Shared>,
    /// By token. Not more than the store takes.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    buffers: Buffers,
    completions: Vec<Completion>,
}

impl BlockHandler {
    /// Serves `queue` from `store`.
    pub(super) fn new(
        queue: VirtQueue,
        store: Box<dyn Store>,
        accepted: Accepted,
        write_through: bool,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            store,
            queue,
            accepted,
            write_through,
            shared,
            pending: Vec::new(),
            free: Vec::new(),
            buffers: Buffers::default(),
            completions: Vec::new(),
        }
    }

    /// The queue's index and the store, for the next driver.
    pub(super) fn into_store(self) -> (u16, Box<dyn Store>) {
        (self.queue.index, self.store)
    }

    /// Serves the ring until it is empty or the store is full.
    fn serve(&mut self) {
        for _ in 0..MAX_ROUNDS {
            self.queue.disable_kicks();
            let full = self.fill();
            self.commit();
            self.reap();
            if full && self.store.in_flight() > 0 {
                // Its completions bring us back; kicks are of no use till then.
                self.queue.notify();
                return;
            }
            if !full && !self.queue.enable_kicks() {
                self.queue.notify();
                return;
            }
        }
        self.queue.notify();
        // Come back after the others. A full eventfd is a kick as well.
        let _ = self.queue.kick.write(1);
    }

    /// Hands requests to the store. True if the store takes no more for now.
    fn fill(&mut self) -> bool {
        let mut buffers = std::mem::take(&mut self.buffers);
        let mut full = false;
        for _ in 0..virtio_queue::QueueT::size(&self.queue.queue) {
            let Some(head) = self.queue.pop(&mut buffers) else {
                break;
            };
            if self.start(head, &mut buffers).is_err() {
                self.queue.unpop();
                full = true;
                break;
            }
        }
        self.buffers = buffers;
        full
    }

    /// Starts one request. Answers it right away if there is nothing to do.
    ///
    /// # Errors
    /// The store is full: the request has to come again.
    fn start(&mut self, head: u16, buffers: &mut Buffers) -> io::Result<()> {
        let Some(status) = take_status(&mut buffers.writable) else {
            // Nowhere to say what is wrong.
            self.shared.metrics.failed();
            self.queue.push(head, 0);
            return Ok(());
        };
        match parse(buffers, self.accepted) {
            Ok(Action::Store(request)) => return self.submit(head, status, request),
            Ok(Action::Id(vectors)) => {
                let n = write_bytes(&vectors, &self.shared.id);
                self.answer(head, status, Status::Ok, u32::try_from(n).unwrap_or(0));
            }
            Err(code) => {
                self.shared.metrics.failed();
                self.answer(head, status, code, 0);
            }
        }
        Ok(())
    }

    fn submit(&mut self, head: u16, status: IoVec, mut request: Request) -> io::Result<()> {
        let token = self.free.pop().unwrap_or(self.pending.len());
        if token == self.pending.len() {
            self.pending.push(None);
        }
        request.token = token as u64;
        let operation = request.operation;
        // SAFETY: the queue keeps guest memory mapped; `quiesce`, and the
        // store's own drop, wait for whatever is in flight.
        match unsafe { self.store.submit(request) } {
            Ok(()) => {
                self.pending[token] = Some(Pending {
                    head,
                    status,
                    operation,
                    moved: 0,
                    flushing: false,
                });
                Ok(())
            }
            Err(error) => {
                self.free.push(token);
                if error.kind() == io::ErrorKind::WouldBlock {
                    return Err(error);
                }
                self.report(operation, &error);
                self.answer(head, status, Status::IoError, 0);
                Ok(())
            }
        }
    }

    fn commit(&mut self) {
        if let Err(error) = self.store.commit() {
            // The store keeps them and tries again with the next commit.
            tracing::warn!(disk = self.shared.name, %error, "the disk's engine stumbles");
        }
    }

    /// Answers what the store has completed.
    fn reap(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.store.complete(&mut completions);
        self.finish_all(&mut completions);
        self.completions = completions;
    }

    fn finish_all(&mut self, completions: &mut Vec<Completion>) {
        let mut again = false;
        for completion in completions.drain(..) {
            again |= self.finish(completion);
        }
        if again {
            self.commit();
        }
    }

    /// Answers one request, or has its write flushed first. True if the store
    /// got something to do.
    fn finish(&mut self, completion: Completion) -> bool {
        let Ok(token) = usize::try_from(completion.token) else {
            return false;
        };
        let Some(mut pending) = self.pending.get_mut(token).and_then(Option::take) else {
            return false;
        };
        match completion.result {
            Ok(moved) if self.must_flush(&pending) => {
                pending.moved = moved;
                pending.flushing = true;
                // The write's place in the store is free again.
                if self.flush(completion.token).is_ok() {
                    self.pending[token] = Some(pending);
                    return true;
                }
                self.shared.metrics.failed();
                self.answer(pending.head, pending.status, Status::IoError, 0);
            }
            Ok(moved) => {
                let moved = if pending.flushing {
                    pending.moved
                } else {
                    moved
                };
                self.shared.metrics.done(pending.operation, moved);
                let given = match pending.operation {
                    Operation::Read => moved,
                    _ => 0,
                };
                self.answer(pending.head, pending.status, Status::Ok, given);
            }
            Err(error) => {
                self.report(pending.operation, &error);
                let status = match error.kind() {
                    io::ErrorKind::Unsupported => Status::Unsupported,
                    _ => Status::IoError,
                };
                self.answer(pending.head, pending.status, status, 0);
            }
        }
        self.free.push(token);
        false
    }

    /// Whether a completed request is not durable but has to be.
    fn must_flush(&self, pending: &Pending) -> bool {
        !matches!(pending.operation, Operation::Read | Operation::Flush)
            && !pending.flushing
            && (self.write_through || !self.shared.writeback.load(Ordering::Relaxed))
    }

    fn flush(&mut self, token: u64) -> io::Result<()> {
        let request = Request {
            operation: Operation::Flush,
            offset: 0,
            len: 0,
            vectors: Vec::new(),
            token,
        };
        // SAFETY: no memory.
        unsafe { self.store.submit(request) }
    }

    /// Gives a request back with `given` bytes of data and its status.
    fn answer(&mut self, head: u16, status: IoVec, code: Status, given: u32) {
        write_bytes(&[status], &[code as u8]);
        self.queue.push(head, given + 1);
    }

    /// Counts a failure and logs a disk's first: a guest can make many.
    fn report(&self, operation: Operation, error: &io::Error) {
        if self.shared.metrics.failed() {
            tracing::warn!(
                disk = self.shared.name,
                ?operation,
                %error,
                "a disk request failed; later failures are only counted"
            );
        }
    }
}

impl MutEventSubscriber for BlockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for (fd, token) in [
            (std::os::fd::AsRawFd::as_raw_fd(&self.queue.kick), KICK),
            (self.store.event(), STORE),
        ] {
            if let Err(error) = watch(ops, &fd, token) {
                tracing::error!(disk = self.shared.name, %error, "cannot watch a disk's events");
                self.queue.fail("no events");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            KICK => self.queue.take_kick(),
            _ => self.reap(),
        }
        self.serve();
    }
}

impl Handler for BlockHandler {
    fn kick(&mut self) {
        self.serve();
    }

    fn quiesce(&mut self) {
        let mut completions = Vec::new();
        while self.store.in_flight() > 0 {
            self.store.drain(&mut completions);
            self.finish_all(&mut completions);
        }
        self.queue.notify();
    }
}

impl QueueHandler for BlockHandler {
    fn queues(&self) -> &[VirtQueue] {
        std::slice::from_ref(&self.queue)
    }
}
