//! Writing a snapshot's file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::file::{ENTRIES, ENTRY, Index, Place, ROOT, ZSTD, entries_in};
use super::stream::chunk as framed;
use super::{
    CHUNK, DiskMark, Error, Geometry, Head, MAGIC, PAGE, Regions, VERSION, encode, stream,
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
    /// It cannot be written, or no memory can lie so.
    pub fn new(
        file: File,
        head: &Head,
        regions: Regions,
        compression: Compression,
    ) -> Result<Self, Error> {
        let geometry = Geometry::new(&regions)?;
        let head = encode(&Head {
            version: VERSION,
            ..head.clone()
        })?;
        let mut start = MAGIC.to_vec();
        start.extend(framed(stream::HEAD, &head));
        let root = start.len() as u64;
        let data = (root + ROOT as u64).next_multiple_of(PAGE as u64);
        start.extend([0; ROOT]);
        file.write_all_at(&start, 0)?;
        Ok(Self {
            tables: vec![None; geometry.chunks().div_ceil(ENTRIES as u64) as usize],
            head: blake3::hash(&head).into(),
            file,
            geometry,
            regions,
            compression,
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
        let pages = |page: &&[u8]| page.iter().any(|byte| *byte != 0);
        let used = content.chunks_exact(PAGE).filter(pages).count();
        if used == 0 {
            return Ok(());
        }
        let less = self.compressed(&content, used)?;
        let table = (chunk / ENTRIES as u64) as usize;
        let entries = entries_in(table, &self.geometry);
        let table = &mut self.tables[table];
        let table = table.get_or_insert_with(|| vec![0; entries * ENTRY]);
        let entry = (chunk % ENTRIES as u64) as usize * ENTRY;
        let entry = &mut table[entry..entry + ENTRY];
        if entry.iter().any(|byte| *byte != 0) {
            return Err(Error::Damaged("a chunk of memory comes twice"));
        }
        self.memory += (used * PAGE) as u64;
        let place = self.data + chunk * CHUNK as u64;
        let stored = match less {
            Some(less) => {
                self.file.write_all_at(&less, place)?;
                less.len()
            }
            None => {
                write_pages(&self.file, &content, place)?;
                CHUNK
            }
        };
        entry[..4].copy_from_slice(&(stored as u32).to_le_bytes());
        entry[4..].copy_from_slice(blake3::hash(&content).as_bytes());
        Ok(())
    }

    /// The chunk compressed, if that saves a block of the disk.
    fn compressed(&self, content: &[u8], used: usize) -> io::Result<Option<Vec<u8>>> {
        if self.compression == Compression::None {
            return Ok(None);
        }
        let less = zstd::bulk::compress(content, LEVEL)?;
        Ok((less.len().div_ceil(PAGE) < used).then_some(less))
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
        for table in std::mem::take(&mut self.tables) {
            let any = table.filter(|table| table.iter().any(|byte| *byte != 0));
            let place = any.map(|table| self.append(&mut end, &table));
            tables.push(place.transpose()?);
        }
        let state = self.append(&mut end, state)?;
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
        })?;
        let place = self.append(&mut end, &index)?;
        self.file.sync_all()?;
        self.file.write_all_at(&place.to_bytes(), self.root)?;
        self.file.sync_all()?;
        Ok(Written {
            on_disk: self.file.metadata()?.blocks() * 512,
            memory: self.memory,
        })
    }

    fn append(&self, end: &mut u64, bytes: &[u8]) -> io::Result<Place> {
        self.file.write_all_at(bytes, *end)?;
        let place = Place {
            offset: *end,
            len: bytes.len() as u64,
            hash: blake3::hash(bytes).into(),
        };
        *end += place.len;
        Ok(place)
    }
}

/// Writes the pages that are not zeros, neighbours together.
fn write_pages(file: &File, content: &[u8], place: u64) -> io::Result<()> {
    let is_zero = |at: usize| content[at..at + PAGE].iter().all(|byte| *byte == 0);
    let mut at = 0;
    while at < content.len() {
        let start = at;
        while at < content.len() && !is_zero(at) {
            at += PAGE;
        }
        if at == start {
            at += PAGE;
        } else {
            file.write_all_at(&content[start..at], place + start as u64)?;
        }
    }
    Ok(())
}
