//! A snapshot: the state and the memory of a VM in one file.
//!
//! After eight bytes that say what it is, the file is a sequence of chunks:
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
//! | `stat` | the machine's state ([`SavedState`]), in CBOR |
//! | `page` | a guest-physical address, then the memory from there on |
//! | `end ` | the number of `page` chunks |
//! | `disk` | what the VM's disks looked like ([`DiskMark`]), in CBOR; behind the end |
//!
//! Numbers are little-endian. Pages of zeros are left out. A reader skips kinds
//! that it does not know. The content of the VM's disks is not in it.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;
use blanket_memory::dirty::WriteLog;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::config::VmConfig;

const MAGIC: [u8; 8] = *b"blanket\x1a";
/// Raised when an older reader would misunderstand the file, not when a kind
/// of chunk or a field is added.
const VERSION: u32 = 1;
const HEAD: [u8; 4] = *b"head";
const STATE: [u8; 4] = *b"stat";
const PAGES: [u8; 4] = *b"page";
const END: [u8; 4] = *b"end ";
const DISKS: [u8; 4] = *b"disk";
const PAGE: usize = 4096;
/// Most memory in one chunk.
const MOST_MEMORY: usize = 1 << 20;
/// Longest payload of another kind.
const MOST_OTHER: u64 = 64 << 20;

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is something else.
    #[error("it is no snapshot of a VM")]
    NotOne,
    /// It was written by a newer version.
    #[error(
        "it has version {found}; this version of Blanket reads up to {VERSION}: upgrade this node"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// It has been changed or cut off.
    #[error("it is damaged ({0}): use another copy")]
    Damaged(&'static str),
    /// It does not fit the machine's memory.
    #[error("its memory is not that of this machine; configure it like the saved one")]
    Memory,
    /// It cannot be read at all.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a snapshot says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    version: u32,
    /// The version of Blanket that wrote it.
    pub written_by: String,
    /// The VM's name.
    pub name: String,
    /// How it is configured.
    pub config: VmConfig,
}

impl Head {
    /// For the VM `name`, as it is configured.
    #[must_use]
    pub fn new(name: String, config: VmConfig) -> Self {
        Self {
            version: VERSION,
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            name,
            config,
        }
    }
}

/// What a disk's image looked like when the VM was saved: to tell whether it is
/// still the one that the guest remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// The image.
    pub path: PathBuf,
    size: u64,
    /// Seconds and nanoseconds since 1970 of its last change.
    modified: (i64, i64),
}

