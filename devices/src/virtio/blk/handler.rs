//! One virtqueue on one store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blanket_drivers::store::{Request, Store};
use blanket_memory::IoVec;
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::request::{Accepted, Action, ID_BYTES, Status, parse, take_status};
use crate::disk::{Engine, Identity, Outcome, Refused};
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
    /// Name and counters.
    pub(super) identity: Arc<Identity>,
}

/// What is needed to answer a request.
struct Answer {
    head: u16,
    status: IoVec,
}

/// Owns a virtqueue and the store that serves it.
pub(super) struct BlockHandler {
    // Before the queue: the engine waits for what is in flight when it goes,
    // and the queue keeps guest memory mapped.
    engine: Engine<Answer>,
    queue: VirtQueue,
    accepted: Accepted,
    /// The driver knows no flush: every write is durable when it completes.
    write_through: bool,
    shared: Arc<Shared>,
    buffers: Buffers,
    done: Vec<(Answer, Outcome)>,
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
            engine: Engine::new(store, Arc::clone(&shared.identity)),
            queue,
            accepted,
            write_through,
            shared,
            buffers: Buffers::default(),
            done: Vec::new(),
        }
    }

    /// The queue's index and the store, for the next driver.
    pub(super) fn into_store(self) -> (u16, Box<dyn Store>) {
        (self.queue.index, self.engine.into_store())
    }

    /// Serves the ring until it is empty or the store is full.
    fn serve(&mut self) {
        for _ in 0..MAX_ROUNDS {
            self.queue.disable_kicks();
            let full = self.fill();
            self.engine.commit();
            self.reap();
            if full && self.engine.in_flight() > 0 {
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
            if !self.start(head, &mut buffers) {
                self.queue.unpop();
                full = true;
                break;
            }
        }
        self.buffers = buffers;
        full
    }

    /// Starts one request. Answers it right away if there is nothing to do.
    /// False if the store is full: the request has to come again.
    fn start(&mut self, head: u16, buffers: &mut Buffers) -> bool {
        let metrics = &self.shared.identity.metrics;
        let Some(status) = take_status(&mut buffers.writable) else {
            // Nowhere to say what is wrong.
            metrics.failed();
            self.queue.push(head, 0);
            return true;
        };
        let answer = Answer { head, status };
        match parse(buffers, self.accepted) {
            Ok(Action::Store(request)) => return self.submit(answer, request),
            Ok(Action::Id(vectors)) => {
                let n = write_bytes(&vectors, &self.shared.id);
                self.answer(&answer, Status::Ok, u32::try_from(n).unwrap_or(0));
            }
            Err(code) => {
                metrics.failed();
                self.answer(&answer, code, 0);
            }
        }
        true
    }

    fn submit(&mut self, answer: Answer, request: Request) -> bool {
        // SAFETY: the queue keeps guest memory mapped, and the engine goes
        // before it does.
        match unsafe { self.engine.submit(request, answer) } {
            Ok(()) => true,
            Err(Refused::Full(_)) => false,
            Err(Refused::Broken(answer)) => {
                self.answer(&answer, Status::IoError, 0);
                true
            }
        }
    }

    /// Answers what the store has completed.
    fn reap(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(self.is_durable(), &mut done);
        self.answer_all(&mut done);
        self.done = done;
    }

    fn answer_all(&mut self, done: &mut Vec<(Answer, Outcome)>) {
        for (answer, outcome) in done.drain(..) {
            match outcome {
                Outcome::Done(given) => self.answer(&answer, Status::Ok, given),
                Outcome::Failed => self.answer(&answer, Status::IoError, 0),
                Outcome::Unsupported => self.answer(&answer, Status::Unsupported, 0),
            }
        }
    }

    /// Whether a write has to be durable when it completes.
    fn is_durable(&self) -> bool {
        self.write_through || !self.shared.writeback.load(Ordering::Relaxed)
    }

    /// Gives a request back with `given` bytes of data and its status.
    fn answer(&mut self, answer: &Answer, code: Status, given: u32) {
        write_bytes(&[answer.status], &[code as u8]);
        self.queue.push(answer.head, given + 1);
    }
}

impl MutEventSubscriber for BlockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for (fd, token) in [
            (std::os::fd::AsRawFd::as_raw_fd(&self.queue.kick), KICK),
            (self.engine.event(), STORE),
        ] {
            if let Err(error) = watch(ops, &fd, token) {
                tracing::error!(disk = self.shared.identity.name, %error, "cannot watch a disk's events");
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
        self.engine.retry();
        self.serve();
    }

    fn quiesce(&mut self) {
        let mut done = Vec::new();
        self.engine.drain(self.is_durable(), &mut done);
        self.answer_all(&mut done);
        self.queue.notify();
    }
}

impl QueueHandler for BlockHandler {
    fn queues(&self) -> &[VirtQueue] {
        std::slice::from_ref(&self.queue)
    }
}
