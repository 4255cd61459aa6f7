//! What the two ends of a migration between nodes say to each other, besides
//! what the monitors do: over a stream that `blanketd` carries.
//!
//! ```text
//! length: u32, little-endian | JSON of that length
//! ```
//!
//! ```text
//! blanket migrate                     blanket receive
//!   │ ── parcel ─────────────────────────▶ │  checks it, makes the disks
//!   │ ◀───────────────────────── answer ── │
//!   │ ══ each file's bytes, SHA-256 ═════▶ │
//!   │ ◀───────────────────────── answer ── │
//!   │  has the monitor wait for another    │
//!   │ ── go ─────────────────────────────▶ │  starts a monitor: it connects to
//!   │ ◀───────────────────────── answer ── │  the source's, and takes the guest
//!   │  watches the monitor                 │
//!   │ ── verdict ────────────────────────▶ │
//!   │ ◀────────────────────────── state ── │
//! ```

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use blanket_overlay::api::types::{NetworkSpec, Rule};
use blanket_overlay::bridge::PortConfig;
use blanket_vmm::api::types::Problem;
use blanket_vmm::config::VmConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest JSON, in bytes.
pub const MAX_BODY: u32 = 1 << 20;

/// Most files, and most disks.
pub const MAX_ITEMS: usize = 256;

/// A VM that is to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parcel {
    /// What it is called here.
    pub name: String,
    /// What it is known by, whatever it is called: random.
    pub id: String,
    /// What is to be done.
    pub wish: Wish,
    /// Files that come before it.
    pub files: Vec<Item>,
    /// Disks whose content comes with it.
    pub disks: Vec<Blank>,
    /// Images there that may have some of these disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<Base>,
    /// Disks that are on storage which both nodes have.
    pub shared: Vec<Shared>,
    /// Its interfaces that are on networks of the node's switch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
}

/// An interface that is on a network of the node's switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its number among the VM's.
    pub index: usize,
    /// What the network is called where the VM is.
    pub network: String,
    /// What it is everywhere.
    pub spec: NetworkSpec,
    /// The public key of the switch there.
    pub key: String,
    /// The epoch by which switches know its addresses.
    pub epoch: u64,
    /// How the bridge sees it.
    pub bridge: PortConfig,
    /// The security groups that it is in.
    pub groups: Vec<String>,
    /// Their rules, by name: for where there are no such groups.
    pub rules: BTreeMap<String, Vec<Rule>>,
}

/// A disk that is on storage which both nodes have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// Its number among the VM's.
    pub index: usize,
    /// Where it is on both nodes.
    pub path: PathBuf,
    /// Its bytes.
    pub len: u64,
    /// The name of a file beside it.
    pub marker: String,
    /// What is in that file: random.
    pub nonce: String,
}

/// What is to be done with what is in a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// The VM comes.
    Come,
    /// It does not: what is kept of its disks is to be removed.
    Discard,
    /// It does not: a replica of its disks is to be kept.
    StandBy,
}

/// A file that comes before its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// What it is.
    pub what: What,
    /// Its bytes.
    pub len: u64,
}

/// What a file is to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A disk that nobody writes, by its number.
    Disk(usize),
}

/// A disk that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blank {
    /// Its number among the VM's.
    pub index: usize,
    /// Its bytes.
    pub capacity: u64,
    /// How many of them may be other than zeros.
    pub used: u64,
}

/// An image that the other node has, and that a disk may have much in common with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The disk's number among the VM's.
    pub index: usize,
    /// The image's file among the other node's bases.
    pub name: String,
}

/// The answer to a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is done, and the VM has networks there, of the switch with this key.
    Joined(String),
    /// It is not, and nothing is left of it.
    Refused(Problem),
}

/// The guest's monitor waits for another one, which can start now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Go {
    /// The VM's configuration. The paths in it are the other node's.
    pub config: VmConfig,
    /// User that the monitor becomes.
    pub user: Option<String>,
}

/// What became of the guest, as far as that is known where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It has moved.
    Moved,
    /// It stays.
    Stayed,
    /// Its monitor is dead: who was ready has it.
    Orphaned,
}

/// What is left of the VM at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs, or is paused as it was.
    Runs,
    /// Nothing.
    Gone,
    /// It ran, and has ended, as its memory was lost: its disks are there.
    Lost,
    /// It ran, and has ended since: its disks are there.
    Ended,
    /// A monitor that does not know whether it may run it.
    Undecided,
}

/// Why the other end cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream has ended or failed.
    #[error("the connection to the other node: {0}")]
    Stream(#[from] io::Error),
    /// It is longer than anything that is said.
    #[error("the other node says {0} bytes at once: that is too much")]
    Long(u32),
    /// It is not what is said here.
    #[error(
        "the other node says what cannot be understood: use the same version of Blanket on both"
    )]
    Body,
}

/// Says something.
///
/// # Errors
/// It is too long, or the stream fails.
pub fn say<T: Serialize>(stream: &mut impl Write, value: &T) -> Result<(), Error> {
    let body = serde_json::to_vec(value).map_err(|_| Error::Body)?;
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if len > MAX_BODY {
        return Err(Error::Long(len));
    }
    Ok(stream.write_all(&[&len.to_le_bytes()[..], &body].concat())?)
}

/// Hears what is said next.
///
/// # Errors
/// See [`Error`].
pub fn hear<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, Error> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > MAX_BODY {
        return Err(Error::Long(len));
    }
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(|_| Error::Body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_heard(bytes: Vec<u8>, len in 0u32..40) {
            let _ = hear::<Parcel>(&mut bytes.as_slice());
            let framed = [&len.to_le_bytes()[..], &bytes].concat();
            let _ = hear::<Parcel>(&mut framed.as_slice());
        }

        #[test]
        fn what_is_said_is_heard(name: String, index: usize, capacity: u64, used: u64, len: u64) {
            let parcel = Parcel {
                id: name.clone(),
                wish: Wish::StandBy,
                files: vec![Item { what: What::Disk(index), len }],
                disks: vec![Blank { index, capacity, used }],
                bases: vec![Base { index, name: name.clone() }],
                ports: vec![Port {
                    index,
                    network: name.clone(),
                    spec: NetworkSpec { vni: Default::default(), mtu: 1500 },
                    key: name.clone(),
                    epoch: len,
                    bridge: PortConfig::default(),
                    groups: vec!["web".to_owned()],
                    rules: [("web".to_owned(), Vec::new())].into(),
                }],
                name,
                shared: vec![],
            };
            let mut bytes = Vec::new();
            say(&mut bytes, &parcel).unwrap();
            prop_assert_eq!(hear::<Parcel>(&mut bytes.as_slice()).unwrap(), parcel);
        }
    }

    #[test]
    fn endless_bodies_are_refused_before_they_are_read() {
        let bytes = u32::MAX.to_le_bytes();
        let heard = hear::<Go>(&mut bytes.as_slice());
        assert!(matches!(heard, Err(Error::Long(_))));
    }
}
