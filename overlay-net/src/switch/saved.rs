//! What the switch was told, kept in a file: one that is started again is as it
//! was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::moving::Arrival;
use crate::api::observe::MirrorSpec;
use crate::api::services::VipSpec;
use crate::api::types::{NetworkSpec, PeerSpec, PortSpec};
use crate::controllers::ControllerSpec;
use crate::flow::groups::Rule;

/// The file's version; a newer one is refused.
const VERSION: u32 = 1;

/// Everything that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    version: u32,
    /// Networks by name.
    #[serde(default)]
    pub networks: BTreeMap<String, NetworkSpec>,
    /// Ports by name.
    #[serde(default)]
    pub ports: BTreeMap<String, PortSpec>,
    /// Those of them whose guests have not come yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub arriving: BTreeMap<String, Arrival>,
    /// Other nodes' switches by name.
    #[serde(default)]
    pub peers: BTreeMap<String, PeerSpec>,
    /// Virtual addresses by name.
    #[serde(default)]
    pub vips: BTreeMap<String, VipSpec>,
    /// Mirrors by name.
    #[serde(default)]
    pub mirrors: BTreeMap<String, MirrorSpec>,
    /// What was done to the flows of each network, in order.
    #[serde(default)]
    pub flows: BTreeMap<String, Vec<Change>>,
    /// Security groups' rules by name.
    #[serde(default)]
    pub groups: BTreeMap<String, Vec<Rule>>,
    /// How networks are controlled.
    #[serde(default)]
    pub controllers: BTreeMap<String, ControllerSpec>,
}

/// Something that was done to flows, in their text form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// One was added.
    Add(String),
    /// Those were removed that this means, or with `true` exactly that one.
    Remove(String, bool),
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no such file.
    #[error("{}: {message}; mend it, or move it away to begin without networks", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl Saved {
    /// Reads the file; nothing if there is none yet.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(Error::Io {
                    what: "read",
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let content = |message| Error::Content {
            path: path.to_owned(),
            message,
        };
        let saved: Self = serde_json::from_str(&text).map_err(|e| content(e.to_string()))?;
        if saved.version > VERSION {
            return Err(content(format!(
                "written by a newer switch (version {}; this one reads {VERSION})",
                saved.version
            )));
        }
        Ok(saved)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn write(&mut self, path: &Path) -> Result<(), Error> {
        self.version = VERSION;
        let new = path.with_extension("new");
        let write = || {
            let mut file = File::create(&new)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&new, path)
        };
        write().map_err(|source| Error::Io {
            what: "write",
            path: path.to_owned(),
            source,
        })
    }
}
