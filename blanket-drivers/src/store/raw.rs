//! Raw images and block devices, one request at a time.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use blanket_memory::IoVec;

use super::transfer::{Limits, Transfer, carry_out, is_transient, no_progress};
use super::{Completion, Operation, Request};

/// An open raw image.
#[derive(Debug)]
pub(super) struct RawFile {
    /// Open, locked, in the right mode.
    pub(super) file: File,
    /// What requests are checked against.
    pub(super) limits: Limits,
}

/// How `fallocate` gives back room. On block devices, too, the range reads as
/// zeros afterwards.
pub(super) const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

impl RawFile {
    /// Carries out a request.
    pub(super) fn run(&self, request: Request) -> Completion {
        carry_out(request, &self.limits, |transfer| self.work(transfer))
    }

    fn work(&self, transfer: &mut Transfer) -> io::Result<()> {
        if transfer.is_done() {
            return Ok(());
        }
        match transfer.operation {
            Operation::Flush => self.file.sync_data()?,
            Operation::Discard | Operation::WriteZeroes => {
                punch(&self.file, transfer.offset, transfer.len)?;
            }
            Operation::Read | Operation::Write => {
                while !transfer.is_done() {
                    let (write, offset) = (transfer.operation == Operation::Write, transfer.offset);
                    let piece = transfer.piece(&self.limits)?;
                    match self.move_bytes(write, piece, offset) {
                        Ok(0) => return Err(no_progress(transfer.operation)),
                        Ok(n) => {
                            transfer.advance(n);
                        }
                        Err(error) if is_transient(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    fn move_bytes(&self, write: bool, piece: &[IoVec], offset: u64) -> io::Result<u32> {
        let fd = self.file.as_raw_fd();
        let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
        let count = libc::c_int::try_from(piece.len()).map_err(io::Error::other)?;
        // SAFETY: the vectors are of a request whose submitter keeps their
        // memory mapped until it completes, or of the transfer's own buffer.
        let n = unsafe {
            if write {
                libc::pwritev64(fd, IoVec::as_raw(piece), count, offset)
            } else {
                libc::preadv64(fd, IoVec::as_raw(piece), count, offset)
            }
        };
        // One call moves less than 2 GiB: only -1 does not fit.
        u32::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// Gives back the room of a range.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
    let len = libc::off64_t::try_from(len).map_err(io::Error::other)?;
    loop {
        // SAFETY: no memory is involved.
        if unsafe { libc::fallocate64(file.as_raw_fd(), PUNCH, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !is_transient(&error) {
            return Err(error);
        }
    }
}
