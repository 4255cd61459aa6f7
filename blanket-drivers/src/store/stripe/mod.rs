//! Striping over several volumes (RAID 0): more bandwidth than one has, and no
//! redundancy.
//!
//! ```text
//! volume 0: | superblock, 1 MiB | chunk 0 | chunk 2 | ...
//! volume 1: | superblock, 1 MiB | chunk 1 | chunk 3 | ...
//! ```
//!
//! Each volume says in its superblock which set it belongs to, which of the
//! set's volumes it is, and how large the chunks are. So it does not matter in
//! which order they are named (device names change from one boot to the next),
//! and a set that is not complete, or has a stranger in it, is refused.
//!
//! A request becomes at most one for each volume, since what a range has on one
//! volume lies together there. It fails if one of its parts does; what the other
//! volumes have is not touched by that.

mod layout;
mod store;
mod superblock;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use layout::Layout;
pub(super) use store::StripeStore;

use self::superblock::{Reject, Superblock};
use super::{Format, Image, Spec};

/// Where the data begins on each volume, in bytes.
pub const DATA_START: u64 = 1 << 20;

/// Bytes of a chunk that are usual: what one request of a guest fits in, most
/// times, while a long one uses several volumes.
pub const DEFAULT_CHUNK: u64 = 128 << 10;

/// Bounds of a chunk, in bytes.
const MIN_CHUNK: u64 = 4096;
const MAX_CHUNK: u64 = 16 << 20;

/// Volumes of a set at most.
const MAX_VOLUMES: u32 = 64;

/// Bytes at both ends of a volume that show whether there is something on it:
/// file systems, partition tables and RAID leave their marks there.
const LOOKED_AT: u64 = 1 << 20;

/// Why volumes are no striped set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A volume of a set was named by itself.
    #[error(
        "disk {path} is one volume of a striped set: name the others with stripe=...; or say format=raw to use it for something else, which destroys the set"
    )]
    Alone {
        /// The volume.
        path: PathBuf,
    },
    /// A volume belongs to no set.
    #[error(
        "volume {path} belongs to no striped set: make one with `blanket store stripe VOLUME VOLUME...`; what is on the volumes is lost then"
    )]
    Unmarked {
        /// The volume.
        path: PathBuf,
    },
    /// Its superblock is damaged.
    #[error(
        "volume {path}: its superblock (the first 4096 bytes) is damaged; restore it from a backup of the volume"
    )]
    Damaged {
        /// The volume.
        path: PathBuf,
    },
    /// A newer version made it.
    #[error("volume {path}: its superblock has version {version}; upgrade this node")]
    Version {
        /// The volume.
        path: PathBuf,
        /// Version of the superblock.
        version: u32,
    },
    /// It belongs to another set.
    #[error("volume {path} is of another striped set than {first}: name the volumes of one set")]
    Foreign {
        /// The volume.
        path: PathBuf,
        /// The one that was named first.
        first: PathBuf,
    },
    /// It was named twice.
    #[error("volume {path} is the same one as {other}, or its copy: name each volume once")]
    Twice {
        /// The volume.
        path: PathBuf,
        /// The other one.
        other: PathBuf,
    },
    /// Some are missing.
    #[error(
        "the striped set of {path} has {count} volumes; {}: attach and name all of them",
        missing.iter().map(|it| format!("number {it}")).collect::<Vec<_>>().join(", ") + " is missing"
    )]
    Missing {
        /// The volume that was named first.
        path: PathBuf,
        /// How many there are.
        count: u32,
        /// Which are not there, from 0.
        missing: Vec<u32>,
    },
    /// It is smaller than it was.
    #[error(
        "volume {path} has {len} bytes, but the striped set needs {needed}: was it copied to a smaller one?"
    )]
    Short {
        /// The volume.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
        /// Bytes that it should have at least.
        needed: u64,
    },
    /// There is something on it.
    #[error("volume {path} is not empty; if what is on it may be lost, say --force")]
    NotEmpty {
        /// The volume.
        path: PathBuf,
    },
    /// Such a set cannot be made.
    #[error("{0}")]
    Shape(String),
    /// A volume cannot be opened.
    #[error(transparent)]
    Open(Box<super::Error>),
    /// A volume cannot be read or written.
    #[error("volume {path}: {source}")]
    Io {
        /// The volume.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    |source| Error::Io { path, source }
}

/// Opens one volume as `spec` says.
fn open_volume(spec: &Spec, path: &Path) -> Result<Image, Error> {
    let one = Spec {
        path: path.to_owned(),
        // Whatever its first bytes look like.
        format: Some(Format::Raw),
        stripe: Vec::new(),
        ..spec.clone()
    };
    Image::open(&one).map_err(|error| Error::Open(Box::new(error)))
}

fn file_of(image: &Image, path: &Path) -> Result<File, Error> {
    let none = || io::Error::other("it is no raw volume");
    let file = image.raw_file().ok_or_else(none);
    file.and_then(File::try_clone).map_err(failed(path))
}

