//! One ring on one store.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_drivers::grant::{Page, Pages};
use blanket_drivers::store::{Operation, Request, Store};
use blanket_memory::{IoVec, iovec};
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::pace::Pace;
use super::request::{
    self, Action, INDIRECT_SEGMENTS, REQUEST, RESPONSE, SEGMENT, Segment, Status, Table, Transfer,
};
use crate::disk::{self, Engine, Identity, Outcome, Refused};
use crate::virtio::queue::watch;
use crate::worker::{self, Handler};
use crate::xen::channel::Channel;
use crate::xen::grant::{Access, GrantTable};
use crate::xen::ring::{self, Indices, Ring};

const KICK: u32 = 0;
const STORE: u32 = 1;

/// Batches served in a row. A frontend that keeps the ring busy must not keep
/// the worker from its other handlers and from being paused.
const MAX_ROUNDS: usize = 8;

/// How long finished answers wait for the next request, if one is expected:
/// longer than a guest needs from one to the next.
const PATIENCE: Duration = Duration::from_micros(200);

/// A disk's ring.
pub(super) type DiskRing = Ring<REQUEST, RESPONSE>;

/// Requests that the store has before it starts on them, and answers before the
/// guest sees them: few enough that guest, worker and device work at the same time,
/// and enough that starting and telling do not cost more than the requests.
const AT_ONCE: usize = 8;

/// Pages of data that the store starts on, or that the guest gets back, at once.
const PAGES_AT_ONCE: usize = 32;

/// What has gathered of either.
#[derive(Default)]
struct Gathered {
    requests: usize,
    pages: usize,
}

impl Gathered {
    /// One more, with so many pages. True if it is time to go on with them: they
    /// are `most` requests, or many pages.
    fn add(&mut self, pages: usize, most: usize) -> bool {
        self.requests += 1;
        self.pages += pages;
        let enough = self.requests >= most || self.pages >= PAGES_AT_ONCE;
        if enough {
            *self = Self::default();
        }
        enough
    }
}

/// What is needed to answer a request, and its pages.
struct Answer {
    id: u64,
    operation: u8,
    pages: Vec<Page<GrantTable>>,
}

/// Owns a ring and the store that serves it.
pub(super) struct RingHandler {
    // Before the pages and the ring: the engine waits for what is in flight
    // when it goes, and they keep guest memory mapped.
    engine: Engine<Answer>,
    ring: DiskRing,
    pages: Pages<GrantTable>,
    channel: Channel,
    pace: Pace,
    identity: Arc<Identity>,
    /// Tells the bus that the ring is broken.
    fault: Arc<dyn Fn() + Send + Sync>,
    broken: bool,
    done: Vec<(Answer, Outcome)>,
}

impl RingHandler {
    /// Serves `ring` from `store`; `fault` is called once if the frontend
    /// breaks the ring.
    pub(super) fn new(
        ring: DiskRing,
        store: Box<dyn Store>,
        pages: Pages<GrantTable>,
        channel: Channel,
        identity: Arc<Identity>,
        fault: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        Self {
            engine: Engine::new(store, Arc::clone(&identity)),
            pace: Pace::new(ring.entries()),
            ring,
            pages,
            channel,
            identity,
            fault,
            broken: false,
            done: Vec::new(),
        }
    }

    /// The store, for the next frontend.
    pub(super) fn into_store(self) -> Box<dyn Store> {
        self.engine.into_store()
    }

    /// Its indices, with nothing in flight.
    pub(super) fn indices(&self) -> Indices {
        self.ring.indices()
    }

