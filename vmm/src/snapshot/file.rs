//! Reading a snapshot's file.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::base::BaseAt;
use super::crypt::{Cipher, Part, TAG};
use super::open::Found;
use super::table::{ENTRIES, Entry, Layout, entries_in, pages_of, range};
use super::touched::clear;
use super::{
    Access, CHUNK, DiskMark, Error, Geometry, Head, MOST_OTHER, PAGE, Regions, Touched, decode,
};

/// Bytes of the root.
pub(super) const ROOT: usize = 8 + 8 + 32;
/// What a reader of compressed memory has to know.
pub(super) const ZSTD: &str = "zstd";

/// Where a part is, and what it hashes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) hash: [u8; 32],
}

impl Place {
    /// As the root is written.
    pub(super) fn to_bytes(self) -> [u8; ROOT] {
        let mut bytes = [0; ROOT];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..].copy_from_slice(&self.hash);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; ROOT]) -> Self {
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            offset: number(0),
            len: number(8),
            hash: std::array::from_fn(|i| bytes[16 + i]),
        }
    }

    /// The part itself, sound.
    fn read(&self, file: &File, most: u64) -> Result<Vec<u8>, Error> {
        let size = file.metadata()?.len();
        let end = self.offset.checked_add(self.len);
        if end.is_none_or(|end| end > size) {
            return Err(Error::Damaged("it is cut off"));
        }
        if self.len > most {
            return Err(Error::Damaged("a part of it is too long"));
        }
        let mut bytes = vec![0; self.len as usize];
        file.read_exact_at(&mut bytes, self.offset)?;
        if *blake3::hash(&bytes).as_bytes() != self.hash {
            return Err(Error::Damaged("a part of it is not what was written"));
        }
        Ok(bytes)
    }

    /// The same, decrypted if the file is encrypted.
    fn content(
        &self,
        file: &File,
        most: u64,
        cipher: Option<&Cipher>,
        part: Part,
    ) -> Result<Vec<u8>, Error> {
        let mut bytes = self.read(file, most + TAG as u64)?;
        match cipher {
            Some(cipher) if !cipher.open(part, &mut bytes) => {
                Err(Error::Damaged("a part of it is not what was encrypted"))
            }
            _ => Ok(bytes),
        }
    }
}

/// What is where in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Index {
    /// What a reader has to know beyond version 2.
    #[serde(default)]
    pub(super) needs: Vec<String>,
    pub(super) head: [u8; 32],
    pub(super) regions: Regions,
    pub(super) chunk: u64,
    pub(super) data: u64,
    pub(super) tables: Vec<Option<Place>>,
    pub(super) state: Place,
    #[serde(default)]
    pub(super) disks: Vec<DiskMark>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base: Option<BaseAt>,
}

/// A snapshot's file that is read, in any order and by several threads.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    head: Head,
    state: SavedState,
    index: Index,
    /// Identifies the content.
    hash: [u8; 32],
    geometry: Geometry,
    layout: Layout,
    cipher: Option<Cipher>,
    /// What has the pages that are not in the file.
    base: Option<Arc<Reader>>,
    /// Those that were needed.
    tables: Vec<OnceLock<Vec<u8>>>,
}

