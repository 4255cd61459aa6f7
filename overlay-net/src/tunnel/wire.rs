//! Tunnel datagrams, byte by byte. Numbers are in network order.
//!
//! Every datagram begins with
//!
//! | bytes | |
//! |---|---|
//! | 0 | type: 1 initiation, 2 response, 3 cookie, 4 data |
//! | 1 | version: 1 |
//! | 2-3 | 0 |
//!
//! **Data** (4): a header of 16 bytes and what is sealed.
//!
//! | bytes | |
//! |---|---|
//! | 4-7 | the session, by the receiver's number for it |
//! | 8-15 | counter: also the nonce's last 8 bytes (the first 4 are 0) |
//! | 16- | sealed records |
//! | last 16 | tag |
//!
//! Nothing but the type, the session and the counter can be read on the way,
//! and nothing of the header needs to be authenticated on its own: the session
//! names the key, the counter is the nonce, all other bits must be as above.
//!
//! **Records**: each begins with 16 bytes, and there may be several in a
//! datagram. None: it only tells that the sender is there.
//!
//! | bytes | |
//! |---|---|
//! | 0 | kind: 0 padding, 1 frame, 2 chunk, 3 probe, 4 answer to a probe |
//! | 1 | a chunk's index, else 0 |
//! | 2 | what is left to do: 1 checksum, 2 checksums are verified, 4 congestion marks; bits 4-6: segmentation (0 none, 1 TCP/IPv4, 2 TCP/IPv6, 3 UDP, 4 IP fragments) |
//! | 3-5 | VNI |
//! | 6-8 | length of the frame (of the whole one, if this is a chunk), or of what follows |
//! | 9 | checksum's place, from where summing begins |
//! | 10-11 | where summing begins, from the frame's start |
//! | 12-13 | payload of each segment |
//! | 14-15 | length of the frame's headers, a hint |
//!
//! - Padding: it and all that follows means nothing.
//! - Frame: the whole of it follows, then perhaps another record.
//! - Chunk: the rest of the datagram is the `index`th piece of a frame. All
//!   pieces have the same size, the last one is filled up with zeros. Pieces
//!   of a frame have consecutive counters, so that `counter - index` names it.
//! - Probe: 16 bytes follow: a number, and 8 bytes of 0; then perhaps padding,
//!   when it is about the datagram's size.
//! - Answer: 16 bytes follow: the probe's number, and how many data datagrams
//!   have come on the path it came on.
//!
//! Handshakes are Noise `IKpsk2_25519_ChaChaPoly_SHA256` with the prologue
//! `blanket tunnel 1`.
//!
//! **Initiation** (1), 160 bytes:
//!
//! | bytes | |
//! |---|---|
//! | 4-7 | the initiator's number for the session |
//! | 8-127 | Noise's first message: 32 ephemeral key, 48 static key, 40 payload |
//! | 128-143 | MAC 1: who sends this knows the responder's public key |
//! | 144-159 | MAC 2: who sends this can receive at its address; 0 without a cookie |
//!
//! Its payload: 0-1 and 2-3 what AES-256-GCM and ChaCha20-Poly1305 cost the
//! initiator (any unit, the same for both), 4-7 0, 8-15 a number that grows
//! with every initiation (nanoseconds since 1970), 16-23 0.
//!
//! **Response** (2), 100 bytes:
//!
//! | bytes | |
//! |---|---|
//! | 4-7 | the responder's number for the session |
//! | 8-11 | the initiator's |
//! | 12-67 | Noise's second message: 32 ephemeral key, 24 payload |
//! | 68-83, 84-99 | MACs as above |
//!
//! Its payload: 0 the cipher (1 AES-256-GCM, 2 ChaCha20-Poly1305), 1-7 0.
//!
//! **Cookie** (3), 56 bytes, instead of a response, from who is busy:
//!
//! | bytes | |
//! |---|---|
//! | 4-7 | the session's number in what is answered |
//! | 8-23 | random |
//! | 24-55 | the cookie, sealed with a key from the public key of who sends it, MAC 1 of what is answered, and the random bytes |

use crate::drops::Reason;
use crate::frame::{Checksum, Kind as Segmentation, Offload, Segments, Vni};

