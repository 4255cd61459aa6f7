//! What offloads leave undone, done: for receivers that do not take large
//! frames or blank checksums.

use std::net::IpAddr;

use vm_memory::VolatileSlice;

use super::copy;
use super::key::{self, ethertype, protocol};
use super::{Checksum, Frame, Head, Kind, Layers, Offload, PortId, Vni};
use crate::drops::Reason;

/// Pieces of a frame's body at most.
pub const PIECES: usize = 64;

/// Segments of one frame at most: of 64 KiB, with the shortest that Linux
/// sends.
const MOST: usize = 2048;

/// The flags of TCP that not all segments have.
const FIN_PSH: u8 = 1 | 8;
const CWR: u8 = 0x80;

/// A frame's body as a list of a fixed size.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a> {
    list: [VolatileSlice<'a>; PIECES],
    start: usize,
    len: usize,
}

impl Default for Pieces<'_> {
    fn default() -> Self {
        Self {
            list: [VolatileSlice::from(&mut [][..]); PIECES],
            start: 0,
            len: 0,
        }
    }
}

impl<'a> Pieces<'a> {
    /// Adds a piece; false if there are too many.
    pub fn push(&mut self, piece: VolatileSlice<'a>) -> bool {
        let Some(place) = self.list.get_mut(self.len) else {
            return false;
        };
        *place = piece;
        self.len += 1;
        true
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        (self.start, self.len) = (0, 0);
    }

    /// Takes the first bytes out, copied into `to`; how many there were.
    pub fn take(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() && self.start < self.len {
            let piece = &mut self.list[self.start];
            let len = copy::to_bytes(piece, &mut to[done..]);
            done += len;
            match piece.offset(len) {
                Ok(rest) if !rest.is_empty() => *piece = rest,
                _ => self.start += 1,
            }
        }
        done
    }

    /// The pieces.
    #[must_use]
    pub fn list(&self) -> &[VolatileSlice<'a>] {
        &self.list[self.start..self.len]
    }
}

/// The Internet's checksum (RFC 1071), begun.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Of words in the order in which their bytes lie in memory, little endian.
    sum: u64,
    /// The next byte is a word's second.
    odd: bool,
}

impl Sum {
    /// Adds bytes.
    pub fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first) << 8;
            self.odd = false;
            bytes = rest;
        }
        let (words, rest) = bytes.as_chunks::<4>();
        // 64 KiB of words are far from an overflow; each call folds.
        self.sum += words
            .iter()
            .map(|word| u64::from(u32::from_le_bytes(*word)))
            .sum::<u64>();
        for (i, byte) in rest.iter().enumerate() {
            self.sum += u64::from(*byte) << (8 * (i % 2));
        }
        self.odd = rest.len() % 2 == 1;
        self.sum = (self.sum & 0xffff_ffff) + (self.sum >> 32);
    }

    /// Adds a number of 16 bits.
    pub fn add_word(&mut self, word: u16) {
        self.add(&word.to_be_bytes());
    }

    /// The sum, as it stands in a pseudo header's place.
    #[must_use]
    pub fn folded(self) -> [u8; 2] {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_le_bytes()
    }

    /// The checksum; never 0, which says in UDP that there is none.
    #[must_use]
    pub fn checksum(self) -> [u8; 2] {
        match self.folded().map(|byte| !byte) {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        }
    }

    /// Adds a frame's bytes from `offset` on, wherever they lie.
    pub fn add_frame(&mut self, frame: &Frame<'_>, offset: usize) {
        self.add(frame.head.bytes().get(offset..).unwrap_or_default());
        let mut buffer = [0; 1024];
        for mut piece in frame.body_from(offset) {
            while !piece.is_empty() {
                let len = piece.copy_to(&mut buffer[..]);
                self.add(&buffer[..len]);
                let Ok(rest) = piece.offset(len) else {
                    break;
                };
                piece = rest;
            }
        }
    }
}

/// Computes the checksum that was left to do.
///
/// # Errors
///
/// [`Reason::Offload`]: its place is not in the head. Nothing is changed.
pub fn finish_checksum(frame: &mut Frame<'_>) -> Result<(), Reason> {
    let Some(checksum) = frame.offload.checksum else {
        return Ok(());
    };
    let start = usize::from(checksum.start);
    let place = start + usize::from(checksum.offset);
    if place + 2 > frame.head.bytes().len() {
        return Err(Reason::Offload);
    }
    let mut sum = Sum::default();
    sum.add_frame(frame, start);
    frame.head.bytes_mut()[place..place + 2].copy_from_slice(&sum.checksum());
    frame.offload.checksum = None;
    frame.offload.valid = true;
    Ok(())
}

/// Cuts a large frame into the small ones that it stands for, one at a time.
///
/// ```text
/// while let Some(small) = segments.next() { port.send(&small) }
/// ```
///
/// Their heads are copies with the headers set right; their bodies are parts
/// of the large one's.
#[derive(Debug)]
pub struct Segmenter<'f, 'a> {
    frame: &'f Frame<'a>,
    kind: Kind,
    layers: Layers,
    addresses: (IpAddr, IpAddr),
    /// Payload of a segment, and of all.
    size: usize,
    total: usize,
    /// Payload that is done with, and segments.
    done: usize,
    count: u16,
    finish: bool,
    pieces: Pieces<'a>,
}

