//! A snapshot: the state and the memory of a VM in one file.
//!
//! Version 2, in this order; numbers are little-endian:
//!
//! | where | what |
//! |---|---|
//! | 0 | eight bytes that say what it is |
//! | then | a chunk of the [stream](stream) with the [`Head`]: a version 1 reader can read it, and refuses the version |
//! | then | the root: offset (8 bytes), length (8) and BLAKE3 hash (32) of the index. Zeros until all else is written |
//! | a multiple of 4 KiB | guest memory: each chunk of 64 KiB at its place. Pages of zeros are holes in the file; a compressed chunk is at the beginning of its place |
//! | behind it | tables of 1024 chunks each: length as it is stored (4 bytes; 0: all zeros; 64 KiB: as it is; else compressed with zstd) and BLAKE3 hash of the whole chunk (32); the last has only those that there are. A table of zeros alone is left out |
//! | then | the machine's state ([`SavedState`](blanket_devices::lifecycle::SavedState)), in CBOR |
//! | at the end | the index, in CBOR: places and hashes of the tables, of the state and of the head; where guest memory lies; what the disks looked like |
//!
//! So the hashes are a tree, with its root in the root: whatever is read, in
//! any order and however late, is checked when it is read. Fields that a reader
//! does not know it ignores; the index names what a reader has to know.
//!
//! The content of the VM's disks is not in it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blanket_memory::GuestRam;
use blanket_memory::dirty::WriteLog;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::config::VmConfig;

mod file;
mod geometry;
mod open;
pub mod pager;
mod recorder;
pub mod stream;
mod touched;
mod writer;

pub use file::Reader;
pub use geometry::{CHUNK, Geometry};
pub use open::Snapshot;
pub use recorder::Recorder;
pub use stream::Pieces;
pub use touched::Touched;
pub(crate) use touched::clear;
pub use writer::{Compression, Writer, Written};

const MAGIC: [u8; 8] = *b"blanket\x1a";
/// Raised when an older reader would misunderstand the file, not when a field
/// is added.
const VERSION: u32 = 2;
const PAGE: usize = 4096;
/// Longest part that is no memory.
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
    /// It uses what this version cannot read.
    #[error("it was made by Blanket {written_by} and needs {what}: upgrade this node")]
    Needs {
        /// The version that wrote it.
        written_by: String,
        /// What it needs.
        what: String,
    },
    /// It has been changed or cut off.
    #[error("it is damaged ({0}): use another copy")]
    Damaged(&'static str),
    /// A chunk of memory has been changed.
    #[error(
        "the snapshot {} is damaged (chunk {chunk}, the guest's memory at {address:#x}, is not what was written): use another copy",
        file.display()
    )]
    Chunk {
        /// The file.
        file: PathBuf,
        /// The chunk's number.
        chunk: u64,
        /// Its guest-physical address.
        address: u64,
    },
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
    /// Whether its guest had suspended itself: where it goes on it looks at its
    /// devices anew.
    #[serde(default)]
    pub suspended: bool,
}

impl Head {
    /// For the VM `name`, as it is configured.
    #[must_use]
    pub fn new(name: String, config: VmConfig) -> Self {
        Self {
            version: stream::VERSION,
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            name,
            config,
            suspended: false,
        }
    }

    /// Reads it, whatever version wrote it.
    fn decode(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Always {
            version: u32,
            written_by: String,
        }
        let always: Always = decode(bytes)?;
        if always.version > VERSION {
            return Err(Error::Version {
                found: always.version,
            });
        }
        ciborium::from_reader(bytes).map_err(|error| Error::Needs {
            written_by: always.written_by,
            what: format!("a configuration that this version does not know ({error})"),
        })
    }
}

/// Where a machine's memory lies: (guest-physical address, bytes) of each region,
/// in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regions(pub Vec<(u64, u64)>);

impl Regions {
    /// Of `ram`.
    #[must_use]
    pub fn of(ram: &GuestRam) -> Self {
        let region = |region: &_| {
            let region: &vm_memory::GuestRegionMmap<WriteLog> = region;
            (region.start_addr().0, region.len())
        };
        Self(ram.iter().map(region).collect())
    }
}

/// How the making of a snapshot went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Microseconds for which the guest stood still.
    pub pause_us: u64,
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

fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    ciborium::from_reader(bytes).map_err(|_| Error::Damaged("a part of it cannot be decoded"))
}

/// The file beside a snapshot that says which of its memory was needed first.
#[must_use]
pub fn working_set_of(snapshot: &Path) -> PathBuf {
    let mut name = snapshot.to_owned().into_os_string();
    name.push(".ws");
    name.into()
}

#[cfg(test)]
mod tests;