/// Bytes before what is sealed.
pub const HEADER: usize = 16;
/// Bytes of a tag, after what is sealed.
pub const TAG: usize = 16;
/// Bytes of a record's header.
pub const RECORD: usize = 16;
/// Bytes of each datagram that are not a frame's.
pub const OVERHEAD: usize = HEADER + RECORD + TAG;
/// Bytes of an initiation.
pub const INITIATION: usize = 160;
/// Bytes of a response.
pub const RESPONSE: usize = 100;
/// Bytes of a cookie.
pub const COOKIE: usize = 56;
/// Bytes of a probe or an answer, after the record's header.
pub const PROBE: usize = 16;
/// Bytes of a frame at most.
pub const MAX_FRAME: usize = 65_536 + 64;
/// Chunks of a frame at most.
pub const MAX_CHUNKS: usize = 64;
/// Bytes of a datagram that every path must take (IPv6's least MTU is 1280;
/// as QUIC's, RFC 9000, 14).
pub const MIN_DATAGRAM: usize = 1200;
/// Bytes of a chunk at least, if there are several: a frame's head is in one.
pub const MIN_CHUNK: usize = 256;

const VERSION: u8 = 1;

/// What a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram {
    /// The first message of a handshake.
    Initiation {
        /// The sender's number for the session.
        sender: u32,
    },
    /// The second.
    Response {
        /// The sender's number for the session.
        sender: u32,
        /// The receiver's.
        receiver: u32,
    },
    /// Instead of a response: come again with this.
    Cookie {
        /// The receiver's number for the session.
        receiver: u32,
    },
    /// Sealed records.
    Data {
        /// The receiver's number for the session.
        receiver: u32,
        /// The datagram's number in the session.
        counter: u64,
    },
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A number of 8 bytes.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl Datagram {
    /// Reads what can be read without keys. `None`: no datagram of a tunnel.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        if rest.get(..3)? != [VERSION, 0, 0] {
            return None;
        }
        match (kind, bytes.len()) {
            (1, INITIATION) => Some(Self::Initiation {
                sender: u32_at(bytes, 4)?,
            }),
            (2, RESPONSE) => Some(Self::Response {
                sender: u32_at(bytes, 4)?,
                receiver: u32_at(bytes, 8)?,
            }),
            (3, COOKIE) => Some(Self::Cookie {
                receiver: u32_at(bytes, 4)?,
            }),
            (4, HEADER..) if bytes.len() >= HEADER + TAG => Some(Self::Data {
                receiver: u32_at(bytes, 4)?,
                counter: u64_at(bytes, 8)?,
            }),
            _ => None,
        }
    }

    /// Its first bytes; how many there are.
    pub(super) fn write(self, to: &mut [u8; HEADER]) -> usize {
        let (kind, words) = match self {
            Self::Initiation { sender } => (1, [Some(sender), None, None]),
            Self::Response { sender, receiver } => (2, [Some(sender), Some(receiver), None]),
            Self::Cookie { receiver } => (3, [Some(receiver), None, None]),
            Self::Data { receiver, counter } => (
                4,
                [
                    Some(receiver),
                    Some((counter >> 32) as u32),
                    Some(counter as u32),
                ],
            ),
        };
        to[..4].copy_from_slice(&[kind, VERSION, 0, 0]);
        let mut at = 4;
        for word in words.into_iter().flatten() {
            to[at..at + 4].copy_from_slice(&word.to_be_bytes());
            at += 4;
        }
        at
    }
}

/// What a frame's records say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its network.
    pub vni: Vni,
    /// Its bytes.
    pub len: usize,
    /// What is left to do for it.
    pub offload: Offload,
}

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The rest means nothing.
    Padding,
    /// A frame follows.
    Frame(Facts),
    /// The rest is a piece of a frame.
    Chunk(Facts, u8),
    /// A probe follows.
    Probe,
    /// An answer to one.
    Answer,
}

impl Facts {
    /// Checks what a frame's sender says of it.
    ///
    /// # Errors
    ///
    /// It cannot be told on the wire.
    pub fn of(vni: Vni, len: usize, offload: Offload) -> Result<Self, Reason> {
        if len > MAX_FRAME {
            return Err(Reason::TooBig);
        }
        let facts = Self { vni, len, offload };
        if facts.sound() {
            Ok(facts)
        } else {
            Err(Reason::Offload)
        }
    }

