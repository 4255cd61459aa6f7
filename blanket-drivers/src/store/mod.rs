//! Block stores: images and devices behind one batched, asynchronous interface.

use std::io;
use std::os::fd::RawFd;

use blanket_memory::IoVec;
use serde::{Deserialize, Serialize};

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
    /// A thread that does one request at a time.
    Sync,
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
}

/// One owner's queue into an image or a device.
///
/// Bounds, read-only and alignment are checked here too: a request beyond the
/// end fails, it never grows the image.
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
