//! Scatter-gather vectors that point into guest memory.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::GuestRam;

/// One piece of guest memory as the kernel's vectored I/O takes it.
///
/// It carries no lifetime: whoever hands it to the kernel or to another thread
/// keeps the [`GuestRam`] that it came from mapped until the I/O is over.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct IoVec(libc::iovec);

// SAFETY: an IoVec is an address and a length; using it is unsafe anyway.
unsafe impl Send for IoVec {}

// SAFETY: as above; shared, it can only be read.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// The vector for `len` bytes at `base`.
    #[must_use]
    pub const fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// Its address in this process.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the first `n` bytes (all of them if there are fewer).
    pub fn advance(&mut self, n: usize) {
        let n = n.min(self.len());
        // n <= len: the sum stays within the piece.
        self.0.iov_base = self.as_ptr().wrapping_add(n).cast();
        self.0.iov_len -= n;
    }

    /// Keeps the first `n` bytes (all of them if there are fewer).
    pub fn truncate(&mut self, n: usize) {
        self.0.iov_len = self.len().min(n);
    }

    /// A slice of vectors as system calls take it.
    #[must_use]
    pub fn as_raw(vectors: &[Self]) -> *const libc::iovec {
        vectors.as_ptr().cast()
    }

    /// Bytes in all of `vectors`.
    #[must_use]
    pub fn total(vectors: &[Self]) -> usize {
        vectors.iter().map(Self::len).sum()
    }
}

/// Appends the pieces of process memory behind `len` bytes of guest memory at
/// `addr` to `out`: one piece, or several where the range crosses regions.
///
/// # Errors
/// Part of the range is not guest memory. `out` is then as it was.
pub fn push(
    ram: &GuestRam,
    addr: GuestAddress,
    len: usize,
    out: &mut Vec<IoVec>,
) -> Result<(), GuestMemoryError> {
    let before = out.len();
    for slice in ram.get_slices(addr, len) {
        match slice {
            Ok(slice) => {
                let guard = slice.ptr_guard_mut();
                out.push(IoVec::new(guard.as_ptr(), slice.len()));
            }
            Err(error) => {
                out.truncate(before);
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Drops the first `n` bytes of a list of vectors; empty ones go.
pub fn advance(vectors: &mut Vec<IoVec>, mut n: usize) {
    let mut gone = 0;
    for vector in vectors.iter_mut() {
        if n < vector.len() {
            vector.advance(n);
            break;
        }
        n -= vector.len();
        gone += 1;
    }
    vectors.drain(..gone);
}

/// Copies the first bytes of `pieces` into `out`; returns how many there were.
///
/// The memory behind the pieces must still be mapped: see [`IoVec`].
#[must_use]
pub fn read_bytes(pieces: &[IoVec], out: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let n = piece.len().min(out.len() - done);
        // SAFETY: the piece lies in mapped guest memory (its maker keeps the
        // mapping), `out` has `n` more bytes, and the two cannot overlap. The
        // guest may write meanwhile: any bytes are acceptable.
        unsafe {
            std::ptr::copy_nonoverlapping(piece.as_ptr(), out[done..].as_mut_ptr(), n);
        }
        done += n;
    }
    done
}

/// Copies `bytes` to the front of `pieces`; returns how many fitted.
///
/// The memory behind the pieces must still be mapped: see [`IoVec`].
pub fn write_bytes(pieces: &[IoVec], bytes: &[u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let n = piece.len().min(bytes.len() - done);
        // SAFETY: as in `read_bytes`, the other way round.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), piece.as_ptr(), n);
        }
        done += n;
    }
    done
}

/// Copies the first bytes of `from` to the front of `to`; returns how many
/// there were, or fitted.
///
/// The memory behind the pieces must still be mapped: see [`IoVec`].
pub fn copy(from: &[IoVec], to: &[IoVec]) -> usize {
    let (mut from, mut to) = (from.iter().copied(), to.iter().copied());
    let (mut source, mut target) = (from.next(), to.next());
    let mut done = 0;
    while let (Some(piece), Some(room)) = (&mut source, &mut target) {
        let n = piece.len().min(room.len());
        // SAFETY: both lie in mapped memory (their makers keep the mappings)
        // and have `n` bytes. They may overlap, and others may write to either
        // meanwhile: any bytes are acceptable.
        unsafe {
            std::ptr::copy(piece.as_ptr(), room.as_ptr(), n);
        }
        done += n;
        piece.advance(n);
        room.advance(n);
        if piece.is_empty() {
            source = from.next();
        }
        if room.is_empty() {
            target = to.next();
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn ram() -> GuestRam {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    #[test]
    fn a_range_across_regions_is_several_pieces() {
        let mut out = Vec::new();
        push(&ram(), GuestAddress(0xff0), 0x20, &mut out).unwrap();
        assert_eq!(IoVec::total(&out), 0x20);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn a_range_that_leaves_memory_is_refused_and_adds_nothing() {
        let mut out = Vec::new();
        assert!(push(&ram(), GuestAddress(0x1ff0), 0x20, &mut out).is_err());
        assert!(push(&ram(), GuestAddress(u64::MAX), 1, &mut out).is_err());
        assert!(out.is_empty());
    }

    #[test]
    fn advancing_drops_whole_and_partial_pieces() {
        let mut out = Vec::new();
        push(&ram(), GuestAddress(0xff0), 0x20, &mut out).unwrap();
        advance(&mut out, 0x18);
        assert_eq!((out.len(), out[0].len()), (1, 8));
        advance(&mut out, 8);
        assert!(out.is_empty());
    }

    #[test]
    fn bytes_are_copied_across_pieces_as_far_as_they_reach() {
        let ram = ram();
        let mut out = Vec::new();
        push(&ram, GuestAddress(0xffe), 4, &mut out).unwrap();
        assert_eq!(write_bytes(&out, b"abcdef"), 4);
        let mut back = [0; 6];
        assert_eq!(read_bytes(&out, &mut back), 4);
        assert_eq!(&back, b"abcd\0\0");
    }

    #[test]
    fn pieces_of_other_lengths_are_copied_as_far_as_both_reach() {
        let ram = ram();
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for (at, len) in [(0, 3), (8, 0), (16, 5)] {
            push(&ram, GuestAddress(at), len, &mut from).unwrap();
        }
        write_bytes(&from, b"abcdefgh");
        for (at, len) in [(0x100, 4), (0x200, 3)] {
            push(&ram, GuestAddress(at), len, &mut to).unwrap();
        }
        assert_eq!(copy(&from, &to), 7);
        let mut back = [0; 7];
        assert_eq!(read_bytes(&to, &mut back), 7);
        assert_eq!(&back, b"abcdefg");
        assert_eq!(copy(&to, &[]), 0);
        assert_eq!(copy(&to[..1], &from), 4);
    }
}