    fn sound(&self) -> bool {
        let summed = self.offload.checksum.is_none_or(|sum| {
            sum.offset <= 255 && usize::from(sum.start) + usize::from(sum.offset) + 2 <= self.len
        });
        summed
            && self.offload.segments.is_none_or(|segments| {
                segments.size > 0
                    && (self.offload.checksum.is_some() || segments.kind == Segmentation::Fragments)
            })
    }
}

fn put24(to: &mut [u8], number: usize) {
    to.copy_from_slice(&(number as u32).to_be_bytes()[1..]);
}

fn get24(from: &[u8]) -> u32 {
    from.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

impl Record {
    /// Its bytes.
    #[must_use]
    pub fn write(&self) -> [u8; RECORD] {
        let mut to = [0; RECORD];
        let (facts, index) = match self {
            Self::Padding => return to,
            Self::Probe | Self::Answer => {
                to[0] = if *self == Self::Probe { 3 } else { 4 };
                put24(&mut to[6..9], PROBE);
                return to;
            }
            Self::Frame(facts) => {
                to[0] = 1;
                (facts, 0)
            }
            Self::Chunk(facts, index) => {
                to[0] = 2;
                (facts, *index)
            }
        };
        to[1] = index;
        put24(&mut to[3..6], facts.vni.number() as usize);
        put24(&mut to[6..9], facts.len);
        let offload = &facts.offload;
        to[2] = u8::from(offload.valid) << 1;
        if let Some(sum) = offload.checksum {
            to[2] |= 1;
            to[9] = sum.offset as u8;
            to[10..12].copy_from_slice(&sum.start.to_be_bytes());
        }
        if let Some(segments) = offload.segments {
            let kind = match segments.kind {
                Segmentation::Tcp4 => 1,
                Segmentation::Tcp6 => 2,
                Segmentation::Udp => 3,
                Segmentation::Fragments => 4,
            };
            to[2] |= u8::from(segments.ecn) << 2 | kind << 4;
            to[12..14].copy_from_slice(&segments.size.to_be_bytes());
            to[14..16].copy_from_slice(&segments.header.to_be_bytes());
        }
        to
    }

    /// Reads the first record and what belongs to it; what comes afterwards.
    ///
    /// # Errors
    ///
    /// It is cut off or contradicts itself.
    pub fn split(bytes: &mut [u8]) -> Result<(Self, &mut [u8], &mut [u8]), Reason> {
        let wrong = Reason::Malformed;
        if bytes.first() == Some(&0) {
            return Ok((Self::Padding, &mut [], &mut []));
        }
        let (header, rest) = bytes.split_first_chunk_mut::<RECORD>().ok_or(wrong)?;
        let len = get24(&header[6..9]) as usize;
        let record = match header[0] {
            1 => Self::Frame(facts(header)?),
            2 => {
                let facts = facts(header)?;
                let (size, index) = (rest.len(), usize::from(header[1]));
                let sound = index < MAX_CHUNKS
                    && size >= MIN_CHUNK
                    && index * size < facts.len
                    && facts.len <= size * MAX_CHUNKS;
                if !sound {
                    return Err(wrong);
                }
                return Ok((Self::Chunk(facts, header[1]), rest, &mut []));
            }
            3 | 4 if len != PROBE => return Err(wrong),
            3 => Self::Probe,
            4 => Self::Answer,
            _ => return Err(wrong),
        };
        let (body, rest) = rest.split_at_mut_checked(len).ok_or(wrong)?;
        Ok((record, body, rest))
    }
}

fn facts(header: &[u8; RECORD]) -> Result<Facts, Reason> {
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let flags = header[2];
    let kind = match flags >> 4 {
        0 => None,
        1 => Some(Segmentation::Tcp4),
        2 => Some(Segmentation::Tcp6),
        3 => Some(Segmentation::Udp),
        4 => Some(Segmentation::Fragments),
        _ => return Err(Reason::Malformed),
    };
    let offload = Offload {
        checksum: (flags & 1 != 0).then(|| Checksum {
            start: word(10),
            offset: header[9].into(),
        }),
        valid: flags & 2 != 0,
        segments: kind.map(|kind| Segments {
            kind,
            ecn: flags & 4 != 0,
            header: word(14),
            size: word(12),
        }),
    };
    // 24 bits are never too many for a VNI.
    let vni = Vni::new(get24(&header[3..6])).ok_or(Reason::Malformed)?;
    Facts::of(vni, get24(&header[6..9]) as usize, offload)
}
