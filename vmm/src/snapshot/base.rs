//! The snapshot that another one is based on: it has only the pages that differ.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::open::Found;
use super::{Error, Key, KeyError, Reader};

/// Most snapshots beneath one: each chunk may have to be looked for in all of
/// them.
pub const MOST_BASES: usize = 16;

/// What it takes to open a snapshot, beside its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Opening {
    /// The key that the snapshot is encrypted with: a file of 32 bytes or 64
    /// hex digits.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,

    /// Where a snapshot is that this one is based on, if not where it was; may
    /// be repeated.
    #[arg(long, value_name = "FILE")]
    pub base: Vec<PathBuf>,
}

impl Opening {
    /// Reads the key.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn access(&self) -> Result<Access, KeyError> {
        Ok(Access {
            key: self.key.as_deref().map(Key::from_file).transpose()?,
            bases: self.base.clone(),
        })
    }

    /// The flags that say the same to another program, with absolute paths.
    ///
    /// # Errors
    /// There is no current directory.
    pub fn to_flags(&self) -> io::Result<Vec<std::ffi::OsString>> {
        let mut flags = Vec::new();
        let keys = self.key.iter().map(|path| ("--key", path));
        let bases = self.base.iter().map(|path| ("--base", path));
        for (flag, path) in keys.chain(bases) {
            flags.push(flag.into());
            flags.push(std::path::absolute(path)?.into());
        }
        Ok(flags)
    }
}

/// The same with the key at hand.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The key that it is encrypted with.
    pub key: Option<Key>,
    /// Where snapshots may be that it is based on.
    pub bases: Vec<PathBuf>,
}

/// What an index says of the file's base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BaseAt {
    /// Where it was: from the file's directory on where it is below that, so
    /// that both can move together; else from the root of the file system.
    path: PathBuf,
    /// Its identity.
    pub(super) hash: [u8; 32],
}

impl BaseAt {
    /// Finds it and opens it. `level` says how many are above it.
    pub(super) fn open(
        &self,
        file: &Path,
        access: &Access,
        level: usize,
    ) -> Result<Arc<Reader>, Error> {
        if level > MOST_BASES {
            return Err(Error::Bases);
        }
        let was = folder(file).join(&self.path);
        let mut why = "is not there".to_owned();
        for path in access.bases.iter().chain([&was]) {
            match Found::at(path).and_then(|found| Ok((found.identity()?, found))) {
                Ok((identity, found)) if identity == Some(self.hash) => {
                    let reader = found.reader(access, level);
                    return reader.map(Arc::new).map_err(|error| error.in_base(path));
                }
                // Of those that were named, some may be for other files of the chain.
                _ if *path != was => {}
                Ok(_) => why = "is another snapshot now".to_owned(),
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => why = format!("cannot be used ({error})"),
            }
        }
        Err(Error::Base { path: was, why })
    }
}

/// The directory that a file is in.
fn folder(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// What a new snapshot is to be based on.
#[derive(Clone, Debug)]
pub struct Base {
    pub(super) reader: Arc<Reader>,
    pub(super) at: BaseAt,
}

impl Base {
    /// The snapshot at `path`, for the one that becomes `file`.
    ///
    /// # Errors
    /// It cannot be opened or is too old, there are too many beneath it, or
    /// `file` is one of them.
    pub fn open(path: &Path, file: &Path, access: &Access) -> Result<Self, Error> {
        let opened = Found::at(path).and_then(|found| found.reader(access, 1));
        let reader = opened.map_err(|error| error.in_base(path))?;
        let mut next = Some(&reader);
        while let Some(reader) = next {
            let same = |there: std::fs::Metadata| {
                let meta = reader.metadata()?;
                Ok::<_, io::Error>((there.dev(), there.ino()) == (meta.dev(), meta.ino()))
            };
            if std::fs::metadata(file).ok().map(same).transpose()? == Some(true) {
                return Err(Error::OwnBase);
            }
            next = reader.base();
        }
        let path = match path.file_name() {
            Some(name) => folder(path).canonicalize()?.join(name),
            None => path.canonicalize()?,
        };
        let beside = folder(file).canonicalize()?;
        Ok(Self {
            at: BaseAt {
                path: path.strip_prefix(beside).unwrap_or(&path).to_owned(),
                hash: reader.identity(),
            },
            reader: Arc::new(reader),
        })
    }
}