/// Whether a file that is not open for direct I/O begins as a set's volume does.
pub(super) fn is_marked(file: &File) -> bool {
    matches!(
        Superblock::read(file),
        Ok(Ok(_) | Err(Reject::Damaged | Reject::Version(_)))
    )
}

/// Opens the volumes of `spec`; they come in the order in which they are striped.
pub(super) fn open(spec: &Spec) -> Result<(Layout, Vec<Image>), Error> {
    if spec.format == Some(Format::Qcow2) {
        let message = "a striped set has no format of its own: leave out format=qcow2";
        return Err(Error::Shape(message.to_owned()));
    }
    let mut found: Vec<(Superblock, PathBuf, Image)> = Vec::new();
    for path in std::iter::once(&spec.path).chain(&spec.stripe) {
        let image = open_volume(spec, path)?;
        let read = Superblock::read(&file_of(&image, path)?).map_err(failed(path))?;
        let path = path.clone();
        let superblock = match read {
            Ok(superblock) => superblock,
            Err(Reject::None) => return Err(Error::Unmarked { path }),
            Err(Reject::Damaged) => return Err(Error::Damaged { path }),
            Err(Reject::Version(version)) => return Err(Error::Version { path, version }),
        };
        if let Some((other, first, _)) = found.first()
            && (other.set, other.layout) != (superblock.set, superblock.layout)
        {
            let first = first.clone();
            return Err(Error::Foreign { path, first });
        }
        if let Some((_, other, _)) = found.iter().find(|it| it.0.index == superblock.index) {
            let other = other.clone();
            return Err(Error::Twice { path, other });
        }
        let needed = DATA_START + superblock.layout.data;
        if image.capacity() < needed {
            let len = image.capacity();
            return Err(Error::Short { path, len, needed });
        }
        found.push((superblock, path, image));
    }
    found.sort_by_key(|(superblock, ..)| superblock.index);
    let layout = found[0].0.layout;
    let there = |index: &u32| found.iter().any(|(it, ..)| it.index == *index);
    let missing: Vec<_> = (0..layout.volumes).filter(|it| !there(it)).collect();
    if !missing.is_empty() {
        return Err(Error::Missing {
            path: spec.path.clone(),
            count: layout.volumes,
            missing,
        });
    }
    Ok((layout, found.into_iter().map(|(.., image)| image).collect()))
}

/// Makes a striped set of volumes, files or block devices, with chunks of so
/// many bytes. What is on them is lost; they are refused if something is, unless
/// `force` is set.
///
/// # Errors
/// A volume is in use, too small, not empty or not writable, or the chunk is no
/// power of two from 4 KiB to 16 MiB. Where the reason is not in writing, no
/// volume was changed.
pub fn create(paths: &[PathBuf], chunk: u64, force: bool) -> Result<Layout, Error> {
    let shape = |message: &str| Err(Error::Shape(message.to_owned()));
    let count = u32::try_from(paths.len()).unwrap_or(u32::MAX);
    if !(2..=MAX_VOLUMES).contains(&count) {
        return shape("a striped set has 2 to 64 volumes");
    }
    if !chunk.is_power_of_two() || !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
        return shape("a chunk is a power of two from 4K to 16M");
    }
    let mut volumes = Vec::new();
    for path in paths {
        let spec = Spec {
            path: path.clone(),
            readonly: false,
            format: Some(Format::Raw),
            direct: false,
            backing: false,
            engine: super::Engine::Sync,
            stripe: Vec::new(),
        };
        let image = open_volume(&spec, path)?;
        let file = file_of(&image, path)?;
        if !force && !is_empty(&file, image.capacity()).map_err(failed(path))? {
            return Err(Error::NotEmpty { path: path.clone() });
        }
        volumes.push((path, file, image));
    }
    let least = volumes.iter().map(|(.., image)| image.capacity()).min();
    let room = least.unwrap_or(0).saturating_sub(DATA_START);
    let layout = Layout {
        volumes: count,
        chunk,
        data: room / chunk * chunk,
    };
    if !layout.is_sound() {
        return shape("the smallest volume has no room for the superblock (1 MiB) and a chunk");
    }
    let set = random().map_err(failed(Path::new("/dev/urandom")))?;
    for (index, (path, file, _)) in (0..).zip(&volumes) {
        let superblock = Superblock { set, index, layout };
        let written = file.write_all_at(&superblock.format(), 0);
        written
            .and_then(|()| file.sync_all())
            .map_err(failed(path))?;
    }
    Ok(layout)
}

fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Whether both ends of a volume are zeros.
fn is_empty(file: &File, len: u64) -> io::Result<bool> {
    let mut bytes = vec![0; usize::try_from(LOOKED_AT.min(len)).map_err(io::Error::other)?];
    for offset in [0, len.saturating_sub(LOOKED_AT)] {
        file.read_exact_at(&mut bytes, offset)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
