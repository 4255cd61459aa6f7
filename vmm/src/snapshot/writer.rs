//! Writing a snapshot's file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::crypt::{Cipher, Encryption, Part, TAG};
use super::file::{Index, Place, ROOT, ZSTD};
use super::stream::chunk as framed;
use super::table::{ENTRIES, Entry, Layout, entries_in, mask, pages_of, range};
use super::{
    Base, CHUNK, DiskMark, Error, Geometry, Head, Key, MAGIC, PAGE, Regions, VERSION, encode,
    stream,
};

/// Of zstd: memory is often read back, and seldom worth more time.
const LEVEL: i32 = 1;

/// Whether memory is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// It is stored as it is.
    #[default]
    None,
    /// With zstd, chunk by chunk.
    Zstd,
}

/// How a file is written.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// Whether memory is compressed.
    pub compression: Compression,
    /// What it is encrypted with, if it is.
    pub key: Option<Key>,
    /// What has the pages that are not written.
    pub base: Option<Base>,
}

impl From<Compression> for How {
    fn from(compression: Compression) -> Self {
        Self {
            compression,
            ..Self::default()
        }
    }
}

/// What has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes that the file takes on its disk.
    pub on_disk: u64,
    /// Bytes of guest memory in it that are not zeros, in whole pages.
    pub memory: u64,
}

/// Writes a file: memory in any order, but each chunk of it at once.
pub struct Writer {
    file: File,
    geometry: Geometry,
    regions: Regions,
    compression: Compression,
    base: Option<Base>,
    cipher: Option<Cipher>,
    head: [u8; 32],
    /// Where the root goes, and where memory begins.
    root: u64,
    data: u64,
    /// What has come of one chunk.
    current: Option<(u64, Box<[u8]>)>,
    /// Entries of chunks, where there are any.
    tables: Vec<Option<Vec<u8>>>,
    memory: u64,
}

impl Writer {
    /// Begins an empty file.
    ///
    /// # Errors
    /// It cannot be written, or no memory can lie so, or the base's lies
    /// otherwise.
    pub fn new(
        file: File,
        head: &Head,
        regions: Regions,
        how: impl Into<How>,
    ) -> Result<Self, Error> {
        let how = how.into();
        let geometry = Geometry::new(&regions)?;
        let base = how.base.as_ref();
        if base.is_some_and(|base| *base.reader.geometry() != geometry) {
            return Err(Error::BaseMemory);
        }
        let encryption = how.key.as_ref().map(Encryption::new).transpose()?;
        let head = encode(&Head {
            version: VERSION,
            encryption: encryption.clone(),
            ..head.clone()
        })?;
        let hash = blake3::hash(&head).into();
        let cipher = match (encryption, &how.key) {
            (Some(encryption), Some(key)) => Some(encryption.cipher(key, hash)?),
            _ => None,
        };
        let mut start = MAGIC.to_vec();
        start.extend(framed(stream::HEAD, &head));
        let root = start.len() as u64;
        let data = (root + ROOT as u64).next_multiple_of(PAGE as u64);
        start.extend([0; ROOT]);
        file.write_all_at(&start, 0)?;
        Ok(Self {
            tables: vec![None; geometry.chunks().div_ceil(ENTRIES as u64) as usize],
            head: hash,
            file,
            geometry,
            regions,
            compression: how.compression,
            base: how.base,
            cipher,
            root,
            data,
            current: None,
            memory: 0,
        })
    }

