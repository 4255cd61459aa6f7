//! A request on its way: checked, then carried out piece by piece.

use std::io;

use blanket_memory::{IoVec, iovec};
use imago::io_buffers::IoBuffer;

use super::{Completion, Operation, Request, is_full};

/// Most vectors in one system call (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;

/// Bytes of a private buffer. Bounds what a guest can make the monitor
/// allocate: this much per request in flight.
const CHUNK: usize = 128 << 10;

/// First bytes of a qcow2 image.
pub(super) const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";

/// What every request to an image is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub(super) capacity: u64,
    /// Offsets and lengths are multiples of this.
    pub(super) block: u32,
    /// Memory is aligned to this, or goes through a private buffer.
    pub(super) mem_align: usize,
    /// Nothing may change.
    pub(super) readonly: bool,
    /// Discard and write-zeroes work.
    pub(super) discard: bool,
    /// The format was told by the first bytes, and they were not qcow2's: keep
    /// it so, or the guest would choose what the next start opens.
    pub(super) keep_raw: bool,
    /// All data goes through a private buffer.
    pub(super) private: bool,
    /// What has completed is durable already: there is nothing to flush.
    pub(super) durable: bool,
    /// It is a block device: one that says that there is no room has lost its
    /// medium, since its size is fixed.
    pub(super) device: bool,
}

impl Limits {
    /// Whether a request is one of whole blocks within the disk that may be
    /// made.
    ///
    /// # Errors
    /// `InvalidInput`, `PermissionDenied` or `Unsupported`; see [`super::Store`].
    pub(super) fn check(&self, request: &Request) -> io::Result<()> {
        let invalid = |message| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        let len = match request.operation {
            Operation::Flush => return Ok(()),
            Operation::Read | Operation::Write => {
                let total = IoVec::total(&request.vectors);
                if u32::try_from(total).is_err() {
                    return invalid("a request longer than 4 GiB");
                }
                total as u64
            }
            Operation::Discard | Operation::WriteZeroes => request.len,
        };
        let block = u64::from(self.block);
        if !request.offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return invalid("a request of parts of blocks");
        }
        if request
            .offset
            .checked_add(len)
            .is_none_or(|end| end > self.capacity)
        {
            return invalid("a request beyond the end of the disk");
        }
        if request.operation != Operation::Read && self.readonly {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the disk is read-only",
            ));
        }
        let frees = matches!(
            request.operation,
            Operation::Discard | Operation::WriteZeroes
        );
        if frees && !self.discard {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        Ok(())
    }

    fn needs_bounce(&self, request: &Request) -> bool {
        let write = match request.operation {
            Operation::Read => false,
            Operation::Write => true,
            _ => return false,
        };
        let unaligned =
            |vector: &IoVec| (vector.as_ptr() as usize | vector.len()) & (self.mem_align - 1) != 0;
        self.private
            // The guest may change its memory after a check: check a copy.
            || (write && self.keep_raw && request.offset == 0)
            || (self.mem_align > 1 && request.vectors.iter().any(unaligned))
    }
}

/// A private, aligned buffer that stands in for the request's memory.
struct Bounce {
    buffer: IoBuffer,
    /// The part of it that is in use now, as system calls take it. On the heap:
    /// its address stays when the transfer moves.
    piece: Vec<IoVec>,
}

/// A request that passed the checks, and how far it has come.
pub(super) struct Transfer {
    /// What to do.
    pub(super) operation: Operation,
    /// First byte that is not done yet.
    pub(super) offset: u64,
    /// Bytes, for discard and write-zeroes.
    pub(super) len: u64,
    /// The request's.
    pub(super) token: u64,
    /// Memory that is not done yet.
    vectors: Vec<IoVec>,
    bounce: Option<Bounce>,
    done: u32,
    /// Whether a flush has nothing to do.
    durable: bool,
    device: bool,
}

/// Carries out a request with `work`, which advances its transfer.
pub(super) fn carry_out(
    request: Request,
    limits: &Limits,
    work: impl FnOnce(&mut Transfer) -> io::Result<()>,
) -> Completion {
    let token = request.token;
    match Transfer::new(request, limits) {
        Ok(mut transfer) => {
            let result = work(&mut transfer).map(|()| transfer.done());
            transfer.finish(result)
        }
        Err(error) => Completion::new(token, Err(error)),
    }
}

