//! Where the engines' self-tests are kept, and which engine the user wants.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Volume;
use crate::kept;
use crate::store::{Engine, Error, Report, measure};

/// Goes up when an engine changes so that old measurements say nothing.
const VERSION: u32 = 1;

/// What a measurement is valid for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The device.
    pub name: String,
    /// What it is.
    pub model: Option<String>,
    /// Which one.
    pub serial: Option<String>,
    /// Its driver.
    pub driver: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it can be polled.
    pub polled: bool,
    /// The kernel's release.
    pub kernel: String,
    /// The engines' version.
    pub version: u32,
}

impl Key {
    /// The key of a volume here and now.
    #[must_use]
    pub fn of(volume: &Volume) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            name: volume.name.clone(),
            model: volume.model.clone(),
            serial: volume.serial.clone(),
            driver: volume.driver.clone(),
            size: volume.size,
            polled: volume.limits.polled,
            kernel: kernel.trim().to_owned(),
            version: VERSION,
        }
    }
}

/// What is kept about a volume.
pub type Record = kept::Record<Key, Report, Engine>;

impl Record {
    /// The engine to use.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.wanted.unwrap_or(self.report.chosen)
    }
}

/// A directory with a file for each volume.
#[derive(Clone, Debug)]
pub struct Cache(kept::Folder);

impl Cache {
    /// The cache in `folder`, which is made when something is stored.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self(kept::Folder::new(folder))
    }

    /// What is kept about a volume as it is now; none if it has changed since. A
    /// file that is damaged is as good as none.
    #[must_use]
    pub fn load(&self, volume: &Volume) -> Option<Record> {
        let record: Record = self.0.load(&volume.name)?;
        (record.key == Key::of(volume)).then_some(record)
    }

    /// Keeps a record in place of what is there.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub fn store(&self, record: &Record) -> io::Result<()> {
        self.0.store(&record.key.name, record)
    }

    /// What is known about a volume, and whether it was known before: measured
    /// now if it has not been, if it is another one, or if `retest` says so. A
    /// result that cannot be stored is a result too.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn record(&self, volume: &Volume, retest: bool) -> Result<(Record, bool), Error> {
        let holds = |it: &Record| !retest && it.report.is_measured();
        let measured = || Ok((Key::of(volume), measure(&volume.path)?));
        self.0
            .or_measure(&volume.name, self.load(volume), holds, measured)
    }
}
