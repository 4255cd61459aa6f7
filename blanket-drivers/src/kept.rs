//! Results of self-tests, kept in files, and what users want instead of them.
//!
//! A file is JSON and replaced as a whole. One that is damaged is as good as
//! none.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bytes of a file at most; ours have a few thousand.
const LONGEST: u64 = 64 << 10;

/// What is kept of one self-test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record<K, R, C> {
    /// What it is valid for.
    pub key: K,
    /// What was found.
    pub report: R,
    /// What the user wants instead of what was chosen.
    pub wanted: Option<C>,
}

impl<K: DeserializeOwned, R: DeserializeOwned, C: DeserializeOwned> Record<K, R, C> {
    /// Reads a file's content; none if it is not one of ours.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// A directory with a file for each thing that was tested.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The directory at `path`, which is made when something is stored.
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The file of `name`, which has no slash.
    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }

    /// What is kept under `name`, valid or not.
    pub(crate) fn load<K, R, C>(&self, name: &str) -> Option<Record<K, R, C>>
    where
        Record<K, R, C>: DeserializeOwned,
    {
        serde_json::from_slice(&load(&self.file(name))?).ok()
    }

    /// Keeps a record in place of what is there.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub(crate) fn store(&self, name: &str, record: &impl Serialize) -> io::Result<()> {
        store(&self.file(name), record)
    }

    /// What is `known` and true if that `holds`; else what is measured now, and
    /// false. A result that cannot be stored is a result too.
    ///
    /// # Errors
    /// It cannot be measured.
    pub(crate) fn or_measure<K: Serialize, R: Serialize, C: Serialize, E>(
        &self,
        name: &str,
        known: Option<Record<K, R, C>>,
        holds: impl FnOnce(&Record<K, R, C>) -> bool,
        measure: impl FnOnce() -> Result<(K, R), E>,
    ) -> Result<(Record<K, R, C>, bool), E> {
        let wanted = match known {
            Some(record) if holds(&record) => return Ok((record, true)),
            Some(record) => record.wanted,
            None => None,
        };
        let (key, report) = measure()?;
        let record = Record {
            key,
            report,
            wanted,
        };
        if let Err(error) = self.store(name, &record) {
            tracing::warn!(%error, folder = %self.path.display(), "cannot keep a self-test");
        }
        Ok((record, false))
    }
}

/// What is in a file, or as much of it as could be ours.
fn load(path: &Path) -> Option<Vec<u8>> {
    let file = fs::File::open(path).ok()?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Puts a value in place of what is in a file; makes its folder.
///
/// # Errors
/// It cannot be written.
fn store(path: &Path, value: &impl Serialize) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = fs::File::create(&new)?;
    let written = serde_json::to_writer_pretty(&mut file, value)
        .map_err(io::Error::from)
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}