impl Transfer {
    /// Checks `request`.
    ///
    /// # Errors
    /// `InvalidInput`, `PermissionDenied` or `Unsupported`; see [`super::Store`].
    pub(super) fn new(mut request: Request, limits: &Limits) -> io::Result<Self> {
        limits.check(&request)?;
        request.vectors.retain(|vector| !vector.is_empty());
        let size = CHUNK.min(IoVec::total(&request.vectors));
        let bounce = if size > 0 && limits.needs_bounce(&request) {
            let mut buffer = IoBuffer::new(size, limits.mem_align.max(limits.block as usize))?;
            buffer.as_mut().into_slice().fill(0);
            Some(Bounce {
                buffer,
                piece: Vec::new(),
            })
        } else {
            None
        };
        Ok(Self {
            operation: request.operation,
            offset: request.offset,
            len: request.len,
            token: request.token,
            vectors: request.vectors,
            bounce,
            done: 0,
            durable: limits.durable,
            device: limits.device,
        })
    }

    /// The completion, with what is left if a write found no room.
    pub(super) fn finish(self, result: io::Result<u32>) -> Completion {
        let writes = matches!(self.operation, Operation::Write | Operation::WriteZeroes);
        let full = result.as_ref().is_err_and(is_full);
        if full && self.device {
            // A device that was taken away has no bytes left.
            let gone = io::Error::from_raw_os_error(libc::ENXIO);
            return Completion::new(self.token, Err(gone));
        }
        Completion {
            token: self.token,
            result,
            rest: (writes && full).then_some(Request {
                operation: self.operation,
                offset: self.offset,
                len: self.len,
                vectors: self.vectors,
                token: self.token,
            }),
        }
    }

    /// Bytes done.
    pub(super) fn done(&self) -> u32 {
        self.done
    }

    /// Whether nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        match self.operation {
            Operation::Flush => self.durable,
            Operation::Discard | Operation::WriteZeroes => self.len == 0,
            Operation::Read | Operation::Write => self.vectors.is_empty(),
        }
    }

    /// The next piece of memory to read into or write from, at `offset`. Valid
    /// until the transfer advances or is dropped.
    ///
    /// # Errors
    /// The guest writes what it must not.
    pub(super) fn piece(&mut self, limits: &Limits) -> io::Result<&[IoVec]> {
        let Some(bounce) = &mut self.bounce else {
            return Ok(&self.vectors[..self.vectors.len().min(MAX_VECTORS)]);
        };
        let len = bounce.buffer.len().min(IoVec::total(&self.vectors));
        let bytes = bounce.buffer.as_mut_range(0..len).into_slice();
        if self.operation == Operation::Write {
            let copied = iovec::read_bytes(&self.vectors, bytes);
            debug_assert_eq!(copied, len);
            if limits.keep_raw && self.offset == 0 && bytes.starts_with(QCOW2_MAGIC) {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "the guest would turn its raw disk into a qcow2 image: give the disk's format to allow it",
                ));
            }
        }
        bounce.piece.clear();
        bounce.piece.push(IoVec::new(bytes.as_mut_ptr(), len));
        Ok(&bounce.piece)
    }

    /// The piece that [`Transfer::piece`] returned, if it is private.
    pub(super) fn private_piece(&mut self) -> Option<&mut [u8]> {
        let bounce = self.bounce.as_mut()?;
        let len = IoVec::total(&bounce.piece);
        Some(bounce.buffer.as_mut_range(0..len).into_slice())
    }

    /// `n` more bytes of the piece are done. True if that was all.
    pub(super) fn advance(&mut self, n: u32) -> bool {
        let bytes = n as usize;
        if self.operation == Operation::Read
            && let Some(bounce) = &self.bounce
        {
            let bytes = bounce.buffer.as_ref_range(0..bytes).into_slice();
            iovec::write_bytes(&self.vectors, bytes);
        }
        iovec::advance(&mut self.vectors, bytes);
        self.offset += u64::from(n);
        self.done += n;
        self.is_done()
    }
}

/// Whether a system call should be made again as it was.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// What it means when no byte went through although the range is in bounds.
pub(super) fn no_progress(operation: Operation) -> io::Error {
    match operation {
        Operation::Read => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the image was cut while in use",
        ),
        _ => io::Error::from(io::ErrorKind::WriteZero),
    }
}
