//! The frames on a migration's streams.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | kind |
//! | 4 | CRC-32 of the payload |
//! | 8 | length of the payload |
//! | 4 | CRC-32 of the above |
//! | ... | payload |
//!
//! Numbers are little-endian. A reader believes nothing: lengths are bounded
//! before they are allocated, and a frame with a wrong checksum is an error.

use std::io::{self, Read, Write};

use blanket_memory::dirty::PAGE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The protocol's version. Both ends must have the same.
pub const VERSION: u32 = 5;
/// Most bytes of memory, or of a disk, in one frame.
pub const MOST_MEMORY: usize = 256 << 10;
/// Longest payload of a frame that is not memory.
const MOST_OTHER: u64 = 64 << 20;
/// Bytes of a frame's header.
pub(crate) const HEADER: usize = 20;
/// What precedes the memory of a [`Kind::Pages`] frame: where it belongs.
pub const PLACE: usize = 8;
/// What precedes the bytes of a [`Kind::Blocks`] frame: on which disk, and where.
pub const BLOCK_PLACE: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First on the control stream, from the destination: [`Hello`].
    Hello,
    /// First on a data stream, from the destination: [`Join`].
    Join,
    /// From a destination that has lost its source at the switch-over: which
    /// session's outcome it wants to know.
    Ask,
    /// The source's answer to a hello: [`Offer`].
    Offer,
    /// The destination has a machine for the guest: [`Accepted`].
    Accept,
    /// An end does not go on; the payload says why.
    Abort,
    /// A guest-physical address, and the memory from there on.
    Pages,
    /// A guest-physical address, a length (4 bytes), and the memory from there on
    /// as a block of LZ4.
    Lz4,
    /// What has changed in pages: for each, its guest-physical address, the CRC-32
    /// of what it is now, the bytes of the change (2), and these: see `delta.rs`.
    Change,
    /// Ranges that are all zeros: pairs of address and length.
    Zeros,
    /// The number of a disk, an offset, and its bytes from there on.
    Blocks,
    /// Ranges of disks that are all zeros: triples of disk, offset and length.
    Holes,
    /// Which stripes of a disk's the destination is asked for: its number, an
    /// offset and a length.
    Compare,
    /// Their BLAKE3 hashes.
    Hashes,
    /// The destination makes durable what it has of the disks, and sends it back.
    Flush,
    /// What a replica has got of the disks is whole: [`crate::Point`]. It sends
    /// it back, empty, when that is durable, and a flush when it can go on.
    Point,
    /// The end of a round on this stream: its number. The destination sends it
    /// back when everything before it is in place.
    Sync,
    /// What all memory and all disks add up to, for comparison.
    Verify,
    /// The pages that follow the guest: [`blanket_memory::dirty::Pages`] as bytes.
    Missing,
    /// Ranges of disks that follow the guest: triples of disk, offset and length.
    Absent,
    /// From a destination whose memory or disks are not all there: [`Want`].
    Want,
    /// The same for what somebody waits for.
    Need,
    /// The destination has all memory, or all of the disks: [`Completed`]. The
    /// source sends it back.
    Complete,
    /// The machine's state.
    State,
    /// The destination could run the guest this instant: [`Restored`].
    Ready,
    /// The guest is the destination's.
    Commit,
    /// The guest runs there: [`Running`].
    Running,
    /// A network's frame that has come to the guest's old place: its interface and
    /// its queue in two bytes each, and the frame.
    Frame,
    /// No more of them come.
    Quiet,
}

impl Kind {
    const ALL: [(Self, [u8; 4]); 29] = [
        (Self::Hello, *b"helo"),
        (Self::Join, *b"join"),
        (Self::Ask, *b"ask?"),
        (Self::Offer, *b"ofer"),
        (Self::Accept, *b"acpt"),
        (Self::Abort, *b"abrt"),
        (Self::Pages, *b"page"),
        (Self::Lz4, *b"lz4p"),
        (Self::Change, *b"chng"),
        (Self::Zeros, *b"zero"),
        (Self::Blocks, *b"blok"),
        (Self::Holes, *b"hole"),
        (Self::Compare, *b"cmpr"),
        (Self::Hashes, *b"hash"),
        (Self::Flush, *b"flsh"),
        (Self::Point, *b"poin"),
        (Self::Sync, *b"sync"),
        (Self::Verify, *b"same"),
        (Self::Missing, *b"miss"),
        (Self::Absent, *b"absn"),
        (Self::Want, *b"want"),
        (Self::Need, *b"need"),
        (Self::Complete, *b"full"),
        (Self::State, *b"stat"),
        (Self::Ready, *b"redy"),
        (Self::Commit, *b"comm"),
        (Self::Running, *b"runs"),
        (Self::Frame, *b"fram"),
        (Self::Quiet, *b"quie"),
    ];

