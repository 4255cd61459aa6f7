//! Opening a snapshot of any version.

use std::fs::File;
use std::io::{BufReader, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;

use super::file::{Place, ROOT};
use super::stream::{self, MOST_MEMORY};
use super::{Access, DiskMark, Error, Head, Reader, Touched};

/// A snapshot whose head has been read, and nothing else.
pub(super) struct Found {
    pub(super) input: BufReader<File>,
    pub(super) path: PathBuf,
    pub(super) head: Head,
    /// The head's.
    pub(super) hash: [u8; 32],
    /// Where the head ends.
    pub(super) root: u64,
}

impl Found {
    /// The file at `path`.
    pub(super) fn at(path: &Path) -> Result<Self, Error> {
        Self::of_file(File::open(path)?, path)
    }

    fn of_file(file: File, path: &Path) -> Result<Self, Error> {
        let mut input = BufReader::with_capacity(MOST_MEMORY, file);
        let (head, bytes) = stream::read_head(&mut input)?;
        Ok(Self {
            path: path.to_owned(),
            head,
            hash: blake3::hash(&bytes).into(),
            root: input.stream_position()?,
            input,
        })
    }

    /// Whether it is a stream, of version 1.
    fn is_stream(&self) -> bool {
        self.head.version == stream::VERSION
    }

    /// Where the index is.
    pub(super) fn index(&self) -> Result<Place, Error> {
        let mut bytes = [0; ROOT];
        let read = self.input.get_ref().read_exact_at(&mut bytes, self.root);
        read.map_err(|_| Error::Damaged("it is cut off"))?;
        if bytes == [0; ROOT] {
            return Err(Error::Damaged("it was not written to its end"));
        }
        Ok(Place::from_bytes(&bytes))
    }

    /// Identifies the content, if anything can.
    pub(super) fn identity(&self) -> Result<Option<[u8; 32]>, Error> {
        let index = (!self.is_stream()).then(|| self.index());
        Ok(index.transpose()?.map(|place| place.hash))
    }

    /// Reads it and its bases; `level` says how many are above it.
    pub(super) fn reader(self, access: &Access, level: usize) -> Result<Reader, Error> {
        if self.is_stream() {
            return Err(Error::Old);
        }
        Reader::new(self, access, level)
    }
}

/// A snapshot that is read, whatever version wrote it.
pub enum Snapshot {
    /// Version 1: a stream in a file.
    Stream(Box<stream::Reader<BufReader<File>>>),
    /// A later one.
    File(Arc<Reader>),
}

impl Snapshot {
    /// Opens the file at `path`, which is not encrypted.
    ///
    /// # Errors
    /// It or its bases cannot be read, or are no sound snapshots.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, &Access::default())
    }

    /// Opens the file at `path`. Where a key is named it has to be encrypted:
    /// whoever encrypts snapshots does not take others for them.
    ///
    /// # Errors
    /// It or its bases cannot be read or decrypted, or are no sound snapshots.
    pub fn open_with(path: &Path, access: &Access) -> Result<Self, Error> {
        let found = Found::at(path)?;
        if access.key.is_some() && found.head.encryption.is_none() {
            return Err(Error::NotEncrypted);
        }
        if found.is_stream() {
            let stream = stream::Reader::after(found.input, found.head)?;
            return Ok(Self::Stream(Box::new(stream)));
        }
        Ok(Self::File(Arc::new(found.reader(access, 0)?)))
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