impl DiskMark {
    /// The image as it is now.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(path: PathBuf) -> io::Result<Self> {
        let meta = std::fs::metadata(&path)?;
        Ok(Self {
            path,
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

/// A chunk, whole.
fn chunk(kind: [u8; 4], payload: &[u8]) -> Vec<u8> {
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

fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    ciborium::from_reader(bytes).map_err(|_| Error::Damaged("a part of it cannot be decoded"))
}

/// Adds what the disks look like to a snapshot that is complete otherwise.
///
/// # Errors
/// It cannot be written.
pub fn write_disks(out: &mut impl Write, disks: &[DiskMark]) -> io::Result<()> {
    out.write_all(&chunk(DISKS, &encode(&disks)?))
}

/// Which pages of this process's private memory were ever touched: reading the
/// others would fill page tables, and take its time.
#[derive(Clone, Default)]
pub struct Touched {
    pagemap: Option<Arc<File>>,
    /// Page number of the first of `entries`.
    first: u64,
    entries: Vec<u8>,
}

impl Touched {
    /// Opens what tells it. A process that has given up its privileges cannot
    /// any more; all pages count as touched then.
    #[must_use]
    pub fn open() -> Self {
        Self {
            pagemap: File::open("/proc/self/pagemap").ok().map(Arc::new),
            ..Self::default()
        }
    }

    /// Whether a page of a region can be other than all zeros. (What others
    /// write to a file is not this process's.)
    pub(crate) fn must_read(&mut self, region: &GuestRegionMmap<WriteLog>, offset: u64) -> bool {
        region.file_offset().is_some() || self.has(region.as_ptr() as u64 + offset)
    }

    /// Whether the page at `address` was: it is in memory, or swapped out.
    fn has(&mut self, address: u64) -> bool {
        const BATCH: usize = 1 << 12;
        const ENTRY: usize = 8;
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        let page = address / PAGE as u64;
        let index = |this: &Self| page.checked_sub(this.first).map(|i| i as usize * ENTRY);
        if index(self).is_none_or(|index| index >= self.entries.len()) {
            self.first = page;
            self.entries.resize(BATCH * ENTRY, 0);
            let read = self
                .pagemap
                .as_ref()
                .map(|pagemap| pagemap.read_at(&mut self.entries, page * ENTRY as u64));
            self.entries
                .truncate(read.and_then(Result::ok).unwrap_or(0));
        }
        index(self)
            .and_then(|index| self.entries.get(index..)?.first_chunk())
            .is_none_or(|entry| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0)
    }
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
        let mut start = MAGIC.to_vec();
        start.extend(chunk(HEAD, &encode(head)?));
        start.extend(chunk(STATE, &encode(state)?));
        Ok(Self {
            start: Some(start),
            ram,
            touched,
            region: 0,
            offset: 0,
            chunks: 0,
            ended: false,
            _hold: hold,
        })
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
pub struct Snapshot<R> {
    input: R,
    head: Head,
    state: SavedState,
}

impl Snapshot<io::BufReader<File>> {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or is no sound snapshot.
    pub fn open(path: &std::path::Path) -> Result<Self, Error> {
        Self::new(io::BufReader::with_capacity(MOST_MEMORY, File::open(path)?))
    }
}

impl<R: Read> Snapshot<R> {
    /// Reads all of `input` that comes before the memory.
    ///
    /// # Errors
    /// It cannot be read, or is no sound snapshot.
    pub fn new(mut input: R) -> Result<Self, Error> {
        let mut magic = [0; MAGIC.len()];
        match input.read_exact(&mut magic) {
            Ok(()) if magic == MAGIC => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
            _ => return Err(Error::NotOne),
        }
        let mut head = None;
        loop {
            let (kind, payload) = next(&mut input)?;
            match (kind, head.take()) {
                (HEAD, None) => {
                    let new: Head = decode(&payload)?;
                    if new.version > VERSION {
                        return Err(Error::Version { found: new.version });
                    }
                    head = Some(new);
                }
                (STATE, Some(head)) => {
                    let state = decode(&payload)?;
                    return Ok(Self { input, head, state });
                }
                (HEAD | STATE | PAGES | END, _) => {
                    return Err(Error::Damaged("its parts are not in order"));
                }
                (_, old) => head = old,
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
    pub fn load(&mut self, ram: &GuestRam, mut touched: Touched) -> Result<(), Error> {
        for region in ram.iter() {
            for offset in (0..region.len()).step_by(PAGE) {
                if touched.must_read(region, offset) {
                    let at = MemoryRegionAddress(offset);
                    let cleared = region.write_slice(&[0; PAGE], at);
                    cleared.map_err(|_| Error::Memory)?;
                }
            }
        }
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

impl<R: Read + Seek> Snapshot<R> {
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
                self.input.seek_relative(-16)?;
                return decode(&next(&mut self.input)?.1);
            }
            let length = i64::try_from(length).map_err(|_| Error::Damaged("an endless part"))?;
            self.input.seek_relative(length)?;
        }
    }
}

/// Kind, checksum and length of a chunk; nothing at the end of the file.
fn header(input: &mut impl Read) -> Result<Option<([u8; 4], u32, u64)>, Error> {
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
fn next(input: &mut impl Read) -> Result<([u8; 4], Vec<u8>), Error> {
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

#[cfg(test)]
mod tests;
