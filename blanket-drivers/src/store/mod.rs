//! Block stores: images and devices behind one batched, asynchronous interface.
//!
//! [`Image::open`] opens and locks an image, a block device or a striped set of
//! them; [`Image::queue`] makes one [`Store`] per virtqueue: an io_uring for raw
//! images (with polled completions, if that is asked for), a thread where there
//! is no io_uring and for qcow2, and one of these per volume for a striped set.

use std::io;
use std::os::fd::RawFd;

use blanket_memory::IoVec;
use serde::{Deserialize, Serialize};

mod access;
mod image;
mod late;
mod lock;
mod probe;
mod qcow2;
mod raw;
mod ring;
mod selftest;
pub mod stripe;
#[cfg(test)]
mod tests;
mod thread;
mod transfer;

pub use access::Access;
pub use image::{Error, Image, Spec, default_serial};
pub use lock::{release as unlock_file, take as lock_file};
pub use qcow2::create_overlay;
pub use selftest::{Figures, Measured, Report, measure};

/// Unit of offsets and lengths: an image has a whole number of these (bytes).
pub const SECTOR: u64 = 512;

/// Runs on a thread that a store makes, before anything else: where the
/// monitor confines it.
pub type ThreadSetup = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// System calls of a thread that a store makes, besides what every thread
/// needs (memory, futexes, signals, its end).
pub const THREAD_SYSCALLS: &[libc::c_long] = &[
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    // qcow2 grows its file.
    libc::SYS_ftruncate,
    // The completion event.
    libc::SYS_write,
];

/// System calls of a thread that owns a [`Store`] of any engine: starting
/// requests, the completion event, waiting in [`Store::drain`], and letting go
/// of the image at the end.
pub const RING_SYSCALLS: &[libc::c_long] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_ppoll,
];

/// How the bytes of an image are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's copy-on-write format, with or without backing files.
    Qcow2,
}

/// What carries out the I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// io_uring where it can be had, else a thread.
    #[default]
    Auto,
    /// io_uring, or an error.
    #[serde(rename = "io_uring")]
    IoUring,
    /// io_uring whose reads and writes are polled for instead of waiting for
    /// interrupts, or an error. Needs a block device with poll queues, and
    /// bypasses the page cache. Whoever serves the queue spins while something
    /// is in flight.
    Polled,
    /// A thread that does one request at a time.
    Sync,
}

impl Engine {
    /// The name that configurations have for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Polled => "polled",
            Self::Sync => "sync",
        }
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the vectors from `offset`.
    Read,
    /// Store the vectors at `offset`.
    Write,
    /// Make everything that has completed durable.
    Flush,
    /// The content of the range may be forgotten.
    Discard,
    /// The range reads as zeros from now on; its room may be given back.
    WriteZeroes,
}

/// One request to a store.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// First byte, for all but flush.
    pub offset: u64,
    /// Bytes, for discard and write-zeroes (reads and writes go by `vectors`).
    pub len: u64,
    /// Memory for reads and writes.
    pub vectors: Vec<IoVec>,
    /// Comes back with the completion.
    pub token: u64,
}

/// A completed request.
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub token: u64,
    /// Bytes read or written (all of them), 0 for the others; or what failed.
    pub result: io::Result<u32>,
    /// What is left to do of a write that found no room ([`is_full`]): it can
    /// be submitted again when there is some, with another token if need be.
    pub rest: Option<Request>,
}

impl Completion {
    /// Of a request that is over and done with.
    #[must_use]
    pub fn new(token: u64, result: io::Result<u32>) -> Self {
        Self {
            token,
            result,
            rest: None,
        }
    }
}

/// Whether this is for want of room below: the same may work later.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// One owner's queue into an image or a device.
///
/// Bounds, read-only and alignment are checked here too: a request beyond the
/// end, or not in whole blocks, completes with `InvalidInput`, a write to a
/// read-only image with `PermissionDenied`. No request grows the image. A flush
/// covers what had completed when it was submitted.
pub trait Store: Send {
    /// Queues a request. It may start at once or with [`Store::commit`].
    ///
    /// # Safety
    /// The memory behind `request.vectors` stays mapped until the request's
    /// completion has been returned by [`Store::complete`].
    ///
    /// # Errors
    /// The queue is full (`WouldBlock`): commit, complete, then try again.
    unsafe fn submit(&mut self, request: Request) -> io::Result<()>;

    /// Starts everything queued.
    ///
    /// # Errors
    /// The engine broke: the requests in flight still complete or fail.
    fn commit(&mut self) -> io::Result<()>;

    /// Appends what has completed to `out`, without waiting.
    fn complete(&mut self, out: &mut Vec<Completion>);

    /// Readable when something has completed.
    fn event(&self) -> RawFd;

    /// Requests that were submitted and not yet returned.
    fn in_flight(&self) -> usize;

    /// Waits until nothing is in flight; completions go to `out`.
    fn drain(&mut self, out: &mut Vec<Completion>);
}
