//! Where the self-test's results are kept, and which uplink the user wants.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

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
pub type Record = kept::Record<Key, Report, Kind>;

impl Record {
    /// The uplink to use.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.wanted.unwrap_or(self.report.chosen)
    }
}

/// A directory with a file for each interface.
#[derive(Clone, Debug)]
pub struct Cache(kept::Folder);

impl Cache {
    /// The cache in `folder`, which is made when something is stored.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self(kept::Folder::new(folder))
    }

    /// What is kept about an interface, valid or not. A file that is damaged
    /// is as good as none.
    #[must_use]
    pub fn load(&self, interface: &str) -> Option<Record> {
        let record: Record = self.0.load(interface)?;
        (record.key.interface == interface).then_some(record)
    }

    /// Keeps a record in place of what is there.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub fn store(&self, record: &Record) -> io::Result<()> {
        self.0.store(&record.key.interface, record)
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
        // Who was not permitted to measure does not keep others from it.
        let holds = |it: &Record| !retest && it.key == key && it.report.is_measured();
        let measured = || Ok((key.clone(), measure(interface, address)?));
        self.0
            .or_measure(interface, self.load(interface), holds, measured)
    }
}