    /// Memory from a guest-physical address on.
    ///
    /// # Errors
    /// It cannot be written, there is no such memory, or more of a chunk comes
    /// after other chunks.
    pub fn put(&mut self, mut address: u64, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let (chunk, offset) = self.geometry.chunk(address).ok_or(Error::Memory)?;
            let (_, len) = self.geometry.memory(chunk).ok_or(Error::Memory)?;
            if self.current.as_ref().is_none_or(|old| old.0 != chunk) {
                self.write_current()?;
                self.current = Some((chunk, vec![0; CHUNK].into()));
            }
            let piece = bytes.len().min(len - offset);
            if let Some((_, content)) = &mut self.current {
                content[offset..offset + piece].copy_from_slice(&bytes[..piece]);
            }
            bytes = &bytes[piece..];
            address = address.wrapping_add(piece as u64);
        }
        Ok(())
    }

    /// Writes the chunk that has been collected.
    fn write_current(&mut self) -> Result<(), Error> {
        let Some((chunk, content)) = self.current.take() else {
            return Ok(());
        };
        let used = mask(|page| content[range(page)].iter().any(|byte| *byte != 0));
        if used == 0 {
            return Ok(());
        }
        let number = (chunk / ENTRIES as u64) as usize;
        let entries = entries_in(number, &self.geometry);
        let len = Layout::Three.entry();
        let table = self.tables[number].get_or_insert_with(|| vec![0; entries * len]);
        let at = (chunk % ENTRIES as u64) as usize * len;
        if table[at..at + len].iter().any(|byte| *byte != 0) {
            return Err(Error::Damaged("a chunk of memory comes twice"));
        }
        let hash = blake3::hash(&content).into();
        let here = used & !self.as_before(chunk, &content, &hash)?;
        let mut entry = Entry {
            stored: 0,
            here,
            base: used & !here,
            hash,
            tag: [0; TAG],
        };
        if here != 0 {
            let mut bytes = self.to_store(&content, here)?;
            if let Some(cipher) = &self.cipher {
                entry.tag = cipher.seal(Part::Chunk(chunk), &mut bytes)?;
            }
            entry.stored = bytes.len();
            let place = self.data + chunk * CHUNK as u64;
            self.file.write_all_at(&bytes, place)?;
        }
        self.memory += entry.len() as u64;
        if let Some(table) = &mut self.tables[number] {
            table[at..at + len].copy_from_slice(&entry.to_bytes());
        }
        Ok(())
    }

    /// Which pages of a chunk are as in the base.
    fn as_before(&self, chunk: u64, content: &[u8], hash: &[u8; 32]) -> Result<u16, Error> {
        let Some(base) = self.base.as_ref().map(|base| &base.reader) else {
            return Ok(0);
        };
        match base.entry(chunk)? {
            None => Ok(0),
            Some(entry) if entry.hash == *hash => Ok(u16::MAX),
            Some(_) => {
                let mut before = vec![0; CHUNK];
                base.chunk(chunk, &mut before)?;
                Ok(mask(|page| content[range(page)] == before[range(page)]))
            }
        }
    }

    /// The pages of a chunk that are here, compressed if that saves a block of
    /// the disk.
    fn to_store(&self, content: &[u8], here: u16) -> io::Result<Vec<u8>> {
        let pages: Vec<_> = pages_of(here).map(|page| &content[range(page)]).collect();
        let pages = pages.concat();
        if self.compression == Compression::None {
            return Ok(pages);
        }
        let less = zstd::bulk::compress(&pages, LEVEL)?;
        let shorter = less.len().div_ceil(PAGE) < pages.len() / PAGE;
        Ok(if shorter { less } else { pages })
    }

    /// Writes what comes behind the memory, and last the root: only then it is
    /// a snapshot. `state` is encoded already.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self, state: &[u8], disks: &[DiskMark]) -> Result<Written, Error> {
        self.write_current()?;
        let mut end = self.data + self.geometry.chunks() * CHUNK as u64;
        let mut tables = Vec::new();
        for (number, table) in (0..).zip(std::mem::take(&mut self.tables)) {
            let any = table.filter(|table| table.iter().any(|byte| *byte != 0));
            let place = any.map(|table| self.append(&mut end, Part::Table(number), table));
            tables.push(place.transpose()?);
        }
        let state = self.append(&mut end, Part::State, state.to_vec())?;
        let needs = match self.compression {
            Compression::None => Vec::new(),
            Compression::Zstd => vec![ZSTD.to_owned()],
        };
        let index = encode(&Index {
            needs,
            head: self.head,
            regions: std::mem::take(&mut self.regions),
            chunk: CHUNK as u64,
            data: self.data,
            tables,
            state,
            disks: disks.to_vec(),
            base: self.base.as_ref().map(|base| base.at.clone()),
        })?;
        let place = self.append(&mut end, Part::Index, index)?;
        self.file.sync_all()?;
        self.file.write_all_at(&place.to_bytes(), self.root)?;
        self.file.sync_all()?;
        Ok(Written {
            on_disk: self.file.metadata()?.blocks() * 512,
            memory: self.memory,
        })
    }

    /// Writes a part, encrypted if the file is.
    fn append(&self, end: &mut u64, part: Part, mut bytes: Vec<u8>) -> io::Result<Place> {
        if let Some(cipher) = &self.cipher {
            let tag = cipher.seal(part, &mut bytes)?;
            bytes.extend(tag);
        }
        self.file.write_all_at(&bytes, *end)?;
        let place = Place {
            offset: *end,
            len: bytes.len() as u64,
            hash: blake3::hash(&bytes).into(),
        };
        *end += place.len;
        Ok(place)
    }
}
