//! A snapshot: the state and the memory of a VM in one file.
//!
//! Version 3, in this order; numbers are little-endian:
//!
//! | where | what |
//! |---|---|
//! | 0 | eight bytes that say what it is |
//! | then | a chunk of the [stream](stream) with the [`Head`]: a reader of any version can read it, and refuses later versions |
//! | then | the root: offset (8 bytes), length (8) and BLAKE3 hash (32) of the index. Zeros until all else is written |
//! | a multiple of 4 KiB | guest memory: of each chunk of 64 KiB, at its place, the pages that are neither zeros nor the base's, one behind the other, compressed with zstd where that makes them shorter. The rest of a place is a hole |
//! | behind it | tables of 1024 chunks each; the last has only those that there are. A table of zeros alone is left out |
//! | then | the machine's state ([`SavedState`](blanket_devices::lifecycle::SavedState)), in CBOR |
//! | at the end | the index, in CBOR: places and hashes of the tables, of the state and of the head; where guest memory lies; what the disks looked like; path and root's hash of the base |
//!
//! An entry of a table is all zeros for a chunk of zeros; else:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of what is stored |
//! | 2 | a bit for each page that is stored, the first page's is the lowest |
//! | 2 | a bit for each page that is as in the base |
//! | 32 | BLAKE3 hash of the whole chunk |
//! | 16 | authentication tag, if the file is encrypted |
//!
//! So the hashes are a tree, with its root in the root: whatever is read, in
//! any order and however late, is checked when it is read. Fields that a reader
//! does not know it ignores; the index names what a reader has to know.
//!
//! In an encrypted file all parts are, but for the head and the root
//! (`crypt.rs`): what a chunk has at its place, tables, state and index, the
//! last three with their tags behind them. Their hashes are of that.
//!
//! Version 2 has neither bases nor encryption. Its entries are 36 bytes, length
//! and hash; all pages of a chunk that is not all zeros count as stored.
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

mod base;
mod crypt;
mod file;
mod geometry;
mod open;
pub mod pager;
mod recorder;
pub mod stream;
mod table;
mod touched;
mod writer;

pub use base::{Access, Base, MOST_BASES, Opening};
pub use crypt::{Key, KeyError};
pub use file::Reader;
pub use geometry::{CHUNK, Geometry};
pub use open::Snapshot;
pub use recorder::Recorder;
pub use stream::Pieces;
pub use touched::Touched;
pub(crate) use touched::clear;
pub use writer::{Compression, How, Writer, Written};

const MAGIC: [u8; 8] = *b"blanket\x1a";
/// Raised when an older reader would misunderstand the file, not when a field
/// is added.
const VERSION: u32 = 3;
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
    /// It is encrypted, and nobody has said with what.
    #[error("it is encrypted: name its key with --key FILE")]
    Encrypted,
    /// It is not encrypted, as it should be.
    #[error("it is not encrypted with any key: leave --key out if it is the right one")]
    NotEncrypted,
    /// It is encrypted with another key.
    #[error("it is encrypted with another key: name that with --key FILE")]
    WrongKey,
    /// What it is based on cannot be had.
    #[error("its base {} {why}: put it back as it was, or name it with --base FILE", path.display())]
    Base {
        /// Where it was.
        path: PathBuf,
        /// What is the matter.
        why: String,
    },
    /// Something is wrong with what it is based on.
    #[error("its base {}: {error}", path.display())]
    InBase {
        /// The base.
        path: PathBuf,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// It is based on too many others.
    #[error("more than {MOST_BASES} others would be beneath it: make one without --base")]
    Bases,
    /// It is to replace what it is based on.
    #[error("it would replace a snapshot that it is based on: give it another name")]
    OwnBase,
    /// Its memory is not that of its base.
    #[error("its base is of a guest with other memory: make it without --base")]
    BaseMemory,
    /// It has no hashes that another one could be compared with.
    #[error("it has version 1, which cannot be a base: make one without --base")]
    Old,
    /// It does not fit the machine's memory.
    #[error("its memory is not that of this machine; configure it like the saved one")]
    Memory,
    /// It cannot be read at all.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Error {
    /// The same, of a file's base.
    fn in_base(self, path: &Path) -> Self {
        match self {
            // They say of which.
            Self::Base { .. } | Self::InBase { .. } | Self::Bases => self,
            error => Self::InBase {
                path: path.to_owned(),
                error: Box::new(error),
            },
        }
    }
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
    /// How all but this is encrypted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encryption: Option<crypt::Encryption>,
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
            encryption: None,
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
