//! One owner's queue into a striped set.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::layout::{Extent, Layout};
use crate::store::transfer::Limits;
use crate::store::{Completion, Operation, Request, Store, is_full};

/// A request whose parts the volumes have.
struct Pending {
    /// As it came, to give it back where there is no room.
    request: Request,
    /// Parts that have not come back.
    parts: usize,
    moved: u32,
    /// What the first part that failed said.
    error: Option<io::Error>,
}

/// A store on the stores of a set's volumes.
pub(in crate::store) struct StripeStore {
    layout: Layout,
    limits: Limits,
    volumes: Vec<Box<dyn Store>>,
    /// Readable when `event` or a volume's is.
    events: Epoll,
    /// What has completed without the volumes.
    event: EventFd,
    ready: Vec<Completion>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Kept for its room.
    parts: Vec<Completion>,
}

impl StripeStore {
    /// A store for `depth` requests on `volumes`, which take as many each, in
    /// the order in which they are striped.
    ///
    /// # Errors
    /// No epoll, no eventfd.
    pub(in crate::store) fn new(
        layout: Layout,
        limits: Limits,
        volumes: Vec<Box<dyn Store>>,
        depth: u16,
    ) -> io::Result<Self> {
        let events = Epoll::new()?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let all = volumes.iter().map(|volume| volume.event());
        for fd in all.chain([event.as_raw_fd()]) {
            let wanted = EpollEvent::new(EventSet::IN, 0);
            events.ctl(ControlOperation::Add, fd, wanted)?;
        }
        let depth = usize::from(depth);
        Ok(Self {
            layout,
            limits,
            volumes,
            events,
            event,
            ready: Vec::new(),
            pending: std::iter::repeat_with(|| None).take(depth).collect(),
            free: (0..depth).rev().collect(),
            parts: Vec::new(),
        })
    }

    fn finish(&mut self, completion: Completion) {
        self.ready.push(completion);
        // Full (EAGAIN) is as good as signalled.
        let _ = self.event.write(1);
    }

    /// Hands a request's parts to the volumes; how many there are.
    ///
    /// # Safety
    /// As of [`Store::submit`].
    unsafe fn deal(&mut self, request: &Request, index: usize) -> (usize, Option<io::Error>) {
        let is_data = matches!(request.operation, Operation::Read | Operation::Write);
        let vectors = match is_data {
            true => self.layout.deal(request.offset, &request.vectors),
            false => vec![Vec::new(); self.volumes.len()],
        };
        let len = match is_data {
            true => blanket_memory::IoVec::total(&request.vectors) as u64,
            false => request.len,
        };
        let mut parts = 0;
        let mut error = None;
        for ((number, volume), vectors) in (0..).zip(&mut self.volumes).zip(vectors) {
            let extent = match request.operation {
                Operation::Flush => Extent { offset: 0, len: 0 },
                _ => self.layout.extent(number, request.offset, len),
            };
            if extent.len == 0 && request.operation != Operation::Flush {
                continue;
            }
            let part = Request {
                operation: request.operation,
                offset: extent.offset,
                len: extent.len,
                vectors,
                token: index as u64,
            };
            // SAFETY: the memory is the request's; it completes after its parts.
            match unsafe { volume.submit(part) } {
                Ok(()) => parts += 1,
                // Each volume has room for as many as this takes: it is broken.
                Err(broken) => error = error.or(Some(broken)),
            }
        }
        (parts, error)
    }

    /// A part has come back. The completion, if it was the last.
    fn join(&mut self, part: Completion) -> Option<Completion> {
        let index = usize::try_from(part.token).ok()?;
        let pending = self.pending.get_mut(index)?.as_mut()?;
        pending.parts -= 1;
        match part.result {
            Ok(moved) => pending.moved += moved,
            Err(error) => match &pending.error {
                // Want of room can be helped, so it counts least.
                Some(first) if !is_full(first) => {}
                _ => pending.error = Some(error),
            },
        }
        if pending.parts > 0 {
            return None;
        }
        let Pending {
            request,
            moved,
            error,
            ..
        } = self.pending[index].take()?;
        self.free.push(index);
        let token = request.token;
        let full = error.as_ref().is_some_and(is_full);
        Some(Completion {
            token,
            result: error.map_or(Ok(moved), Err),
            // Whole: what was written is written again.
            rest: full.then_some(request),
        })
    }
}

impl Store for StripeStore {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        if self.in_flight() >= self.pending.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Err(error) = self.limits.check(&request) {
            self.finish(Completion::new(request.token, Err(error)));
            return Ok(());
        }
        let Some(index) = self.free.pop() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        // SAFETY: the caller's promise.
        let (parts, error) = unsafe { self.deal(&request, index) };
        if parts == 0 {
            self.free.push(index);
            let result = error.map_or(Ok(0), Err);
            self.finish(Completion::new(request.token, result));
            return Ok(());
        }
        self.pending[index] = Some(Pending {
            request,
            parts,
            moved: 0,
            error,
        });
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        // All of them, also behind one that fails.
        let each = self.volumes.iter_mut().map(|volume| volume.commit());
        let all: Vec<_> = each.collect();
        all.into_iter().collect()
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        // Clear the event first: what completes from now on sets it again.
        let _ = self.event.read();
        out.append(&mut self.ready);
        let mut parts = std::mem::take(&mut self.parts);
        for volume in &mut self.volumes {
            volume.complete(&mut parts);
        }
        out.extend(parts.drain(..).filter_map(|part| self.join(part)));
        self.parts = parts;
    }

    fn event(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len() + self.ready.len()
    }

    fn drain(&mut self, out: &mut Vec<Completion>) {
        let mut parts = Vec::new();
        for volume in &mut self.volumes {
            volume.drain(&mut parts);
        }
        out.extend(parts.into_iter().filter_map(|part| self.join(part)));
        self.complete(out);
        // A volume whose thread has died gives nothing back, nor touches it.
        for (index, pending) in self.pending.iter_mut().enumerate() {
            if let Some(pending) = pending.take() {
                self.free.push(index);
                let broken = io::ErrorKind::BrokenPipe.into();
                out.push(Completion::new(pending.request.token, Err(broken)));
            }
        }
    }
}
