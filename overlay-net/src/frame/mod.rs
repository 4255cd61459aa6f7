//! A frame on its way through the switch.

use std::fmt;

use vm_memory::VolatileSlice;

pub(crate) mod copy;
pub mod key;
mod offload;
mod segment;
#[cfg(test)]
mod tests;

pub use key::{Arp, Key, Layers, Malformed, Tag, parse};
pub use offload::{Checksum, Kind, OFFLOAD_BYTES, Offload, Segments};
pub use segment::{PIECES, Pieces, Segmenter, Sum, finish_checksum};

/// A port of the switch, as a number: 1.. in the order of creation, never used
/// again while the switch runs.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct PortId(pub u32);

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A network: its identifier on the wire (24 bits, as in RFC 7348). Frames
/// never go from one to another.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// The greatest.
    pub const MAX: u32 = 0xff_ffff;

    /// `None` if it is more than 24 bits.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number <= Self::MAX {
            Some(Self(number))
        } else {
            None
        }
    }

    /// As a number of 24 bits.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("a VNI is at most {}, not {number}", Self::MAX))
    }
}

impl std::str::FromStr for Vni {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse::<u32>().map_err(|error| error.to_string())?;
        Self::try_from(number)
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A MAC address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// To several stations, or all.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether a station may send from it.
    #[must_use]
    pub fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no MAC address: six bytes as in 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl serde::Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes of a frame that are taken out of its port's memory at once, to decide
/// on and to change: enough for Ethernet, two tags, IPv6 with extensions, TCP
/// with options, and ARP or a neighbour's advertisement whole.
pub const HEAD: usize = 192;

/// Bytes before a head that tags may be pushed into.
const HEADROOM: usize = 32;

/// The first bytes of a frame, copied: all decisions are made on them, and
/// they are what is sent on.
#[derive(Clone)]
pub struct Head {
    bytes: [u8; HEADROOM + HEAD],
    start: u16,
    end: u16,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            bytes: [0; HEADROOM + HEAD],
            start: HEADROOM as u16,
            end: HEADROOM as u16,
        }
    }
}

impl Head {
    /// The first [`HEAD`] bytes of `bytes`, or all if they are fewer.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut head = Self::default();
        let len = bytes.len().min(HEAD);
        head.room(len).copy_from_slice(&bytes[..len]);
        head
    }

    /// Makes it `len` bytes (at most [`HEAD`]), to be written by the caller.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(HEAD);
        self.start = HEADROOM as u16;
        self.end = (HEADROOM + len) as u16;
        self.bytes_mut()
    }

    /// As [`Head::room`], with the headroom's bytes too if it takes them: for
    /// what was in a head that tags were pushed into.
    pub(crate) fn wide_room(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(HEADROOM + HEAD);
        self.start = HEADROOM.min(HEADROOM + HEAD - len) as u16;
        self.end = self.start + len as u16;
        self.bytes_mut()
    }

    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    /// What it holds, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    /// Opens a gap of `N` bytes at offset `at` and fills it: how a tag is
    /// pushed. False, and nothing changed, if the headroom is used up or `at`
    /// is beyond the end.
    pub fn insert<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> bool {
        let start = usize::from(self.start);
        if N > start || at > self.bytes().len() {
            return false;
        }
        self.bytes.copy_within(start..start + at, start - N);
        self.bytes[start - N + at..start + at].copy_from_slice(&bytes);
        self.start = (start - N) as u16;
        true
    }

    /// Takes `len` bytes out at offset `at`: how a tag is popped. False, and
    /// nothing changed, if they are not there.
    pub fn remove(&mut self, at: usize, len: usize) -> bool {
        let start = usize::from(self.start);
        if at
            .checked_add(len)
            .is_none_or(|end| end > self.bytes().len())
        {
            return false;
        }
        self.bytes.copy_within(start..start + at, start + len);
        self.start = (start + len) as u16;
        true
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", self.bytes())
    }
}

/// A frame: Ethernet, without its checksum, with what is left to be done for
/// it by whoever takes it over.
#[derive(Clone, Debug, Default)]
pub struct Frame<'a> {
    /// The first bytes.
    pub head: Head,
    /// The rest, where it lies: a guest's memory, which it may change at any
    /// time, or a buffer.
    pub body: &'a [VolatileSlice<'a>],
    /// Checksums and segmentation that are left to do.
    pub offload: Offload,
}

impl<'a> Frame<'a> {
    /// Bytes, without offload header.
    #[must_use]
    pub fn len(&self) -> usize {
        let body: usize = self.body.iter().map(VolatileSlice::len).sum();
        self.head.bytes().len() + body
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes but the head, piece by piece, without those before `offset`
    /// (counted from the frame's start; at least the head's length).
    pub fn body_from(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'a>> + '_ {
        let mut skip = offset.saturating_sub(self.head.bytes().len());
        self.body.iter().filter_map(move |piece| {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            piece.offset(skipped).ok().filter(|rest| !rest.is_empty())
        })
    }

    /// Copies the bytes from `offset` on into `to`; how many there were.
    pub fn copy_from(&self, offset: usize, to: &mut [u8]) -> usize {
        let head = self.head.bytes().get(offset..).unwrap_or_default();
        let mut done = head.len().min(to.len());
        to[..done].copy_from_slice(&head[..done]);
        for piece in self.body_from(offset) {
            if done == to.len() {
                break;
            }
            done += piece.copy_to(&mut to[done..]);
        }
        done
    }

    /// All its bytes, copied.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        let len = self.copy_from(0, &mut bytes);
        bytes.truncate(len);
        bytes
    }
}
