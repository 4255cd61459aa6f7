//! From guest memory to the other end.

use std::io;

use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::IoVec;

use super::{Direction, FrameQueue};

/// The longest frame: a 64 KiB datagram with its Ethernet and VLAN headers.
const LONGEST: usize = HEADER_LEN + 14 + 4 + 65536;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The other end has it.
    Passed,
    /// The other end had no room for it.
    Dropped,
    /// It is malformed.
    Refused,
}

/// Sends and counts a frame, header first.
///
/// # Safety
/// The memory behind `frame` is mapped.
pub(crate) unsafe fn send(queue: &dyn FrameQueue, frame: &[IoVec], metrics: &Direction) -> Sent {
    let len = IoVec::total(frame);
    if !(HEADER_LEN..=LONGEST).contains(&len) {
        metrics.refuse_one();
        return Sent::Refused;
    }
    // SAFETY: the caller's promise.
    match unsafe { queue.writev(frame) } {
        Ok(_) => {
            metrics.passed(len - HEADER_LEN);
            Sent::Passed
        }
        Err(error) if has_no_room(&error) => {
            metrics.drop_one();
            Sent::Dropped
        }
        Err(_) => {
            metrics.refuse_one();
            Sent::Refused
        }
    }
}

fn has_no_room(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM)
    )
}
