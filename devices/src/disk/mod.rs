//! What every disk does, whatever rings the guest has: requests on their way
//! through a store, and the counters.

mod metrics;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use blanket_drivers::store::{Completion, Image, Operation, Request, SECTOR, Store};
use blanket_memory::IoVec;
use blanket_memory::dirty::WriteLog;
use vm_memory::bitmap::Bitmap;

pub use metrics::Metrics;

/// Requests that a queue's store takes at a time.
pub(crate) const DEPTH: u16 = 256;

/// What all queues of a disk share.
pub(crate) struct Identity {
    /// For the log.
    pub(crate) name: String,
    /// Counters.
    pub(crate) metrics: Arc<Metrics>,
    /// Where writes are noted.
    pub(crate) log: Arc<WriteLog>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is done; the guest's memory has so many bytes of data now.
    Done(u32),
    /// It failed.
    Failed,
    /// This disk cannot do it.
    Unsupported,
}

/// A request that the store has.
struct Pending<T> {
    tag: T,
    operation: Operation,
    /// What it changes.
    _change: Option<Change>,
    /// Bytes of data that moved.
    moved: u32,
    /// The write is done and waits for its own flush.
    flushing: bool,
}

/// A range that is being written: noted when that is over, however it went, and
/// before the guest knows of it.
struct Change {
    log: Arc<WriteLog>,
    offset: u64,
    len: u64,
}

impl Change {
    fn of(request: &Request, log: &Arc<WriteLog>) -> Option<Self> {
        let len = match request.operation {
            Operation::Read | Operation::Flush => return None,
            Operation::Write => IoVec::total(&request.vectors) as u64,
            Operation::Discard | Operation::WriteZeroes => request.len,
        };
        Some(Self {
            log: Arc::clone(log),
            offset: request.offset,
            len,
        })
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if let (Ok(offset), Ok(len)) = (self.offset.try_into(), self.len.try_into()) {
            self.log.mark_dirty(offset, len);
        }
    }
}

/// Writes that found no room, as far as they are not done.
struct Held {
    requests: Vec<Request>,
    metrics: Arc<Metrics>,
}

impl Held {
    /// All of them: they are to be tried again.
    fn take(&mut self) -> Vec<Request> {
        let requests = std::mem::take(&mut self.requests);
        self.metrics.release(requests.len());
        requests
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.take();
    }
}

/// A store and the requests in flight, each with the caller's `T`.
///
/// A write that finds no room on the node is kept: its guest does not know that
/// there is a file below its disk. It is tried again with [`Engine::retry`].
///
/// Dropping it waits for what is in flight, before it lets go of the tags.
pub(crate) struct Engine<T> {
    /// First, as what it has in flight is over when it is dropped.
    store: Box<dyn Store>,
    identity: Arc<Identity>,
    /// By token. Not more than the store takes.
    pending: Vec<Option<Pending<T>>>,
    free: Vec<usize>,
    completions: Vec<Completion>,
    /// Their tokens are not free.
    held: Held,
}

/// Why a request was not started. The caller has its tag back.
pub(crate) enum Refused<T> {
    /// The store is full: the request has to come again.
    Full(T),
    /// The store is broken.
    Broken(T),
}

impl<T> Engine<T> {
    /// Requests go to `store`.
    pub(crate) fn new(store: Box<dyn Store>, identity: Arc<Identity>) -> Self {
        Self {
            store,
            held: Held {
                requests: Vec::new(),
                metrics: Arc::clone(&identity.metrics),
            },
            identity,
            pending: Vec::new(),
            free: Vec::new(),
            completions: Vec::new(),
        }
    }

    /// The store, for the next driver.
    pub(crate) fn into_store(self) -> Box<dyn Store> {
        self.store
    }

    /// Readable when something has completed.
    pub(crate) fn event(&self) -> RawFd {
        self.store.event()
    }

    /// Requests that the store has.
    pub(crate) fn in_flight(&self) -> usize {
        self.store.in_flight()
    }

    /// Hands a request to the store; [`Engine::commit`] starts it. `tag` comes
    /// back with its outcome.
    ///
    /// # Safety
    /// The memory behind the request's vectors stays mapped until its outcome
    /// has been returned, or the engine been dropped.
    ///
    /// # Errors
    /// The store does not take it.
    pub(crate) unsafe fn submit(&mut self, mut request: Request, tag: T) -> Result<(), Refused<T>> {
        let token = self.free.pop().unwrap_or(self.pending.len());
        if token == self.pending.len() {
            self.pending.push(None);
        }
        request.token = token as u64;
        let operation = request.operation;
        let change = Change::of(&request, &self.identity.log);
        // SAFETY: the caller's promise.
        match unsafe { self.store.submit(request) } {
            Ok(()) => {
                self.pending[token] = Some(Pending {
                    tag,
                    operation,
                    _change: change,
                    moved: 0,
                    flushing: false,
                });
                Ok(())
            }
            Err(error) => {
                self.free.push(token);
                if error.kind() == io::ErrorKind::WouldBlock {
                    return Err(Refused::Full(tag));
                }
                self.report(operation, &error);
                Err(Refused::Broken(tag))
            }
        }
    }

