//! Copies of heads, into a processor's own memory and out of it soon after.
//!
//! A processor gives what it has just written to who reads it at once if that
//! is part of one thing written; otherwise it waits until all that it has
//! written is where others see it, and to guests' memory that takes longer
//! than all else with a small frame. So heads are copied in pieces that do not
//! overlap (as those of `memcpy` do), the same ones in and out, and cut where
//! what is looked at in between begins and ends.

use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::VolatileSlice;

/// Copies the bytes of `from` into `to`, as many as fit; how many.
pub(crate) fn to_bytes(from: &VolatileSlice<'_>, to: &mut [u8]) -> usize {
    let len = from.len().min(to.len());
    // SAFETY: both have as many bytes, and no others have `to`. Whoever changes
    // `from` meanwhile has any bytes copied.
    unsafe { copy(from.ptr_guard().as_ptr(), to.as_mut_ptr(), len) };
    len
}

/// Copies `from` into `to`, as many bytes as fit; how many.
pub(crate) fn from_bytes(from: &[u8], to: &VolatileSlice<'_>) -> usize {
    let len = from.len().min(to.len());
    // SAFETY: as above, the other way.
    unsafe { copy(from.as_ptr(), to.ptr_guard_mut().as_ptr(), len) };
    len
}

/// # Safety
///
/// There are `len` bytes at both places, which are not the same ones.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    let mut done = 0;
    // SAFETY: each piece is within `len`.
    unsafe {
        if len >= 14 {
            // Ethernet's addresses, each as it is compared, and its type.
            piece::<4>(from, to, &mut done);
            piece::<2>(from, to, &mut done);
            piece::<4>(from, to, &mut done);
            piece::<2>(from, to, &mut done);
            piece::<2>(from, to, &mut done);
        }
        while len - done >= 16 {
            piece::<16>(from, to, &mut done);
        }
        if len - done >= 8 {
            piece::<8>(from, to, &mut done);
        }
        if len - done >= 4 {
            piece::<4>(from, to, &mut done);
        }
        if len - done >= 2 {
            piece::<2>(from, to, &mut done);
        }
        if len - done >= 1 {
            piece::<1>(from, to, &mut done);
        }
    }
}

/// The next `N` bytes.
///
/// # Safety
///
/// There are as many at both places behind those that are `done`.
unsafe fn piece<const N: usize>(from: *const u8, to: *mut u8, done: &mut usize) {
    // SAFETY: as the caller says.
    unsafe {
        let piece = from.add(*done).cast::<[u8; N]>().read();
        to.add(*done).cast::<[u8; N]>().write(piece);
    }
    *done += N;
    // Without it, a compiler makes one `memcpy` of several again.
    compiler_fence(Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_whole_and_nothing_else() {
        let mut from: Vec<u8> = (0..=255).collect();
        for len in 0..=255 {
            let mut head = [0xee; 256];
            let slice = VolatileSlice::from(&mut from[..len]);
            assert_eq!(to_bytes(&slice, &mut head), len);
            assert!(head[..len].iter().copied().eq(0..len as u8));
            assert!(head[len..].iter().all(|byte| *byte == 0xee));
            let mut out = [0xdd; 256];
            let slice = VolatileSlice::from(&mut out[..len]);
            assert_eq!(from_bytes(&head, &slice), len);
            assert_eq!(out[..len], head[..len]);
            assert!(out[len..].iter().all(|byte| *byte == 0xdd));
        }
    }
}