    fn bytes(self) -> [u8; 4] {
        let found = Self::ALL.iter().find(|(kind, _)| *kind == self);
        found.map_or(*b"none", |(_, bytes)| *bytes)
    }

    fn from_bytes(bytes: [u8; 4]) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|(_, known)| *known == bytes)
            .map(|(kind, _)| *kind)
    }

    fn longest(self) -> u64 {
        match self {
            Self::Pages | Self::Lz4 | Self::Change => (PLACE + MOST_MEMORY) as u64,
            Self::Blocks => (BLOCK_PLACE + MOST_MEMORY) as u64,
            Self::Zeros | Self::Holes | Self::Absent => MOST_MEMORY as u64,
            Self::State | Self::Offer | Self::Missing => MOST_OTHER,
            // The longest frame, with its header.
            Self::Frame => 66 << 10,
            _ => 64 << 10,
        }
    }
}

/// What the destination says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
}

/// Which of a session's data streams this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The session.
    pub session: [u8; 16],
    /// From 0 on; the one behind the last is for questions: see [`Kind::Ask`].
    /// [`FOLLOWS`] for memory and disks that follow the guest.
    pub index: u32,
}

/// [`Join::index`] of streams on which the destination asks for memory and disks.
pub const FOLLOWS: u32 = u32::MAX;

/// [`Want::of`] for memory.
pub const MEMORY: u64 = u64::MAX;

/// What a destination wants of what has not come yet. It is answered with
/// [`Kind::Zeros`] and [`Kind::Pages`], or [`Kind::Holes`] and [`Kind::Blocks`],
/// and a [`Kind::Sync`] behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The number of a disk, or [`MEMORY`].
    pub of: u64,
    /// Guest-physical address of the first page, or a disk's first byte.
    pub at: u64,
    /// Bytes, at most [`MOST_MEMORY`].
    pub len: u64,
    /// Bytes that are missing in all.
    pub left: u64,
    /// How often somebody had to wait so far.
    pub faults: u64,
}

impl Want {
    /// As it is sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 40] {
        let mut bytes = [0; 40];
        let numbers = [self.of, self.at, self.len, self.left, self.faults];
        for (place, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *place = number.to_le_bytes();
        }
        bytes
    }

    /// What was sent.
    ///
    /// # Errors
    /// It is none, or asks for parts of pages (but at a disk's end) or for too many.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let (&[of, at, len, left, faults], []) = bytes.as_chunks::<8>() else {
            return Err(Error::Damaged("a wish has another length"));
        };
        let [of, at, len, left, faults] = [of, at, len, left, faults].map(u64::from_le_bytes);
        // All of it in the address space.
        let parts = if of == MEMORY { at | len } else { at };
        let whole = at.checked_add(len).is_some() && parts.is_multiple_of(PAGE as u64);
        if !whole || len == 0 || len > MOST_MEMORY as u64 {
            return Err(Error::Damaged("a wish is for parts of pages"));
        }
        Ok(Self {
            of,
            at,
            len,
            left,
            faults,
        })
    }
}

/// What the source tells before anything is moved or stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`VERSION`].
    pub version: u32,
    /// Names this attempt, in which only these two ends take part.
    pub session: [u8; 16],
    /// Data streams that the destination is to open.
    pub streams: u32,
    /// Memory may follow the guest.
    pub follows: bool,
    /// The disks' content follows the guest, if the destination's can do with that.
    pub lazy: bool,
    /// The guest's memory: start and bytes of each region.
    pub regions: Vec<(u64, u64)>,
    /// Bytes of each disk whose content moves along.
    pub disks: Vec<u64>,
    /// What the machines have to have in common, and what is handed over; the
    /// monitors understand it.
    pub machine: Vec<u8>,
    /// Descriptors that come with it.
    pub descriptors: u32,
}

