//! Where the self-test's results are kept, and which uplink the user wants.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Kind, Report, measure, netlink};
use crate::kept;

/// Goes up when an uplink changes so that old measurements say nothing.
const VERSION: u32 = 1;

/// What a measurement is valid for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The interface.
    pub interface: String,
    /// Its driver.
    pub driver: String,
    /// Its MTU in bytes.
    pub mtu: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The uplinks' version.
    pub version: u32,
}

impl Key {
    /// The key of an interface here and now.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn of(interface: &str) -> Result<Self, Error> {
        let found = netlink::interface(interface)?;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(Self {
            driver: netlink::driver(interface),
            mtu: found.mtu,
            interface: found.name,
            kernel: kernel.trim().to_owned(),
            version: VERSION,
        })
    }
}

/// What is kept about an interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What it is valid for.
    pub key: Key,
    /// What was found.
    pub report: Report,
    /// What the user wants instead of what was chosen.
    pub wanted: Option<Kind>,
}

impl Record {
    /// The uplink to use.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.wanted.unwrap_or(self.report.chosen)
    }

    /// Reads a file's content; none if it is not one of ours.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// A directory with a file for each interface.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache in `folder`, which is made when something is stored.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    fn path(&self, interface: &str) -> PathBuf {
        // An interface's name has no slash.
        self.folder.join(format!("{interface}.json"))
    }

    /// What is kept about an interface, valid or not. A file that is damaged
    /// is as good as none.
    #[must_use]
    pub fn load(&self, interface: &str) -> Option<Record> {
        let bytes = kept::load(&self.path(interface))?;
        Record::parse(&bytes).filter(|record| record.key.interface == interface)
    }

    /// Keeps a record in place of what is there.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub fn store(&self, record: &Record) -> io::Result<()> {
        kept::store(&self.path(&record.key.interface), record)
    }

    /// What is known about an interface, and whether it was known before:
    /// measured now if it has not been, if something has changed since, or if
    /// `retest` says so. A result that cannot be stored is a result too.
    ///
    /// # Errors
    /// The interface is missing, down, or without the address.
    pub fn record(
        &self,
        interface: &str,
        address: IpAddr,
        retest: bool,
    ) -> Result<(Record, bool), Error> {
        let key = Key::of(interface)?;
        let kept = self.load(interface);
        let wanted = kept.as_ref().and_then(|record| record.wanted);
        // Who was not permitted to measure does not keep others from it.
        let holds = |it: &Record| it.key == key && it.report.is_measured();
        if let Some(record) = kept.filter(|it| holds(it) && !retest) {
            return Ok((record, true));
        }
        let record = Record {
            report: measure(interface, address)?,
            key,
            wanted,
        };
        if let Err(error) = self.store(&record) {
            tracing::warn!(%error, folder = %self.folder.display(), "cannot keep the uplinks' self-test");
        }
        Ok((record, false))
    }
}
