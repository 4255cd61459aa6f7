//! What was changed on this machine, in `up.json` beside the VMs. A change is
//! written down before it is made, so that one that was cut off can be undone.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::change::Change;
use super::system::System;
use crate::failure::failure;

/// What the administrator asked for; kept from one `blanket up` to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Options {
    /// Bytes of memory in huge pages.
    pub(crate) hugepages: Option<u64>,
    /// Where guests are saved.
    pub(crate) evacuate_to: Option<PathBuf>,
}

/// The file's content.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What was asked for.
    pub(crate) options: Options,
    /// What was changed, in this order.
    pub(crate) changes: Vec<Change>,
}

/// The file, held by one command at a time.
#[derive(Debug)]
pub(crate) struct Book {
    path: PathBuf,
    pub(crate) record: Record,
    _lock: Option<fs::File>,
}

impl Book {
    /// Reads the record at `path` without holding it.
    pub(crate) fn look(path: &Path) -> Result<Self> {
        let text = System::this().read(path)?;
        let record = match text {
            None => Record::default(),
            Some(text) => serde_json::from_str(&text).map_err(|error| {
                failure(
                    format!("{} is damaged: {error}", path.display()),
                    "mend it, or undo by hand what it lists and remove it",
                )
            })?,
        };
        Ok(Self {
            path: path.to_owned(),
            record,
            _lock: None,
        })
    }

    /// Reads the record at `path` and holds it; makes its folder.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let lock = fs::File::open(folder)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(failure(
                "another blanket up or down is at work",
                "wait for its end",
            ));
        }
        Ok(Self {
            _lock: Some(lock),
            ..Self::look(path)?
        })
    }

    /// Adds a change that is about to be made. Of one that was made before,
    /// what was there at first is kept.
    pub(crate) fn add(&mut self, mut change: Change) -> Result<()> {
        let same = |it: &Change| it.target.identity() == change.target.identity();
        if let Some(at) = self.record.changes.iter().position(same) {
            let first = self.record.changes.remove(at);
            change.prior = first.prior;
            change.made_folders.extend(first.made_folders);
        }
        self.record.changes.push(change);
        self.store()
    }

    /// Strikes out a change that was undone.
    pub(crate) fn strike(&mut self, identity: &str) -> Result<()> {
        let changes = &mut self.record.changes;
        changes.retain(|change| change.target.identity() != identity);
        self.store()
    }

    /// Writes the file; removes it when nothing is left to say.
    pub(crate) fn store(&self) -> Result<()> {
        if self.record.changes.is_empty() && self.record.options == Options::default() {
            return System::this().remove(&self.path);
        }
        let text = serde_json::to_string_pretty(&self.record)?;
        System::this().write_file(&self.path, &format!("{text}\n"))
    }
}