impl<'f, 'a> Segmenter<'f, 'a> {
    /// For a frame whose offload says how to cut it. With `finish`, checksums
    /// are computed, else left to do.
    ///
    /// # Errors
    ///
    /// [`Reason::Offload`]: it is not what its offload says, or would be very
    /// many; [`Reason::TooBig`]: its segments are longer than `max_frame`.
    pub fn new(frame: &'f Frame<'a>, max_frame: usize, finish: bool) -> Result<Self, Reason> {
        let segments = frame.offload.segments.ok_or(Reason::Offload)?;
        let len = frame.len();
        let (key, layers) = key::parse(frame.head.bytes(), len, PortId::default(), Vni::default())
            .map_err(|_| Reason::Malformed)?;
        let fits = match segments.kind {
            Kind::Tcp4 => (ethertype::IPV4, protocol::TCP) == (key.ethertype, key.protocol),
            Kind::Tcp6 => (ethertype::IPV6, protocol::TCP) == (key.ethertype, key.protocol),
            Kind::Udp => key.protocol == protocol::UDP,
            Kind::Fragments => false,
        };
        let size = usize::from(segments.size);
        let total = len.saturating_sub(layers.payload);
        let known = key.fragment.is_none()
            && layers.payload != 0
            && layers.payload <= frame.head.bytes().len();
        if !fits || !known || size == 0 || total.div_ceil(size) > MOST {
            return Err(Reason::Offload);
        }
        if layers.payload + size.min(total) > max_frame {
            return Err(Reason::TooBig);
        }
        Ok(Self {
            frame,
            kind: segments.kind,
            layers,
            addresses: key.ip.ok_or(Reason::Offload)?,
            size,
            total,
            done: 0,
            count: 0,
            finish,
            pieces: Pieces::default(),
        })
    }

    /// The next segment.
    #[expect(
        clippy::should_implement_trait,
        reason = "what it returns borrows from it, which no iterator's may"
    )]
    pub fn next(&mut self) -> Option<Frame<'_>> {
        // One without payload is one.
        if self.count > 0 && self.done >= self.total {
            return None;
        }
        let len = self.size.min(self.total - self.done);
        let mut head = self.cut(len);
        let tcp = self.kind != Kind::Udp;
        self.fill(&mut head, len, tcp);
        self.done += len;
        self.count = self.count.wrapping_add(1);
        let mut small = Frame {
            head,
            body: self.pieces.list(),
            offload: Offload {
                checksum: Some(Checksum {
                    start: self.layers.transport as u16,
                    offset: if tcp { 16 } else { 6 },
                }),
                valid: false,
                segments: None,
            },
        };
        // Its place is within the headers, which are in the head.
        if self.finish && finish_checksum(&mut small).is_err() {
            return None;
        }
        Some(small)
    }

    /// The headers and what of the next `len` bytes of payload lies in the
    /// large frame's head; the rest becomes `pieces`.
    fn cut(&mut self, len: usize) -> Head {
        let bytes = self.frame.head.bytes();
        let headers = self.layers.payload;
        let from = headers + self.done;
        let inside = bytes.get(from..).unwrap_or_default();
        let inside = &inside[..inside.len().min(len)];
        let mut head = Head::default();
        // All of it comes from one head.
        let room = head.wide_room(headers + inside.len());
        let (first, second) = room.split_at_mut(headers);
        first.copy_from_slice(&bytes[..headers]);
        second.copy_from_slice(inside);
        self.pieces.clear();
        let mut left = len - inside.len();
        for piece in self.frame.body_from(from + inside.len()) {
            if left == 0 {
                break;
            }
            let part = piece.len().min(left);
            if let Ok(part) = piece.subslice(0, part) {
                // Not more than the large frame has.
                self.pieces.push(part);
            }
            left -= part;
        }
        head
    }

    /// Sets the headers of the segment with `len` bytes of payload right, but
    /// for the sum over its transport header and payload.
    fn fill(&self, head: &mut Head, len: usize, tcp: bool) {
        let last = self.done + len >= self.total;
        let Layers {
            network,
            transport,
            payload,
        } = self.layers;
        let end = payload + len;
        let bytes = head.bytes_mut();
        let mut put = |at: usize, word: u16| {
            bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
        };
        let mut sum = Sum::default();
        match self.addresses {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                put(network + 2, (end - network) as u16);
                put(network + 10, 0);
                let id = u16::from_be_bytes([bytes[network + 4], bytes[network + 5]]);
                let id = id.wrapping_add(self.count).to_be_bytes();
                bytes[network + 4..network + 6].copy_from_slice(&id);
                let mut ip = Sum::default();
                let header = usize::from(bytes[network] & 15) * 4;
                ip.add(&bytes[network..network + header]);
                let ip = ip.folded().map(|byte| !byte);
                bytes[network + 10..network + 12].copy_from_slice(&ip);
                sum.add(&src.octets());
                sum.add(&dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                put(network + 4, (end - network - 40) as u16);
                sum.add(&src.octets());
                sum.add(&dst.octets());
            }
            // Both are of one version: they come from one header.
            _ => {}
        }
        let length = (end - transport) as u16;
        sum.add_word(length);
        let place = if tcp {
            sum.add_word(protocol::TCP.into());
            let at = transport + 4;
            let mut number = [0; 4];
            number.copy_from_slice(&bytes[at..at + 4]);
            let number = u32::from_be_bytes(number).wrapping_add(self.done as u32);
            bytes[at..at + 4].copy_from_slice(&number.to_be_bytes());
            let flags = &mut bytes[transport + 13];
            *flags &= !if last { 0 } else { FIN_PSH };
            *flags &= !if self.count == 0 { 0 } else { CWR };
            transport + 16
        } else {
            sum.add_word(protocol::UDP.into());
            bytes[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
            transport + 6
        };
        bytes[place..place + 2].copy_from_slice(&sum.folded());
    }
}

#[cfg(test)]
mod tests;
