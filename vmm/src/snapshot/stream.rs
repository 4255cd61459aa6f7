//! A snapshot as a stream: what a monitor sends, and what version 1 had in its files.
//!
//! After eight bytes that say what it is, it is a sequence of chunks:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | kind |
//! | 4 | CRC-32 of kind, length and payload |
//! | 8 | length of the payload |
//! | ... | payload |
//!
//! | kind | payload |
//! |---|---|
//! | `head` | [`Head`], in CBOR |
//! | `rams` | where guest memory lies ([`Regions`]), in CBOR |
//! | `stat` | the machine's state ([`SavedState`]), in CBOR |
//! | `page` | a guest-physical address, then the memory from there on |
//! | `time` | how it went ([`super::Report`]), in CBOR |
//! | `end ` | the number of `page` chunks |
//! | `disk` | what the VM's disks looked like ([`DiskMark`]), in CBOR; behind the end of a file |
//!
//! Numbers are little-endian. Pages of zeros are left out. A reader skips kinds
//! that it does not know.

use std::io::{self, Read, Seek};
use std::sync::Arc;

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::touched::clear;
use super::{DiskMark, Error, Head, MAGIC, MOST_OTHER, PAGE, Regions, Touched, decode, encode};

/// The stream's version; later ones are of files only.
pub(super) const VERSION: u32 = 1;
pub(super) const HEAD: [u8; 4] = *b"head";
pub(super) const REGIONS: [u8; 4] = *b"rams";
pub(super) const STATE: [u8; 4] = *b"stat";
pub(super) const PAGES: [u8; 4] = *b"page";
pub(super) const REPORT: [u8; 4] = *b"time";
pub(super) const END: [u8; 4] = *b"end ";
const DISKS: [u8; 4] = *b"disk";
/// Most memory in one chunk.
pub(super) const MOST_MEMORY: usize = 1 << 20;

/// A chunk, whole.
pub(super) fn chunk(kind: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + payload.len());
    out.extend(kind);
    out.extend(checksum(kind, payload).to_le_bytes());
    out.extend((payload.len() as u64).to_le_bytes());
    out.extend(payload);
    out
}

fn checksum(kind: [u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&kind);
    hasher.update(&(payload.len() as u64).to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// A snapshot as it is written: its bytes, piece by piece. Nothing may change
/// the memory meanwhile.
pub struct Pieces {
    start: Option<Vec<u8>>,
    ram: GuestRam,
    touched: Touched,
    region: usize,
    offset: u64,
    chunks: u64,
    ended: bool,
    /// Tells its owner that it is still being written.
    _hold: Arc<()>,
}

impl Pieces {
    /// Of a machine at rest, which stays so while `hold` is held.
    ///
    /// # Errors
    /// The state cannot be encoded.
    pub fn new(
        head: &Head,
        state: &SavedState,
        ram: GuestRam,
        touched: Touched,
        hold: Arc<()>,
    ) -> io::Result<Self> {
        Ok(Self {
            start: Some(Self::start(head, state, &ram)?),
            ram,
            touched,
            region: 0,
            offset: 0,
            chunks: 0,
            ended: false,
            _hold: hold,
        })
    }

    /// What comes before the memory.
    ///
    /// # Errors
    /// The state cannot be encoded.
    pub fn start(head: &Head, state: &SavedState, ram: &GuestRam) -> io::Result<Vec<u8>> {
        let mut start = MAGIC.to_vec();
        start.extend(chunk(HEAD, &encode(head)?));
        start.extend(chunk(REGIONS, &encode(&Regions::of(ram))?));
        start.extend(chunk(STATE, &encode(state)?));
        Ok(start)
    }

    /// The next memory that is not all zeros.
    fn memory(&mut self) -> Option<Vec<u8>> {
        let mut payload = Vec::new();
        let mut page = [0; PAGE];
        while let Some(region) = self.ram.iter().nth(self.region) {
            while self.offset < region.len() && payload.len() < MOST_MEMORY {
                let at = MemoryRegionAddress(self.offset);
                // Regions are whole pages: reading cannot fail.
                let read = self.touched.must_read(region, self.offset)
                    && region.read_slice(&mut page, at).is_ok();
                if read && page != [0; PAGE] {
                    if payload.is_empty() {
                        payload.extend((region.start_addr().0 + self.offset).to_le_bytes());
                    }
                    payload.extend(page);
                } else if !payload.is_empty() {
                    break;
                }
                self.offset += PAGE as u64;
            }
            if !payload.is_empty() {
                return Some(payload);
            }
            self.region += 1;
            self.offset = 0;
        }
        None
    }
}

impl Iterator for Pieces {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(start) = self.start.take() {
            return Some(start);
        }
        if let Some(payload) = self.memory() {
            self.chunks += 1;
            return Some(chunk(PAGES, &payload));
        }
        let last = !std::mem::replace(&mut self.ended, true);
        last.then(|| chunk(END, &self.chunks.to_le_bytes()))
    }
}

/// A snapshot that is read.
pub struct Reader<R> {
    input: R,
    head: Head,
    state: SavedState,
}

impl<R: Read> Reader<R> {
    /// Reads all of `input` that comes before the memory.
    ///
    /// # Errors
    /// It cannot be read, or is no sound stream.
    pub fn new(mut input: R) -> Result<Self, Error> {
        let (head, _) = read_head(&mut input)?;
        if head.version > VERSION {
            return Err(Error::Damaged("it is no stream of a monitor's"));
        }
        Self::after(input, head)
    }

    /// The same where the head has been read.
    pub(super) fn after(mut input: R, head: Head) -> Result<Self, Error> {
        loop {
            let (kind, payload) = next(&mut input)?;
            match kind {
                STATE => {
                    let state = decode(&payload)?;
                    return Ok(Self { input, head, state });
                }
                HEAD | PAGES | END => {
                    return Err(Error::Damaged("its parts are not in order"));
                }
                _ => {}
            }
        }
    }

    /// What it says of itself.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The machine's state.
    pub fn state(&self) -> &SavedState {
        &self.state
    }

    /// Fills memory. What is in it (a kernel may be) goes.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or does not fit.
    pub fn load(&mut self, ram: &GuestRam, touched: Touched) -> Result<(), Error> {
        clear(ram, touched)?;
        let mut chunks = 0;
        loop {
            let (kind, payload) = next(&mut self.input)?;
            match kind {
                PAGES => {
                    let (at, bytes) = payload
                        .split_first_chunk()
                        .ok_or(Error::Damaged("memory without a place"))?;
                    let at = GuestAddress(u64::from_le_bytes(*at));
                    ram.write_slice(bytes, at).map_err(|_| Error::Memory)?;
                    chunks += 1;
                }
                END if payload == u64::to_le_bytes(chunks) => return Ok(()),
                END | HEAD | STATE => return Err(Error::Damaged("its parts are not in order")),
                _ => {}
            }
        }
    }
}

impl<R: Read + Seek> Reader<R> {
    /// What the disks looked like; nothing if nobody has written it down.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn disks(mut self) -> Result<Vec<DiskMark>, Error> {
        loop {
            let Some((kind, _, length)) = header(&mut self.input)? else {
                return Ok(Vec::new());
            };
            if kind == DISKS {
                self.input.seek_relative(-(HEADER as i64))?;
                return decode(&next(&mut self.input)?.1);
            }
            let length = i64::try_from(length).map_err(|_| Error::Damaged("an endless part"))?;
            self.input.seek_relative(length)?;
        }
    }
}

