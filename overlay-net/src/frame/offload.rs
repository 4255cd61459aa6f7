//! What is left to do for a frame: its checksum, its segmentation.

use thiserror::Error;

/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const OFFLOAD_BYTES: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What a frame's sender left to be done, and what is known about it. The
/// facts of `struct virtio_net_hdr`, checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum that has not been computed.
    pub checksum: Option<Checksum>,
    /// All checksums have been verified, or never left a machine's memory.
    pub valid: bool,
    /// The frame stands for several.
    pub segments: Option<Segments>,
}

/// A checksum to compute: over everything from `start`, into two bytes
/// `offset` after it, where the pseudo header's sum is already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Bytes from the frame's start to the transport header.
    pub start: u16,
    /// Bytes from there to the checksum.
    pub offset: u16,
}

/// How a frame is to be cut, by whoever can only take small ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// What it is.
    pub kind: Kind,
    /// Its TCP segments carry congestion marks: only the first has CWR.
    pub ecn: bool,
    /// Bytes of all headers, as far as its sender tells; never trusted, the
    /// headers tell.
    pub header: u16,
    /// Bytes of payload in each segment but the last; not 0.
    pub size: u16,
}

/// A large frame's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// Several UDP datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
    /// One UDP datagram, to be fragmented by IP (`VIRTIO_NET_HDR_GSO_UDP`).
    Fragments,
}

/// An offload header that says nothing sensible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("offload header: {0}")]
pub struct Wrong(&'static str);

impl Offload {
    /// From a `virtio_net_hdr_v1` (little endian), for a frame of `len` bytes.
    /// `num_buffers` is not looked at.
    ///
    /// # Errors
    ///
    /// Unknown segmentation, a segment size of 0, or a checksum outside the
    /// frame.
    pub fn from_virtio(header: &[u8; OFFLOAD_BYTES], len: usize) -> Result<Self, Wrong> {
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let [flags, gso, ..] = *header;
        let checksum = if flags & NEEDS_CSUM == 0 {
            None
        } else {
            let (start, offset) = (word(6), word(8));
            if usize::from(start) + usize::from(offset) + 2 > len {
                return Err(Wrong("its checksum is outside the frame"));
            }
            Some(Checksum { start, offset })
        };
        let kind = match gso & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(Kind::Tcp4),
            GSO_TCPV6 => Some(Kind::Tcp6),
            GSO_UDP_L4 => Some(Kind::Udp),
            GSO_UDP => Some(Kind::Fragments),
            _ => return Err(Wrong("no known kind of segmentation")),
        };
        let segments = match kind {
            None => None,
            Some(_) if word(4) == 0 => return Err(Wrong("segments of no bytes")),
            // Linux computes the checksums of all segments from the first.
            Some(kind) if checksum.is_none() && kind != Kind::Fragments => {
                return Err(Wrong("segments without a checksum to compute"));
            }
            Some(kind) => Some(Segments {
                kind,
                ecn: gso & GSO_ECN != 0,
                header: word(2),
                size: word(4),
            }),
        };
        Ok(Self {
            checksum,
            valid: flags & DATA_VALID != 0,
            segments,
        })
    }

    /// As a `virtio_net_hdr_v1` with one buffer.
    #[must_use]
    pub fn to_virtio(&self) -> [u8; OFFLOAD_BYTES] {
        let mut header = [0; OFFLOAD_BYTES];
        let mut put = |at: usize, word: u16| {
            header[at..at + 2].copy_from_slice(&word.to_le_bytes());
        };
        let mut flags = 0;
        if let Some(checksum) = self.checksum {
            flags = NEEDS_CSUM;
            put(6, checksum.start);
            put(8, checksum.offset);
        } else if self.valid {
            flags = DATA_VALID;
        }
        let mut gso = GSO_NONE;
        if let Some(segments) = self.segments {
            gso = match segments.kind {
                Kind::Tcp4 => GSO_TCPV4,
                Kind::Tcp6 => GSO_TCPV6,
                Kind::Udp => GSO_UDP_L4,
                Kind::Fragments => GSO_UDP,
            };
            gso |= if segments.ecn { GSO_ECN } else { 0 };
            put(2, segments.header);
            put(4, segments.size);
        }
        put(10, 1);
        header[0] = flags;
        header[1] = gso;
        header
    }

    /// The header's places after `by` bytes were put in (or, negative, taken
    /// out) before the transport header. None if they are no longer in range.
    #[must_use]
    pub fn moved(mut self, by: i16) -> Option<Self> {
        if let Some(checksum) = &mut self.checksum {
            checksum.start = checksum.start.checked_add_signed(by)?;
        }
        if let Some(segments) = &mut self.segments {
            segments.header = segments.header.saturating_add_signed(by);
        }
        Some(self)
    }
}