    /// Serves the ring until it is empty or the store is full.
    fn serve(&mut self) {
        for _ in 0..MAX_ROUNDS {
            match self.round() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.fail(&error.to_string()),
            }
        }
        // Come back after the others.
        self.channel.wake();
    }

    /// Takes what there is and answers what is done. True if there may be more
    /// to do right now.
    fn round(&mut self) -> Result<bool, ring::Error> {
        if self.broken {
            return Ok(false);
        }
        let full = self.fill()?;
        self.engine.commit();
        self.reap(usize::MAX);
        if !full && self.expects_more()? {
            return Ok(true);
        }
        self.publish();
        if full {
            // Completions bring us back; notifications are of no use till then.
            return Ok(self.engine.in_flight() == 0);
        }
        self.ring.wait_for(1)
    }

    /// Whether another request has come, and the answers can wait for its own.
    fn expects_more(&mut self) -> Result<bool, ring::Error> {
        // What is in flight takes its time. The guest may as well work.
        if self.engine.in_flight() > 0 || !self.pace.holds(self.ring.unpublished()) {
            return Ok(false);
        }
        let start = Instant::now();
        while self.ring.available()? == 0 {
            if start.elapsed() > PATIENCE {
                self.pace.waited_in_vain();
                return Ok(false);
            }
            std::hint::spin_loop();
        }
        Ok(true)
    }

    /// Hands requests to the store. True if the store takes no more for now.
    fn fill(&mut self) -> Result<bool, ring::Error> {
        let mut gathered = Gathered::default();
        for _ in 0..self.ring.entries() {
            let Some(request) = self.ring.pop()? else {
                break;
            };
            let Some(pages) = self.start(&request) else {
                self.ring.rewind(1);
                return Ok(true);
            };
            if gathered.add(pages, AT_ONCE) {
                self.engine.commit();
            }
        }
        Ok(false)
    }

    /// Starts one request. Answers it right away if there is nothing to do.
    /// How many pages it uses; none if the store is full: the request has to
    /// come again.
    fn start(&mut self, request: &[u8; REQUEST]) -> Option<usize> {
        let (id, operation) = (request::id(request), request::operation(request));
        match self.prepare(request) {
            Ok((request, pages)) => {
                self.pace.moves(IoVec::total(&request.vectors));
                let count = pages.len();
                let answer = Answer {
                    id,
                    operation,
                    pages,
                };
                // SAFETY: the pages keep guest memory mapped, and the engine
                // gives them back when the request is done, or waits.
                match unsafe { self.engine.submit(request, answer) } {
                    Ok(()) => return Some(count),
                    Err(Refused::Full(_)) => return None,
                    Err(Refused::Broken(_)) => self.answer(id, operation, Status::Error),
                }
            }
            Err(status) => {
                self.identity.metrics.failed();
                self.answer(id, operation, status);
            }
        }
        Some(0)
    }

    /// The store's request, and the pages that it uses.
    fn prepare(
        &mut self,
        request: &[u8; REQUEST],
    ) -> Result<(Request, Vec<Page<GrantTable>>), Status> {
        match request::parse(request)? {
            Action::Direct(transfer, table) => self.collect(transfer, table),
            Action::Indirect(transfer, table) => {
                let mut bytes = [0; INDIRECT_SEGMENTS * SEGMENT];
                let table = self.read_table(table, &mut bytes)?;
                self.collect(transfer, table)
            }
            Action::Flush => Ok((disk::request(Operation::Flush, 0, 0), Vec::new())),
            Action::Discard(offset, len) => {
                Ok((disk::request(Operation::Discard, offset, len), Vec::new()))
            }
        }
    }

    /// A copy of an indirect request's table.
    fn read_table<'a>(&mut self, table: Table, bytes: &'a mut [u8]) -> Result<&'a [u8], Status> {
        let page = self.pages.map(table.reference, Access::Read);
        let page = page.map_err(|_| Status::Error)?;
        let piece = page.iovec(0, table.len).map_err(|_| Status::Error)?;
        let read = iovec::read_bytes(&[piece], bytes);
        Ok(&bytes[..read])
    }

    /// Maps a transfer's segments.
    fn collect(
        &mut self,
        transfer: Transfer,
        table: &[u8],
    ) -> Result<(Request, Vec<Page<GrantTable>>), Status> {
        let Transfer { operation, offset } = transfer;
        let access = match operation {
            Operation::Read => Access::Write,
            _ => Access::Read,
        };
        let count = table.len() / SEGMENT;
        let mut request = disk::request(operation, offset, 0);
        request.vectors.reserve_exact(count);
        let mut pages = Vec::with_capacity(count);
        for segment in request::segments(table) {
            let Segment {
                reference,
                offset,
                len,
            } = segment?;
            let page = self.pages.map(reference, access);
            let page = page.map_err(|_| Status::Error)?;
            let vector = page.iovec(offset, len).map_err(|_| Status::Error)?;
            request.vectors.push(vector);
            pages.push(page);
        }
        Ok((request, pages))
    }

    /// Answers what the store has completed; see [`Self::answer_all`].
    fn reap(&mut self, at_once: usize) {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(false, &mut done);
        self.answer_all(&mut done, at_once);
        self.done = done;
    }

    /// Puts answers into the ring. Where there are more than `at_once`, or of
    /// many pages, the guest goes on with the first of them meanwhile.
    fn answer_all(&mut self, done: &mut Vec<(Answer, Outcome)>, at_once: usize) {
        let mut gathered = Gathered::default();
        let mut enough = false;
        for (answer, outcome) in done.drain(..) {
            if enough {
                self.show();
            }
            enough = gathered.add(answer.pages.len(), at_once);
            let status = match outcome {
                Outcome::Done(_) => Status::Okay,
                Outcome::Failed => Status::Error,
                Outcome::Unsupported => Status::Unsupported,
            };
            let Answer {
                id,
                operation,
                pages,
            } = answer;
            pages.iter().for_each(|page| page.written());
            // The guest may take its pages back as soon as it sees the answer.
            drop(pages);
            self.answer(id, operation, status);
        }
    }

    fn answer(&mut self, id: u64, operation: u8, status: Status) {
        self.ring.push(&request::response(id, operation, status));
    }

    /// Shows the guest the answers, and tells it if it waits for them.
    fn publish(&mut self) {
        self.pace.publishes(self.ring.unpublished());
        self.show();
    }

    fn show(&mut self) {
        if self.ring.publish() {
            self.channel.notify();
        }
    }

    /// The frontend broke the ring: nothing in it is taken any more.
    fn fail(&mut self, message: &str) {
        if !self.broken {
            self.broken = true;
            tracing::warn!(
                disk = self.identity.name,
                message,
                "the guest broke a ring of its disk"
            );
            (self.fault)();
        }
    }
}

impl MutEventSubscriber for RingHandler {
    fn init(&mut self, ops: &mut EventOps) {
        let events = [
            (self.channel.kick().as_raw_fd(), KICK),
            (self.engine.event(), STORE),
        ];
        for (fd, token) in events {
            if let Err(error) = watch(ops, &fd, token) {
                self.fail(&format!("no events: {error}"));
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            KICK => self.channel.take(),
            _ => {
                self.reap(AT_ONCE);
                self.publish();
            }
        }
        self.serve();
        // The store completes what it has, and whoever has been answered asks again.
        worker::expect();
    }
}

impl Handler for RingHandler {
    fn kick(&mut self) {
        self.engine.retry();
        self.serve();
    }

    fn quiesce(&mut self) {
        let mut done = Vec::new();
        self.engine.drain(false, &mut done);
        self.answer_all(&mut done, usize::MAX);
        self.publish();
        // Marks of kept pages would outlive a saved guest's mappings.
        self.pages.release();
    }
}
