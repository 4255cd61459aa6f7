//! Geneve (RFC 8926): a frame in a UDP datagram, behind 8 bytes and options.
//! No encryption.
//!
//! | bytes | |
//! |---|---|
//! | 0 | version (2 bits): 0; length of the options in words of 4 bytes (6) |
//! | 1 | 0x80: for the tunnel itself, no frame; 0x40: there are critical options |
//! | 2-3 | what it carries: 0x6558, Ethernet |
//! | 4-6 | VNI |
//! | 7 | 0, not looked at |
//! | 8- | options, each: class (2 bytes), type (0x80: critical), 3 bits of 0 and its length in words (5 bits), and that many words |
//!
//! No option is written, none is known: what has a critical one is dropped, as
//! the RFC demands, others are skipped. Frames are segmented before, to what
//! the path takes.

pub use super::udp::source_port;
use crate::drops::Reason;
use crate::frame::{Frame, Vni};

/// The UDP port.
pub const PORT: u16 = 6081;
/// Bytes before the frame, without options.
pub const HEADER: usize = 8;

const ETHERNET: [u8; 2] = [0x65, 0x58];
const CONTROL: u8 = 0x80;
const CRITICAL: u8 = 0x40;
const CRITICAL_TYPE: u8 = 0x80;

/// Writes a frame's datagram; its length.
///
/// # Errors
///
/// It does not fit into `to`, or was not segmented.
pub fn write(vni: Vni, frame: &Frame<'_>, to: &mut [u8]) -> Result<usize, Reason> {
    let (header, rest) = to.split_first_chunk_mut::<HEADER>().ok_or(Reason::TooBig)?;
    let [_, a, b, c] = vni.number().to_be_bytes();
    *header = [0, 0, ETHERNET[0], ETHERNET[1], a, b, c, 0];
    Ok(HEADER + super::udp::copy(frame, rest)?)
}

/// Reads a datagram: the frame's network, and the frame.
///
/// # Errors
///
/// It is cut off, of another version, carries no frame, or has a critical
/// option.
pub fn parse(datagram: &mut [u8]) -> Result<(Vni, &mut [u8]), Reason> {
    let wrong = Reason::Malformed;
    let (header, rest) = datagram.split_first_chunk_mut::<HEADER>().ok_or(wrong)?;
    let [first, flags, protocol @ .., _, _, _, _] = *header;
    let vni = Vni::new(u32::from_be_bytes([0, header[4], header[5], header[6]])).ok_or(wrong)?;
    if first >> 6 != 0 || flags & (CONTROL | CRITICAL) != 0 || protocol != ETHERNET {
        return Err(wrong);
    }
    let (options, frame) = rest
        .split_at_mut_checked(usize::from(first & 0x3f) * 4)
        .ok_or(wrong)?;
    let mut options = &*options;
    while let Some((option, more)) = options.split_first_chunk::<4>() {
        if option[2] & CRITICAL_TYPE != 0 {
            return Err(wrong);
        }
        let len = usize::from(option[3] & 0x1f) * 4;
        options = more.get(len..).ok_or(wrong)?;
    }
    Ok((vni, frame))
}
