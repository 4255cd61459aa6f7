//! A store of an image whose content follows its guest: see
//! [`blanket_memory::absent`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, RawFd};
use std::sync::Arc;

use blanket_memory::IoVec;
use blanket_memory::absent::{Absent, Claim, Entry, Use};
use vmm_sys_util::eventfd::EventFd;

use super::{Completion, Operation, Request, Store};

/// Requests that need what has not come wait here; all others go on to `store`.
pub(super) struct LateStore {
    store: Box<dyn Store>,
    absent: Arc<Absent>,
    /// The store's.
    event: EventFd,
    depth: usize,
    waiting: VecDeque<Request>,
    /// Those that wait no more, as what they need does not come.
    failed: Vec<Completion>,
    /// Writes to what had not come, by token, as they were.
    claims: HashMap<u64, (Claim, Request)>,
}

impl LateStore {
    /// Before `store`, whose event is an eventfd.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(super) fn new(store: Box<dyn Store>, absent: Arc<Absent>, depth: u16) -> io::Result<Self> {
        let copy = || {
            // SAFETY: the store's, which is there.
            let event = unsafe { BorrowedFd::borrow_raw(store.event()) };
            let event = event.try_clone_to_owned()?.into_raw_fd();
            // SAFETY: nobody else has it.
            Ok::<_, io::Error>(unsafe { EventFd::from_raw_fd(event) })
        };
        let event = copy()?;
        absent.add_user(copy()?);
        Ok(Self {
            event,
            store,
            absent,
            depth: usize::from(depth).max(1),
            waiting: VecDeque::new(),
            failed: Vec::new(),
            claims: HashMap::new(),
        })
    }

    /// Starts a request if it can, or gives it back if it has to wait. `asked`: it
    /// has waited already.
    fn start(&mut self, request: Request, asked: bool) -> io::Result<Option<Request>> {
        let Some((what, range)) = used(&request) else {
            // SAFETY: as for this one.
            return unsafe { self.store.submit(request) }.map(|()| None);
        };
        let claim = match self.absent.enter(what, &range, asked) {
            Entry::Free => None,
            Entry::Claimed(claim) => Some(claim),
            Entry::Wait => return Ok(Some(request)),
            Entry::Lost => {
                const WHY: &str =
                    "what it needs had not followed the guest when the way to it was lost";
                let lost = Err(io::Error::other(WHY));
                self.failed.push(Completion::new(request.token, lost));
                let _ = self.event.write(1);
                return Ok(None);
            }
        };
        let kept = claim.map(|claim| (claim, request.clone()));
        let token = request.token;
        // SAFETY: the caller's promise to this one: it has not been completed.
        let submitted = unsafe { self.store.submit(request) };
        match (&submitted, kept) {
            (Ok(()), Some(kept)) => drop(self.claims.insert(token, kept)),
            (Err(_), Some((claim, _))) => self.absent.written(&claim, false),
            _ => {}
        }
        submitted.map(|()| None)
    }

    /// Starts those that need not wait any more.
    fn retry(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let mut full = false;
        for request in std::mem::take(&mut self.waiting) {
            if full {
                self.waiting.push_back(request);
                continue;
            }
            let again = request.clone();
            match self.start(request, true) {
                Ok(None) => {}
                Ok(Some(request)) => self.waiting.push_back(request),
                // The store is full: when it has completed some.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    full = true;
                    self.waiting.push_back(again);
                }
                Err(error) => {
                    self.failed.push(Completion::new(again.token, Err(error)));
                    let _ = self.event.write(1);
                }
            }
        }
        // If it stumbles, it keeps them, and tries again with the next one.
        let _ = self.store.commit();
    }

    /// What has completed, with what it means for what is missing.
    fn settle(&mut self, completions: &mut [Completion]) {
        if self.claims.is_empty() {
            return;
        }
        for completion in completions {
            let Some((claim, request)) = self.claims.remove(&completion.token) else {
                continue;
            };
            self.absent.written(&claim, completion.result.is_ok());
            if completion.rest.is_some() {
                // What is missing again would come over the part that is done.
                completion.rest = Some(request);
            }
        }
    }
}

/// What a request uses of the disk.
fn used(request: &Request) -> Option<(Use, Range<u64>)> {
    let (what, len) = match request.operation {
        Operation::Flush => return None,
        Operation::Read => (Use::Read, IoVec::total(&request.vectors) as u64),
        Operation::Write => (Use::Write, IoVec::total(&request.vectors) as u64),
        Operation::Discard | Operation::WriteZeroes => (Use::Write, request.len),
    };
    Some((what, request.offset..request.offset.saturating_add(len)))
}

impl Store for LateStore {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        if !self.absent.any() {
            // SAFETY: the caller's promise.
            return unsafe { self.store.submit(request) };
        }
        if self.waiting.len() >= self.depth {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Some(request) = self.start(request, false)? {
            self.waiting.push_back(request);
        }
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        self.store.commit()
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        // That clears the event: what comes from now on sets it again.
        self.store.complete(out);
        self.settle(out.get_mut(before..).unwrap_or_default());
        self.retry();
        out.append(&mut self.failed);
    }

    fn event(&self) -> RawFd {
        self.store.event()
    }

    fn in_flight(&self) -> usize {
        self.store.in_flight() + self.waiting.len() + self.failed.len()
    }

    fn drain(&mut self, out: &mut Vec<Completion>) {
        loop {
            let before = out.len();
            self.store.drain(out);
            self.settle(out.get_mut(before..).unwrap_or_default());
            self.retry();
            out.append(&mut self.failed);
            if self.in_flight() == 0 {
                return;
            }
            if self.store.in_flight() == 0 {
                self.absent.wait();
            }
        }
    }
}

impl Drop for LateStore {
    fn drop(&mut self) {
        // Nobody waits for them any more, but what was written is there.
        self.waiting.clear();
        let mut out = Vec::new();
        self.store.drain(&mut out);
        self.settle(&mut out);
    }
}