impl Reader {
    /// Of a file whose head has been read, with its bases. `level` says how many
    /// files are above it.
    pub(super) fn new(found: Found, access: &Access, level: usize) -> Result<Self, Error> {
        let place = found.index()?;
        let Found {
            input, path, head, ..
        } = found;
        let file = input.into_inner();
        let cipher = match (&head.encryption, &access.key) {
            (Some(encryption), Some(key)) => Some(encryption.cipher(key, found.hash)?),
            (Some(_), None) => return Err(Error::Encrypted),
            (None, _) => None,
        };
        let index = place.content(&file, MOST_OTHER, cipher.as_ref(), Part::Index)?;
        let index: Index = decode(&index)?;
        if let Some(what) = index.needs.iter().find(|what| *what != ZSTD) {
            return Err(Error::Needs {
                written_by: head.written_by,
                what: format!("'{what}', which this version does not know"),
            });
        }
        let geometry = Geometry::new(&index.regions)?;
        let tables = geometry.chunks().div_ceil(ENTRIES as u64) as usize;
        let memory = geometry.chunks() * CHUNK as u64;
        if index.head != found.hash
            || index.chunk != CHUNK as u64
            || index.tables.len() != tables
            || index.data.checked_add(memory).is_none()
        {
            return Err(Error::Damaged("its parts do not fit each other"));
        }
        let state = index.state;
        let state = state.content(&file, MOST_OTHER, cipher.as_ref(), Part::State)?;
        let base = match &index.base {
            Some(base) => Some(base.open(&path, access, level + 1)?),
            None => None,
        };
        if base.as_ref().is_some_and(|base| base.geometry != geometry) {
            return Err(Error::BaseMemory);
        }
        Ok(Self {
            layout: match head.version {
                2 => Layout::Two,
                _ => Layout::Three,
            },
            state: decode(&state)?,
            path,
            file,
            head,
            cipher,
            base,
            hash: place.hash,
            geometry,
            tables: vec![OnceLock::new(); tables],
            index,
        })
    }

