//! VXLAN (RFC 7348): a frame in a UDP datagram, behind 8 bytes. No encryption.
//!
//! | bytes | |
//! |---|---|
//! | 0 | flags: 8, there is a VNI |
//! | 1-3 | 0, not looked at |
//! | 4-6 | VNI |
//! | 7 | 0, not looked at |
//!
//! Frames are segmented before, to what the path takes.

pub use super::udp::source_port;
use crate::drops::Reason;
use crate::frame::{Frame, Vni};

/// The UDP port.
pub const PORT: u16 = 4789;
/// Bytes before the frame.
pub const HEADER: usize = 8;

const HAS_VNI: u8 = 8;

/// Writes a frame's datagram; its length.
///
/// # Errors
///
/// It does not fit into `to`, or was not segmented.
pub fn write(vni: Vni, frame: &Frame<'_>, to: &mut [u8]) -> Result<usize, Reason> {
    let (header, rest) = to.split_first_chunk_mut::<HEADER>().ok_or(Reason::TooBig)?;
    let [_, a, b, c] = vni.number().to_be_bytes();
    *header = [HAS_VNI, 0, 0, 0, a, b, c, 0];
    Ok(HEADER + super::udp::copy(frame, rest)?)
}

/// Reads a datagram: the frame's network, and the frame.
///
/// # Errors
///
/// It is cut off, or has no VNI.
pub fn parse(datagram: &mut [u8]) -> Result<(Vni, &mut [u8]), Reason> {
    let (header, frame) = datagram
        .split_first_chunk_mut::<HEADER>()
        .ok_or(Reason::Malformed)?;
    let [flags, _, _, _, a, b, c, _] = *header;
    let vni = Vni::new(u32::from_be_bytes([0, a, b, c]));
    match vni {
        Some(vni) if flags & HAS_VNI != 0 => Ok((vni, frame)),
        _ => Err(Reason::Malformed),
    }
}
