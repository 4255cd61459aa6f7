//! The fast engine: an io_uring on a raw image.
//!
//! The ring may do nothing but the four operations below on the one registered
//! file: system call filters do not see what a ring does, so the ring itself
//! is restricted (Linux 5.10).
//!
//! Completions are polled for on a second ring, since such a ring takes nothing
//! but reads and writes. Nothing signals there: while something is in flight the
//! store keeps its event readable, so that its owner's loop comes back and looks.
//! What the device does not take whole never goes there: Linux does not poll for
//! the parts, and tries without end instead (`bio_set_polled` of Linux 6.1).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use blanket_memory::IoVec;
use io_uring::register::{Probe, Restriction};
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::probe::AtOnce;
use super::raw::{PUNCH, RawFile};
use super::transfer::{Transfer, is_transient, no_progress};
use super::{Completion, Operation, Request, Store};

/// The image's index among the ring's registered files.
const IMAGE: Fixed = Fixed(0);

const OPERATIONS: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// What a ring takes whose completions are polled for.
const POLLED_OPERATIONS: [u8; 2] = [opcode::Readv::CODE, opcode::Writev::CODE];

/// `IORING_UNREGISTER_FILES` of `linux/io_uring.h`: all that a running ring may
/// still be asked to change.
const UNREGISTER_FILES: u8 = 3;