    /// What it says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> &SavedState {
        &self.state
    }

    /// What the disks looked like.
    #[must_use]
    pub fn disks(&self) -> &[DiskMark] {
        &self.index.disks
    }

    /// Where the memory lies.
    #[must_use]
    pub fn regions(&self) -> &Regions {
        &self.index.regions
    }

    /// Which chunk has which memory.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Identifies the content: no two snapshots have the same.
    #[must_use]
    pub fn identity(&self) -> [u8; 32] {
        self.hash
    }

    /// What has the pages that are not in the file.
    pub(super) fn base(&self) -> Option<&Self> {
        self.base.as_deref()
    }

    /// Of its file.
    pub(super) fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// Whether a chunk can be other than zeros. It is told without reading, for
    /// many chunks alike.
    #[must_use]
    pub fn is_used(&self, chunk: u64) -> bool {
        let table = usize::try_from(chunk / ENTRIES as u64).ok();
        let place = table.and_then(|table| self.index.tables.get(table));
        place.is_some_and(Option::is_some)
    }

    /// Memory that can be other than zeros, as (guest-physical address, bytes),
    /// each in one region. It is told without reading.
    #[must_use]
    pub fn used(&self) -> Vec<(u64, u64)> {
        let mut used: Vec<(u64, u64)> = Vec::new();
        for &(start, len) in &self.index.regions.0 {
            let Some((first, _)) = self.geometry.chunk(start) else {
                continue;
            };
            let mut chunk = first;
            while let Some((address, _)) = self.geometry.memory(chunk)
                && (start..start + len).contains(&address)
            {
                // To the end of the table, or of the region.
                let next = (chunk / ENTRIES as u64 + 1) * ENTRIES as u64;
                let end = (start + len).min(address + (next - chunk) * CHUNK as u64);
                match used.last_mut() {
                    _ if !self.is_used(chunk) => {}
                    Some(last) if last.0 >= start && last.0 + last.1 == address => {
                        last.1 = end - last.0;
                    }
                    _ => used.push((address, end - address)),
                }
                chunk = next;
            }
        }
        used
    }

    /// The entries of a table, if any is of other than zeros.
    fn table(&self, table: usize) -> Result<Option<&[u8]>, Error> {
        let Some(place) = self.index.tables.get(table).copied().flatten() else {
            return Ok(None);
        };
        let cell = &self.tables[table];
        if cell.get().is_none() {
            let len = entries_in(table, &self.geometry) * self.layout.entry();
            let part = Part::Table(table as u64);
            let bytes = place.content(&self.file, len as u64, self.cipher.as_ref(), part)?;
            if bytes.len() != len {
                return Err(Error::Damaged("a table is too short"));
            }
            // Another thread may have been faster, with the same.
            let _ = cell.set(bytes);
        }
        Ok(cell.get().map(Vec::as_slice))
    }

    /// What the tables say of a chunk; nothing of one that is all zeros.
    pub(super) fn entry(&self, chunk: u64) -> Result<Option<Entry>, Error> {
        let Some(table) = self.table((chunk / ENTRIES as u64) as usize)? else {
            return Ok(None);
        };
        let len = self.layout.entry();
        let at = (chunk % ENTRIES as u64) as usize * len;
        Ok(Entry::read(self.layout, &table[at..at + len]))
    }

    /// Reads a chunk, zeros behind a short one; whether any of it is not zeros.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    ///
    /// # Panics
    /// `out` is no chunk long.
    pub fn chunk(&self, chunk: u64, out: &mut [u8]) -> Result<bool, Error> {
        assert_eq!(out.len(), CHUNK, "a whole chunk");
        let (address, _) = self.geometry.memory(chunk).ok_or(Error::Memory)?;
        let damaged = || Error::Chunk {
            file: self.path.clone(),
            chunk,
            address,
        };
        let Some(entry) = self.entry(chunk)? else {
            out.fill(0);
            return Ok(false);
        };
        if !entry.is_sound() {
            return Err(damaged());
        }
        if entry.base == 0 {
            out.fill(0);
        } else {
            let base = self.base.as_ref().ok_or_else(damaged)?;
            base.chunk(chunk, out)?;
            if entry.here == 0 && base.entry(chunk)?.map(|base| base.hash) == Some(entry.hash) {
                // It has just been checked.
                return Ok(true);
            }
            for page in pages_of(!entry.base) {
                out[range(page)].fill(0);
            }
        }
        if entry.here != 0 {
            let pages = self.stored(chunk, &entry)?.ok_or_else(damaged)?;
            for (page, content) in pages_of(entry.here).zip(pages.chunks_exact(PAGE)) {
                out[range(page)].copy_from_slice(content);
            }
        }
        if *blake3::hash(out).as_bytes() != entry.hash {
            return Err(damaged());
        }
        Ok(true)
    }

    /// The pages of a chunk that are in the file; nothing if they are damaged.
    fn stored(&self, chunk: u64, entry: &Entry) -> Result<Option<Vec<u8>>, Error> {
        let mut bytes = vec![0; entry.stored];
        let place = self.index.data + chunk * CHUNK as u64;
        match self.file.read_exact_at(&mut bytes, place) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if let Some(cipher) = &self.cipher {
            bytes.extend(entry.tag);
            if !cipher.open(Part::Chunk(chunk), &mut bytes) {
                return Ok(None);
            }
        }
        if entry.stored == entry.len() {
            return Ok(Some(bytes));
        }
        let pages = zstd::bulk::decompress(&bytes, entry.len());
        Ok(pages.ok().filter(|pages| pages.len() == entry.len()))
    }

    /// Fills memory. What is in it (a kernel may be) goes.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or does not fit.
    pub fn load(&self, ram: &GuestRam, touched: Touched) -> Result<(), Error> {
        if Regions::of(ram) != self.index.regions {
            return Err(Error::Memory);
        }
        clear(ram, touched)?;
        let mut content = vec![0; CHUNK];
        for chunk in 0..self.geometry.chunks() {
            if !self.chunk(chunk, &mut content)? {
                continue;
            }
            let (address, len) = self.geometry.memory(chunk).ok_or(Error::Memory)?;
            for (page, at) in content[..len]
                .chunks_exact(PAGE)
                .zip((address..).step_by(PAGE))
            {
                if page.iter().any(|byte| *byte != 0) {
                    ram.write_slice(page, GuestAddress(at))
                        .map_err(|_| Error::Memory)?;
                }
            }
        }
        Ok(())
    }
}
