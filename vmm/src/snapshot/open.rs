//! Opening a snapshot of any version.

use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::Path;
use std::sync::Arc;

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;

use super::stream::{self, MOST_MEMORY};
use super::{DiskMark, Error, Head, Reader, Touched};

/// A snapshot that is read, whatever version wrote it.
pub enum Snapshot {
    /// Version 1: a stream in a file.
    Stream(Box<stream::Reader<BufReader<File>>>),
    /// Version 2.
    File(Arc<Reader>),
}

impl Snapshot {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or is no sound snapshot.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::of_file(File::open(path)?, path)
    }

    /// The same for a file that is open; `path` is what errors call it.
    ///
    /// # Errors
    /// It cannot be read, or is no sound snapshot.
    pub fn of_file(file: File, path: &Path) -> Result<Self, Error> {
        let mut input = BufReader::with_capacity(MOST_MEMORY, file);
        let (head, bytes) = stream::read_head(&mut input)?;
        if head.version == stream::VERSION {
            let stream = stream::Reader::after(input, head)?;
            return Ok(Self::Stream(Box::new(stream)));
        }
        let (hash, root) = (blake3::hash(&bytes).into(), input.stream_position()?);
        let reader = Reader::new(input.into_inner(), path, head, hash, root)?;
        Ok(Self::File(Arc::new(reader)))
    }

    /// What it says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        match self {
            Self::Stream(stream) => stream.head(),
            Self::File(file) => file.head(),
        }
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> &SavedState {
        match self {
            Self::Stream(stream) => stream.state(),
            Self::File(file) => file.state(),
        }
    }

    /// Fills memory. What is in it (a kernel may be) goes.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or does not fit.
    pub fn load(&mut self, ram: &GuestRam, touched: Touched) -> Result<(), Error> {
        match self {
            Self::Stream(stream) => stream.load(ram, touched),
            Self::File(file) => file.load(ram, touched),
        }
    }

    /// What the disks looked like; nothing if nobody has written it down.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn disks(self) -> Result<Vec<DiskMark>, Error> {
        match self {
            Self::Stream(stream) => stream.disks(),
            Self::File(file) => Ok(file.disks().to_vec()),
        }
    }
}