    /// Starts the writes anew that found no room.
    pub(crate) fn retry(&mut self) {
        if self.held.requests.is_empty() {
            return;
        }
        for request in self.held.take() {
            let again = request.clone();
            // SAFETY: as long as its token is taken, so is the memory: whoever
            // submitted it waits for its outcome.
            if let Err(error) = unsafe { self.store.submit(request) } {
                // The store is full of others: the next time.
                tracing::debug!(%error, "a held write waits on");
                self.hold(again);
            }
        }
        self.commit();
    }

    fn hold(&mut self, request: Request) {
        self.held.requests.push(request);
        if self.identity.metrics.hold() {
            tracing::warn!(
                disk = self.identity.name,
                "no room on the node for what the guest writes: the VM is paused; make room where the image is, then resume it"
            );
        }
    }

    /// Starts what was submitted.
    pub(crate) fn commit(&mut self) {
        if let Err(error) = self.store.commit() {
            // The store keeps them and tries again with the next commit.
            tracing::warn!(disk = self.identity.name, %error, "the disk's engine stumbles");
        }
    }

    /// Appends the outcomes of what has completed to `done`. If `durable`, a
    /// write's comes when it was flushed, too.
    pub(crate) fn reap(&mut self, durable: bool, done: &mut Vec<(T, Outcome)>) {
        let mut completions = std::mem::take(&mut self.completions);
        self.store.complete(&mut completions);
        self.finish_all(&mut completions, durable, done);
        self.completions = completions;
    }

    /// Waits until nothing is in flight; outcomes as with [`Engine::reap`].
    pub(crate) fn drain(&mut self, durable: bool, done: &mut Vec<(T, Outcome)>) {
        let mut completions = Vec::new();
        while self.store.in_flight() > 0 {
            self.store.drain(&mut completions);
            self.finish_all(&mut completions, durable, done);
        }
    }

    fn finish_all(
        &mut self,
        completions: &mut Vec<Completion>,
        durable: bool,
        done: &mut Vec<(T, Outcome)>,
    ) {
        let mut again = false;
        for completion in completions.drain(..) {
            let Ok(token) = usize::try_from(completion.token) else {
                continue;
            };
            if let Some(rest) = completion.rest {
                self.hold(rest);
                continue;
            }
            let Some(pending) = self.pending.get_mut(token).and_then(Option::take) else {
                continue;
            };
            match self.finish(pending, token, completion.result, durable) {
                Some(outcome) => {
                    self.free.push(token);
                    done.push(outcome);
                }
                None => again = true,
            }
        }
        if again {
            self.commit();
        }
    }

    /// How a request ended. `None` if its write is flushed first.
    fn finish(
        &mut self,
        mut pending: Pending<T>,
        token: usize,
        result: io::Result<u32>,
        durable: bool,
    ) -> Option<(T, Outcome)> {
        let outcome = match result {
            Ok(moved) if durable && pending.is_volatile() => {
                pending.moved = moved;
                pending.flushing = true;
                // The write's place in the store is free again.
                if self.flush(token).is_ok() {
                    self.pending[token] = Some(pending);
                    return None;
                }
                self.identity.metrics.failed();
                Outcome::Failed
            }
            Ok(moved) => {
                let moved = if pending.flushing {
                    pending.moved
                } else {
                    moved
                };
                self.identity.metrics.done(pending.operation, moved);
                Outcome::Done(match pending.operation {
                    Operation::Read => moved,
                    _ => 0,
                })
            }
            Err(error) => {
                self.report(pending.operation, &error);
                match error.kind() {
                    io::ErrorKind::Unsupported => Outcome::Unsupported,
                    _ => Outcome::Failed,
                }
            }
        };
        Some((pending.tag, outcome))
    }

    fn flush(&mut self, token: usize) -> io::Result<()> {
        let request = Request {
            token: token as u64,
            ..request(Operation::Flush, 0, 0)
        };
        // SAFETY: no memory.
        unsafe { self.store.submit(request) }
    }

    /// Counts a failure and logs a disk's first: a guest can make many.
    fn report(&self, operation: Operation, error: &io::Error) {
        if self.identity.metrics.failed_with(error) {
            tracing::warn!(
                disk = self.identity.name,
                ?operation,
                %error,
                "a disk request failed; later failures are only counted"
            );
        }
    }
}

impl<T> Pending<T> {
    /// Whether it is done but not durable.
    fn is_volatile(&self) -> bool {
        !self.flushing && !matches!(self.operation, Operation::Read | Operation::Flush)
    }
}

/// A request without memory and token.
pub(crate) fn request(operation: Operation, offset: u64, len: u64) -> Request {
    Request {
        operation,
        offset,
        len,
        vectors: Vec::new(),
        token: 0,
    }
}

/// The byte at which a sector begins; none if there is no such byte.
pub(crate) fn offset(sector: u64) -> Option<u64> {
    sector.checked_mul(SECTOR)
}

/// Whether a disk at rest can be saved: nothing of the guest's waits in it.
///
/// # Errors
/// It cannot, in the words for the user.
pub(crate) fn check_settled(metrics: &Metrics) -> Result<(), String> {
    match metrics.held() {
        0 => Ok(()),
        _ => metrics.trouble().map_or(Ok(()), Err),
    }
}

/// Whether a saved disk's capacity (bytes) is this image's.
///
/// # Errors
/// It is not, in the words for the user.
pub(crate) fn check_capacity(saved: u64, image: &Image) -> Result<(), String> {
    let here = image.capacity();
    if saved == here {
        return Ok(());
    }
    Err(format!(
        "the saved disk has {saved} bytes, this one {here}: use the same image or a copy"
    ))
}
