//! An image's content beside the guest's queues.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use blanket_memory::IoVec;
use blanket_memory::dirty::WriteLog;

use super::stripe::Layout;
use super::thread::Backend;
use super::transfer::Limits;
use super::{Completion, Operation, Request};

/// Bytes of zeros that are written at once where there is no other way.
const ZEROS: usize = 64 << 10;

/// What an image consists of.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// One file or device.
    One(Backend),
    /// Volumes, in the order in which they are striped.
    Striped(Layout, Vec<Access>),
}

/// Reads and writes an image, one request at a time, whatever its stores do
/// meanwhile. Whoever wants the latest of a range that they write looks at
/// [`Access::log`] and reads it again.
#[derive(Clone, Debug)]
pub struct Access {
    body: Body,
    limits: Limits,
    log: Arc<WriteLog>,
}

impl Access {
    pub(super) fn new(body: Body, limits: Limits, log: Arc<WriteLog>) -> Self {
        Self { body, limits, log }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.limits.capacity
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn readonly(&self) -> bool {
        self.limits.readonly
    }

    /// What its stores' users have written.
    #[must_use]
    pub fn log(&self) -> &WriteLog {
        &self.log
    }

    /// Fills `into` from `offset`; both in whole blocks.
    ///
    /// # Errors
    /// It is not within the disk, or the node's disk fails.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let memory = IoVec::new(into.as_mut_ptr(), into.len());
        self.carry_out(Operation::Read, offset, 0, vec![memory])
    }

    /// Stores `bytes` at `offset`; both in whole blocks.
    ///
    /// # Errors
    /// As [`Access::read`], or there is no room.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // It is only read from.
        let memory = IoVec::new(bytes.as_ptr().cast_mut(), bytes.len());
        self.carry_out(Operation::Write, offset, 0, vec![memory])
    }

    /// Makes zeros of a range of whole blocks.
    ///
    /// # Errors
    /// As [`Access::write`].
    pub fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.carry_out(Operation::WriteZeroes, offset, len, Vec::new()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let end = offset.saturating_add(len);
                let mut at = offset;
                while at < end {
                    let n = (end - at).min(ZEROS as u64);
                    self.write(at, &[0; ZEROS][..n as usize])?;
                    at += n;
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// The node's disk is full or broken.
    pub fn flush(&self) -> io::Result<()> {
        match &self.body {
            _ if self.limits.readonly => Ok(()),
            Body::One(Backend::Raw(raw)) => raw.file.sync_data(),
            Body::One(Backend::Qcow2(layers)) => layers.flush(),
            // All of them, also behind one that fails.
            Body::Striped(_, volumes) => {
                let all: Vec<_> = volumes.iter().map(Self::flush).collect();
                all.into_iter().collect()
            }
        }
    }

    /// The next range from `offset` on that may hold anything but zeros; none if
    /// there is no more.
    ///
    /// # Errors
    /// The node's file system fails.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.limits.capacity;
        if offset >= end {
            return Ok(None);
        }
        let Body::One(Backend::Raw(raw)) = &self.body else {
            return Ok(Some(offset..end));
        };
        let seek = |from: u64, whence| -> io::Result<u64> {
            let from = libc::off64_t::try_from(from).map_err(io::Error::other)?;
            // SAFETY: no memory is involved; nobody uses the file's own position.
            let at = unsafe { libc::lseek64(raw.file.as_raw_fd(), from, whence) };
            u64::try_from(at).map_err(|_| io::Error::last_os_error())
        };
        let block = u64::from(self.limits.block);
        match seek(offset, libc::SEEK_DATA) {
            Ok(start) if start >= end => Ok(None),
            Ok(start) => {
                let start = start / block * block;
                let hole = seek(start.max(offset), libc::SEEK_HOLE).unwrap_or(end);
                Ok(Some(
                    start.max(offset)..hole.next_multiple_of(block).min(end),
                ))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) && !self.limits.device => {
                Ok(None)
            }
            // A device, or a file system that does not tell.
            Err(_) => Ok(Some(offset..end)),
        }
    }

    fn carry_out(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        vectors: Vec<IoVec>,
    ) -> io::Result<()> {
        let request = Request {
            operation,
            offset,
            len,
            vectors,
            token: 0,
        };
        match &self.body {
            Body::One(backend) => {
                let Completion { result, .. } = backend.run(request);
                result.map(drop)
            }
            Body::Striped(layout, volumes) => {
                self.limits.check(&request)?;
                let len = match operation {
                    Operation::Read | Operation::Write => IoVec::total(&request.vectors) as u64,
                    _ => len,
                };
                let dealt = layout.deal(offset, &request.vectors);
                for ((number, volume), vectors) in (0..).zip(volumes).zip(dealt) {
                    let extent = layout.extent(number, offset, len);
                    if extent.len > 0 {
                        volume.carry_out(operation, extent.offset, extent.len, vectors)?;
                    }
                }
                Ok(())
            }
        }
    }
}