/// Reads the beginning: the head, and the bytes that it was.
pub(super) fn read_head(input: &mut impl Read) -> Result<(Head, Vec<u8>), Error> {
    let mut magic = [0; MAGIC.len()];
    match input.read_exact(&mut magic) {
        Ok(()) if magic == MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
        _ => return Err(Error::NotOne),
    }
    loop {
        match next(input)? {
            (HEAD, payload) => return Ok((Head::decode(&payload)?, payload)),
            (STATE | PAGES | END, _) => {
                return Err(Error::Damaged("its parts are not in order"));
            }
            _ => {}
        }
    }
}

/// Bytes of a chunk before its payload.
pub(super) const HEADER: usize = 16;

/// Kind, checksum and length of a chunk; nothing at the end of the file.
pub(super) fn header(input: &mut impl Read) -> Result<Option<([u8; 4], u32, u64)>, Error> {
    let mut kind = [0; 4];
    match input.read(&mut kind[..1])? {
        0 => return Ok(None),
        _ => exactly(input, &mut kind[1..])?,
    }
    let (mut sum, mut length) = ([0; 4], [0; 8]);
    exactly(input, &mut sum)?;
    exactly(input, &mut length)?;
    Ok(Some((
        kind,
        u32::from_le_bytes(sum),
        u64::from_le_bytes(length),
    )))
}

/// The next chunk, whole and sound.
pub(super) fn next(input: &mut impl Read) -> Result<([u8; 4], Vec<u8>), Error> {
    let (kind, sum, length) = header(input)?.ok_or(Error::Damaged("it is cut off"))?;
    let most = match kind {
        PAGES => (size_of::<u64>() + MOST_MEMORY) as u64,
        _ => MOST_OTHER,
    };
    if length > most {
        return Err(Error::Damaged("a part of it is too long"));
    }
    let mut payload = vec![0; length as usize];
    exactly(input, &mut payload)?;
    if checksum(kind, &payload) != sum {
        return Err(Error::Damaged("a checksum is wrong"));
    }
    Ok((kind, payload))
}

fn exactly(input: &mut impl Read, bytes: &mut [u8]) -> Result<(), Error> {
    input.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Damaged("it is cut off"),
        _ => Error::Io(error),
    })
}