/// What a destination says that has all memory, or all of the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    /// It is about the disks.
    pub disks: bool,
    /// How often somebody had to wait for it.
    pub faults: u64,
}

/// What the destination has for the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Whether there are nothing but zeros on each disk.
    pub blank: Vec<bool>,
    /// Why no memory can follow the guest here.
    pub unable: Option<String>,
    /// The disks' content can follow it here.
    pub late: bool,
}

/// The destination's part of the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Microseconds that it took to restore the state.
    pub restore_us: u64,
}

/// The end of the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Microseconds from the commit to the running guest.
    pub resume_us: u64,
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other end is gone.
    #[error("the connection was cut")]
    Cut,
    /// What came is not what was sent, or not this protocol.
    #[error("the stream is damaged ({0})")]
    Damaged(&'static str),
    /// The other end gave up.
    #[error("{0}")]
    Aborted(String),
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Self::Cut,
            _ => Self::Io(error),
        }
    }
}

/// Frames that are put together to be sent at once.
#[derive(Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Where the last one begins.
    start: usize,
}

impl Frames {
    /// Begins one more.
    pub fn begin(&mut self) {
        self.start = self.bytes.len();
        self.bytes.resize(self.start + HEADER, 0);
    }

    /// More of its payload.
    pub fn push(&mut self, payload: &[u8]) {
        self.bytes.extend_from_slice(payload);
    }

    /// Ends it.
    pub fn end(&mut self, kind: Kind) {
        let Some((header, payload)) = self
            .bytes
            .get_mut(self.start..)
            .and_then(|frame| frame.split_first_chunk_mut::<HEADER>())
        else {
            return;
        };
        let sum = crc32fast::hash(payload);
        header[..4].copy_from_slice(&kind.bytes());
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        header[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        let sum = crc32fast::hash(&header[..16]);
        header[16..].copy_from_slice(&sum.to_le_bytes());
    }

    /// All of them.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All of them, for who has them be something else: they are to be cleared then.
    pub(crate) fn bytes_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Forgets them but keeps the room.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}

/// Sends a frame.
///
/// # Errors
/// The stream is closed or fails.
pub fn send(stream: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<(), Error> {
    let mut frames = Frames::default();
    frames.begin();
    frames.push(payload);
    frames.end(kind);
    Ok(stream.write_all(frames.bytes())?)
}

/// Sends a value in CBOR.
///
/// # Errors
/// As [`send`].
pub fn send_value<T: Serialize>(
    stream: &mut impl Write,
    kind: Kind,
    value: &T,
) -> Result<(), Error> {
    send(stream, kind, &encode(value)?)
}

/// A value in CBOR.
///
/// # Errors
/// It cannot be encoded.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes)
        .map_err(|_| Error::Damaged("a value cannot be encoded"))?;
    Ok(bytes)
}

/// The value in CBOR.
///
/// # Errors
/// It is none.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    ciborium::from_reader(bytes).map_err(|_| Error::Damaged("a part of it cannot be decoded"))
}

/// What a frame's header says.
pub(crate) struct Header {
    kind: Kind,
    sum: u32,
    /// Bytes of the payload.
    pub(crate) len: usize,
}

impl Header {
    /// Reads one.
    ///
    /// # Errors
    /// It is damaged, or one of no frame.
    pub(crate) fn of(header: &[u8; HEADER]) -> Result<Self, Error> {
        let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
        // Before its length is believed: a reader would wait for what never comes.
        if crc32fast::hash(&header[..16]) != u32::from_le_bytes(word(16)) {
            return Err(Error::Damaged("a checksum is wrong"));
        }
        let kind = Kind::from_bytes(word(0)).ok_or(Error::Damaged("a frame of no known kind"))?;
        let len =
            u64::from(u32::from_le_bytes(word(8))) | u64::from(u32::from_le_bytes(word(12))) << 32;
        if len > kind.longest() {
            return Err(Error::Damaged("a frame is too long"));
        }
        Ok(Self {
            kind,
            sum: u32::from_le_bytes(word(4)),
            len: len as usize,
        })
    }