/// Makes a restricted ring on `file` that signals `event`, or has to be polled.
fn build(file: RawFd, event: Option<&EventFd>, entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_r_disabled();
    if event.is_none() {
        builder.setup_iopoll();
    }
    let ring = builder.build(entries)?;
    let submitter = ring.submitter();
    let mut probe = Probe::new();
    submitter.register_probe(&mut probe)?;
    let operations = match event {
        Some(_) => &OPERATIONS[..],
        None => &POLLED_OPERATIONS,
    };
    if !operations.iter().all(|op| probe.is_supported(*op)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    submitter.register_files(&[file])?;
    if let Some(event) = event {
        submitter.register_eventfd(event.as_raw_fd())?;
    }
    let mut restrictions: Vec<_> = operations
        .iter()
        .map(|op| Restriction::sqe_op(*op))
        .collect();
    restrictions.push(Restriction::register_op(UNREGISTER_FILES));
    restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// Whether rings can be had here.
///
/// The file of this ring is no image: the kernel takes rings down in the
/// background, and to make it let go of an image at once takes long.
///
/// # Errors
/// Why not: `ENOSYS` or `EPERM` where the kernel or a container forbids it.
pub(super) fn probe() -> io::Result<()> {
    let event = EventFd::new(EFD_NONBLOCK)?;
    build(event.as_raw_fd(), Some(&event), 1).map(drop)
}

/// A ring whose completions are polled for.
struct Polled {
    ring: IoUring,
    in_flight: usize,
    at_once: AtOnce,
    /// The device turned out not to be polled: what comes takes the other ring.
    refused: bool,
}

/// What a ring says of a request.
struct RingResult {
    index: u64,
    result: i32,
    /// Of the ring that is polled.
    polled: bool,
}

/// A store on a ring.
pub(super) struct RingStore {
    ring: IoUring,
    polled: Option<Polled>,
    image: Arc<RawFile>,
    event: EventFd,
    /// The requests in the ring; the index is their `user_data`. Never resized.
    slots: Vec<Option<Transfer>>,
    free: Vec<usize>,
    /// Completed without the ring: refused, or empty.
    ready: Vec<Completion>,
    /// Taken from the rings; kept for its room.
    results: Vec<RingResult>,
}

impl RingStore {
    /// A ring for `depth` requests; if `polled`, another one beside it.
    ///
    /// # Errors
    /// The kernel refuses the ring, or memory for it is missing.
    pub(super) fn new(image: Arc<RawFile>, depth: u16, polled: bool) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let entries = u32::from(depth).max(1);
        let file = image.file.as_raw_fd();
        let ring = build(file, Some(&event), entries)?;
        let polled = polled.then(|| build(file, None, entries)).transpose()?;
        let depth = entries as usize;
        Ok(Self {
            ring,
            polled: polled.map(|ring| Polled {
                ring,
                in_flight: 0,
                at_once: AtOnce::of(&image.file),
                refused: false,
            }),
            image,
            event,
            slots: std::iter::repeat_with(|| None).take(depth).collect(),
            free: (0..depth).rev().collect(),
            ready: Vec::new(),
            results: Vec::new(),
        })
    }

    /// Returns a completion without the ring.
    fn finish(&mut self, token: u64, result: io::Result<u32>) {
        self.ready.push(Completion::new(token, result));
        let _ = self.event.write(1);
    }

    /// Puts the slot's next step into the ring.
    fn queue(&mut self, index: usize) -> io::Result<()> {
        let Some(transfer) = self.slots[index].as_mut() else {
            return Ok(());
        };
        let offset = transfer.offset;
        let (entry, piece) = step(transfer, &self.image)?;
        let entry = entry.flags(Flags::FIXED_FILE).user_data(index as u64);
        let ring = match (&mut self.polled, piece) {
            (Some(polled), Some(piece))
                if !polled.refused && polled.at_once.fits(piece, offset) =>
            {
                polled.in_flight += 1;
                &mut polled.ring
            }
            _ => &mut self.ring,
        };
        // SAFETY: the vectors and their memory live until the completion: the
        // slot keeps the vectors in place, the submitter the memory, and `drop`
        // waits for whatever is still in the ring.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Takes a slot back.
    fn take(&mut self, index: usize) -> Option<Transfer> {
        let transfer = self.slots[index].take()?;
        self.free.push(index);
        Some(transfer)
    }

    /// Handles a result of the ring. Queues again what is not done.
    fn handle(&mut self, index: usize, result: i32, polled: bool) -> Option<Completion> {
        let transfer = self.slots.get_mut(index)?.as_mut()?;
        let operation = transfer.operation;
        let data = matches!(operation, Operation::Read | Operation::Write);
        let outcome = match u32::try_from(result) {
            Err(_) => {
                let error = io::Error::from_raw_os_error(-result);
                if is_transient(&error) || (polled && self.is_not_polled(&error)) {
                    None
                } else {
                    Some(Err(error))
                }
            }
            Ok(0) if data => Some(Err(no_progress(operation))),
            Ok(n) if data => transfer.advance(n).then(|| Ok(transfer.done())),
            Ok(_) => Some(Ok(0)),
        };
        let result = match outcome {
            Some(result) => result,
            None => match self.queue(index) {
                Ok(()) => return None,
                Err(error) => Err(error),
            },
        };
        Some(self.take(index)?.finish(result))
    }

    /// Whether this says that the device cannot be polled: it is not, then.
    fn is_not_polled(&mut self, error: &io::Error) -> bool {
        let says_so = error.raw_os_error() == Some(libc::EOPNOTSUPP);
        if let Some(polled) = &mut self.polled
            && says_so
            && !std::mem::replace(&mut polled.refused, true)
        {
            tracing::warn!("the device cannot be polled: it interrupts");
        }
        says_so
    }

    /// Takes what the rings have completed.
    fn collect(&mut self) {
        let result = |polled| {
            move |entry: io_uring::cqueue::Entry| RingResult {
                index: entry.user_data(),
                result: entry.result(),
                polled,
            }
        };
        self.results
            .extend(self.ring.completion().map(result(false)));
        let Some(polled) = &mut self.polled else {
            return;
        };
        if polled.in_flight > 0 {
            // This is what polls. If it fails, the next round finds out.
            let _ = polled.ring.submit();
            let before = self.results.len();
            self.results
                .extend(polled.ring.completion().map(result(true)));
            polled.in_flight -= (self.results.len() - before).min(polled.in_flight);
        }
    }
}

/// Starts what is in a ring. What the kernel has no room for now stays there,
/// and `event` has the owner come back.
fn start(ring: &mut IoUring, event: &EventFd) -> io::Result<()> {
    while !ring.submission().is_empty() {
        match ring.submit() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_transient(&error) || error.kind() == io::ErrorKind::ResourceBusy => {
                let _ = event.write(1);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The entry for a transfer's next step, and the memory that it reads or writes.
fn step<'a>(
    transfer: &'a mut Transfer,
    image: &RawFile,
) -> io::Result<(Entry, Option<&'a [IoVec]>)> {
    let (operation, offset, len) = (transfer.operation, transfer.offset, transfer.len);
    Ok(match operation {
        Operation::Flush => {
            let flags = FsyncFlags::DATASYNC;
            (opcode::Fsync::new(IMAGE).flags(flags).build(), None)
        }
        Operation::Discard | Operation::WriteZeroes => {
            let punch = opcode::Fallocate::new(IMAGE, len);
            (punch.offset(offset).mode(PUNCH).build(), None)
        }
        Operation::Read | Operation::Write => {
            let piece = transfer.piece(&image.limits)?;
            let count = u32::try_from(piece.len()).map_err(io::Error::other)?;
            let vectors = IoVec::as_raw(piece);
            let entry = if operation == Operation::Read {
                opcode::Readv::new(IMAGE, vectors, count)
                    .offset(offset)
                    .build()
            } else {
                opcode::Writev::new(IMAGE, vectors, count)
                    .offset(offset)
                    .build()
            };
            (entry, Some(piece))
        }
    })
}

impl Store for RingStore {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        if self.in_flight() >= self.slots.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let Some(index) = self.free.pop() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let token = request.token;
        let queued = Transfer::new(request, &self.image.limits).and_then(|transfer| {
            if transfer.is_done() {
                return Ok(false);
            }
            self.slots[index] = Some(transfer);
            self.queue(index).map(|()| true)
        });
        match queued {
            Ok(true) => {}
            other => {
                self.slots[index] = None;
                self.free.push(index);
                self.finish(token, other.map(|_| 0));
            }
        }
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        if let Some(polled) = &mut self.polled {
            start(&mut polled.ring, &self.event)?;
            if polled.in_flight > 0 {
                // Full (EAGAIN) is as good as signalled.
                let _ = self.event.write(1);
            }
        }
        start(&mut self.ring, &self.event)
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        // Clear the event first: what completes from now on sets it again.
        let _ = self.event.read();
        out.append(&mut self.ready);
        self.collect();
        let mut results = std::mem::take(&mut self.results);
        for RingResult {
            index,
            result,
            polled,
        } in results.drain(..)
        {
            let Ok(index) = usize::try_from(index) else {
                continue;
            };
            out.extend(self.handle(index, result, polled));
        }
        self.results = results;
        if let Err(error) = self.commit() {
            // They stay queued for the next commit.
            tracing::warn!(%error, "io_uring takes no requests");
        }
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.ready.len()
    }

    fn drain(&mut self, out: &mut Vec<Completion>) {
        loop {
            // What the ring does not take now, it takes when others complete.
            let taken = self.commit().is_ok();
            self.complete(out);
            if self.in_flight() == 0 {
                return;
            }
            wait(&self.event, !taken);
        }
    }
}

/// Waits for the event, or only a moment if the ring has to be asked again.
fn wait(event: &EventFd, briefly: bool) {
    let mut fd = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let moment = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1_000_000,
    };
    let timeout = if briefly {
        &raw const moment
    } else {
        std::ptr::null()
    };
    // SAFETY: one valid pollfd, a valid or no timeout, no signal mask. A signal
    // ends it early: the caller looks again.
    unsafe { libc::ppoll(&raw mut fd, 1, timeout, std::ptr::null()) };
}

impl Drop for RingStore {
    fn drop(&mut self) {
        // The kernel must not touch the requests' memory once they are gone.
        self.drain(&mut Vec::new());
        // The kernel takes rings down in the background. Let the image go now,
        // or its lock would be in the way of whoever opens it next.
        let polled = self.polled.as_ref().map(|polled| &polled.ring);
        for ring in polled.into_iter().chain([&self.ring]) {
            if let Err(error) = ring.submitter().unregister_files() {
                tracing::warn!(%error, "io_uring does not let its file go");
            }
        }
    }
}
