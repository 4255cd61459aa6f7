//! What goes wrong in the testbed.

use std::io;
use std::path::{Path, PathBuf};

use blanket_testbed_agent::client;

/// What goes wrong in the testbed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, a socket or a process failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program of the host ended with an error.
    #[error("`{command}` failed ({status}):\n{output}")]
    Program {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// What it said.
        output: String,
    },
    /// Packages are missing and cannot be installed.
    #[error("packages are missing: as root, run `apt-get install {0}`")]
    MissingPackages(String),
    /// Something has not the form it should have.
    #[error("{what}: {problem}")]
    Format {
        /// The thing.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A node ended or did not answer.
    #[error("node `{node}` {problem}; its console output is in {}", log.display())]
    Node {
        /// The node's name.
        node: String,
        /// What happened.
        problem: String,
        /// Console output and QEMU's messages.
        log: PathBuf,
    },
    /// The command channel into a machine failed.
    #[error(transparent)]
    Channel(#[from] client::Error),
}

/// Result of the testbed's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds to an I/O error what was tried.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source,
        })
    }
}

pub(crate) fn malformed(what: &Path, problem: impl Into<String>) -> Error {
    Error::Format {
        what: what.display().to_string(),
        problem: problem.into(),
    }
}