    /// What came with it.
    ///
    /// # Errors
    /// It is damaged, or says that the other end has given up.
    pub(crate) fn check(&self, payload: &[u8]) -> Result<Kind, Error> {
        if crc32fast::hash(payload) != self.sum {
            return Err(Error::Damaged("a checksum is wrong"));
        }
        if self.kind == Kind::Abort {
            return Err(Error::Aborted(
                String::from_utf8_lossy(payload).into_owned(),
            ));
        }
        Ok(self.kind)
    }
}

/// Receives the next frame; its payload replaces what is in `payload`.
///
/// # Errors
/// The stream is cut or damaged, or the other end aborts.
pub fn receive(stream: &mut impl Read, payload: &mut Vec<u8>) -> Result<Kind, Error> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let header = Header::of(&header)?;
    payload.resize(header.len, 0);
    stream.read_exact(payload)?;
    header.check(payload)
}

/// Receives the one kind of frame that may come next.
///
/// # Errors
/// As [`receive`], or it is another kind.
pub fn expect(stream: &mut impl Read, kind: Kind) -> Result<Vec<u8>, Error> {
    let mut payload = Vec::new();
    if receive(stream, &mut payload)? == kind {
        Ok(payload)
    } else {
        Err(Error::Damaged("its parts are not in order"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_sent_is_received(which in 0..Kind::ALL.len(), payload: Vec<u8>) {
            let kind = Kind::ALL[which].0;
            let mut bytes = Vec::new();
            send(&mut bytes, kind, &payload).unwrap();
            let mut read = vec![1, 2, 3];
            match receive(&mut bytes.as_slice(), &mut read) {
                Ok(found) => {
                    prop_assert_eq!(found, kind);
                    prop_assert_eq!(read, payload);
                }
                Err(error) => prop_assert!(kind == Kind::Abort, "{}", error),
            }
        }

        #[test]
        fn every_changed_bit_and_every_cut_is_noticed(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
            place: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let mut bytes = Vec::new();
            send(&mut bytes, Kind::Pages, &payload).unwrap();
            let at = place.index(bytes.len());
            let mut cut = &bytes[..at];
            prop_assert!(matches!(receive(&mut cut, &mut Vec::new()), Err(Error::Cut)));
            bytes[at] ^= 1 << bit;
            let result = receive(&mut bytes.as_slice(), &mut Vec::new());
            prop_assert!(result.is_err());
        }

        #[test]
        fn garbage_is_refused_without_panic(bytes: Vec<u8>) {
            let _ = receive(&mut bytes.as_slice(), &mut Vec::new());
            let _ = decode::<Offer>(&bytes);
            let _ = Want::from_bytes(&bytes);
        }

        #[test]
        fn a_wish_is_understood_if_it_is_for_whole_pages(at: u32, pages in 1..=64u64, left: u64) {
            let want = Want {
                of: MEMORY,
                at: u64::from(at) * 4096,
                len: pages * 4096,
                left,
                faults: left / 2,
            };
            prop_assert_eq!(Want::from_bytes(&want.to_bytes()).unwrap(), want);
            let part = Want { at: want.at + 1, ..want };
            prop_assert!(Want::from_bytes(&part.to_bytes()).is_err());
            // A disk may end anywhere.
            let end = Want { of: 3, len: want.len - 512, ..want };
            prop_assert_eq!(Want::from_bytes(&end.to_bytes()).unwrap(), end);
            let end = Want { of: MEMORY, ..end };
            prop_assert!(Want::from_bytes(&end.to_bytes()).is_err());
        }
    }

    #[test]
    fn an_endless_frame_is_refused_before_it_is_read() {
        let mut header = b"page\0\0\0\0".to_vec();
        header.extend(u64::MAX.to_le_bytes());
        header.extend(crc32fast::hash(&header).to_le_bytes());
        let result = receive(&mut header.as_slice(), &mut Vec::new());
        assert!(matches!(result, Err(Error::Damaged("a frame is too long"))));
    }
}
