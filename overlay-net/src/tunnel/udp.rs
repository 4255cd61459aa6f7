//! What VXLAN and Geneve have in common.

use crate::drops::Reason;
use crate::frame::Frame;

/// The outer UDP source port of a flow: so that what spreads flows over links
/// tells them apart (RFC 7348, 5: of the dynamic ports).
#[must_use]
pub fn source_port(flow: u32) -> u16 {
    let mixed = (flow ^ flow >> 16) as u16;
    0xc000 | mixed & 0x3fff
}

/// Copies a frame out, and does what is left to do for its checksum; how many
/// bytes.
pub(super) fn copy(frame: &Frame<'_>, to: &mut [u8]) -> Result<usize, Reason> {
    if frame.offload.segments.is_some() {
        return Err(Reason::TooBig);
    }
    let len = frame.len();
    let to = to.get_mut(..len).ok_or(Reason::TooBig)?;
    // The body may change, but not its length.
    frame.copy_from(0, to);
    if let Some(checksum) = frame.offload.checksum {
        let (start, offset) = (usize::from(checksum.start), usize::from(checksum.offset));
        let covered = to.get_mut(start..).ok_or(Reason::Offload)?;
        let sum = sum(covered);
        let place = covered.get_mut(offset..offset + 2).ok_or(Reason::Offload)?;
        // 0 says that there is none, in UDP; the other zero is as good in TCP.
        let sum = if sum == 0 { 0xffff } else { sum };
        place.copy_from_slice(&sum.to_be_bytes());
    }
    Ok(len)
}

fn sum(bytes: &[u8]) -> u16 {
    let (words, last) = bytes.as_chunks::<2>();
    let words = words
        .iter()
        .map(|word| u64::from(u16::from_be_bytes(*word)));
    let mut sum: u64 = words.sum();
    sum += last.first().map_or(0, |byte| u64::from(*byte) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
