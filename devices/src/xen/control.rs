//! What the monitor asks of a running guest by way of the xenstore: to shut
//! down, to return memory, to use more or fewer vCPUs. A guest does so when it
//! likes, or never.

use std::sync::Arc;

use super::bus::{Domain, Shared, read, write};
use super::store::{Errno, HOME};

/// The least memory that a guest is asked to live with, in bytes: below, Linux
/// only kills its processes.
pub const MIN_MEMORY: u64 = 32 << 20;

/// What a guest is asked to do with itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// To end and switch off.
    PowerOff,
    /// To end and start again.
    Reboot,
    /// To end.
    Halt,
    /// To rest until it is resumed, perhaps elsewhere.
    Suspend,
}

impl Shutdown {
    fn word(self) -> &'static str {
        match self {
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
            Self::Halt => "halt",
            Self::Suspend => "suspend",
        }
    }
}

/// Why the guest is not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The amount is more than the machine was made with, or too little.
    #[error("the guest can have {least} to {most} MiB; ask for an amount between", least = .least >> 20, most = .most >> 20)]
    Memory {
        /// Bytes.
        least: u64,
        /// Bytes.
        most: u64,
    },
    /// The number is more than the machine was made with, or 0.
    #[error("the guest can have 1 to {most} vCPUs; ask for a number between")]
    Cpus {
        /// What it was made with.
        most: u32,
    },
    /// SysRq takes letters and digits only.
    #[error("'{0}' is no SysRq key; use a letter or a digit")]
    Key(char),
    /// The xenstore refuses the request.
    #[error("the xenstore refuses the request: {0}")]
    Store(#[from] Errno),
}

/// Controls a guest. Clones control the same one.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
    memory: u64,
    cpus: u32,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>, domain: &Domain) -> Self {
        Self {
            shared,
            memory: domain.memory,
            cpus: domain.cpus,
        }
    }

    /// Sets nodes of the guest's directory and has it look.
    fn set(&self, nodes: impl IntoIterator<Item = (String, String)>) -> Result<(), Error> {
        let mut inner = self.shared.lock();
        for (node, value) in nodes {
            write(&mut inner.store, &node, &value)?;
        }
        drop(inner);
        self.shared.wake();
        Ok(())
    }

    fn get(&self, node: &str) -> Option<String> {
        read(&self.shared.lock().store, HOME, node)
    }

    /// Asks the guest to shut down in some way.
    ///
    /// # Errors
    /// The store refuses.
    pub fn shut_down(&self, how: Shutdown) -> Result<(), Error> {
        self.set([("control/shutdown".into(), how.word().into())])
    }

    /// Whether the guest has said that it takes such requests: Linux does once
    /// its drivers are up.
    #[must_use]
    pub fn can(&self, how: Shutdown) -> bool {
        let feature = self.get(&format!("control/feature-{}", how.word()));
        feature.as_deref() == Some("1")
    }

    /// Presses a SysRq key of the guest's.
    ///
    /// # Errors
    /// It is no such key, or the store refuses.
    pub fn sysrq(&self, key: char) -> Result<(), Error> {
        if !key.is_ascii_alphanumeric() {
            return Err(Error::Key(key));
        }
        self.set([("control/sysrq".into(), key.into())])
    }

    /// Asks the guest to live with so many bytes of memory: its balloon takes
    /// the rest and gives it back to the monitor.
    ///
    /// # Errors
    /// The amount is out of bounds, or the store refuses.
    pub fn set_memory(&self, bytes: u64) -> Result<(), Error> {
        let least = MIN_MEMORY.min(self.memory);
        if !(least..=self.memory).contains(&bytes) {
            return Err(Error::Memory {
                least,
                most: self.memory,
            });
        }
        self.set([("memory/target".into(), (bytes >> 10).to_string())])
    }

    /// How many bytes of memory the guest has been asked to live with.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let kib = self.get("memory/target").and_then(|kib| kib.parse().ok());
        kib.map_or(self.memory, |kib: u64| kib << 10)
    }

    /// Asks the guest to use its first `count` vCPUs only.
    ///
    /// # Errors
    /// It has fewer, or the store refuses.
    pub fn set_cpus(&self, count: u32) -> Result<(), Error> {
        if !(1..=self.cpus).contains(&count) {
            return Err(Error::Cpus { most: self.cpus });
        }
        self.set((0..self.cpus).map(|cpu| {
            let word = if cpu < count { "online" } else { "offline" };
            (format!("cpu/{cpu}/availability"), word.into())
        }))
    }

    /// How many vCPUs the guest has been asked to use.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        let online = |cpu: &u32| {
            let word = self.get(&format!("cpu/{cpu}/availability"));
            word.as_deref() == Some("online")
        };
        (0..self.cpus).filter(online).count() as u32
    }
}
