//! The life of a device, and how its state is carried elsewhere.
//!
//! ```text
//!            start()             pause()
//!   built ───────────▶ running ───────────▶ paused ──▶ save()
//!     ▲ restore()         ▲                   │  ▲
//!     └───────────────────┼───── resume() ────┘  │ restore(), reset()
//!                         └──────────────────────┘
//!   any state ── halt() ──▶ halted (final)
//! ```
//!
//! The machine keeps this order:
//!
//! * `start` after guest memory and all wiring exist, before any vCPU runs;
//! * `pause` after every vCPU has stopped, `resume` before any vCPU runs: no
//!   device ever sees an access by the guest while it is paused;
//! * `save`, `restore` and `reset` only while paused (`restore` also before
//!   `start`);
//! * `halt` last, once, from any state.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Why a step of a device's life failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The saved state is another device's.
    #[error("saved state is of '{found}', not of '{expected}'")]
    Kind {
        /// This device.
        expected: String,
        /// The device in the state.
        found: String,
    },
    /// The saved state was written by a newer version.
    #[error(
        "saved state of '{kind}' has version {found}; this version reads up to {newest}: upgrade this node"
    )]
    Version {
        /// The device.
        kind: String,
        /// The state's version.
        found: u32,
        /// The newest version that is read here.
        newest: u32,
    },
    /// The saved state cannot be read or written.
    #[error("saved state of '{kind}': {message}")]
    Encoding {
        /// The device.
        kind: String,
        /// Why.
        message: String,
    },
    /// The step itself failed.
    #[error("{device}: {message}")]
    Device {
        /// The device.
        device: String,
        /// Why.
        message: String,
    },
}

/// A device's (or a machine part's) state: a plain versioned struct, encoded
/// as CBOR with named fields. A reader ignores fields that it does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// What it is the state of, like `virtio-net`.
    pub kind: String,
    /// Version of the struct inside. Raised when an older reader would
    /// misunderstand it, not when a field is added.
    pub version: u32,
    /// The struct, in CBOR.
    pub data: Vec<u8>,
}

impl SavedState {
    /// Encodes `state`.
    ///
    /// # Errors
    /// [`Error::Encoding`] if it cannot be encoded.
    pub fn pack<T: Serialize>(kind: &str, version: u32, state: &T) -> Result<Self, Error> {
        let mut data = Vec::new();
        ciborium::into_writer(state, &mut data).map_err(|error| Error::Encoding {
            kind: kind.to_owned(),
            message: error.to_string(),
        })?;
        Ok(Self {
            kind: kind.to_owned(),
            version,
            data,
        })
    }

    /// Decodes the state of a `kind`, written by `newest` or an older version.
    ///
    /// # Errors
    /// It is another device's, too new, or damaged.
    pub fn unpack<T: DeserializeOwned>(&self, kind: &str, newest: u32) -> Result<T, Error> {
        if self.kind != kind {
            return Err(Error::Kind {
                expected: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version > newest {
            return Err(Error::Version {
                kind: kind.to_owned(),
                found: self.version,
                newest,
            });
        }
        ciborium::from_reader(self.data.as_slice()).map_err(|error| Error::Encoding {
            kind: kind.to_owned(),
            message: error.to_string(),
        })
    }
}

/// What every device can do. The module's documentation has the order.
pub trait Lifecycle {
    /// Begins to serve the guest.
    ///
    /// # Errors
    /// The device cannot run; the machine is then halted.
    fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Completes or parks all work in flight. On return the device touches no
    /// guest memory, raises no interrupt, and holds back its peers' input.
    ///
    /// # Errors
    /// The device could not be brought to rest.
    fn pause(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Serves the guest again, first whatever came in the meantime.
    ///
    /// # Errors
    /// The device cannot run on.
    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Brings a paused device to the state in which it was built. Peers (tap,
    /// image, socket) stay attached.
    ///
    /// # Errors
    /// The device could not be reset.
    fn reset(&mut self) -> Result<(), Error>;

    /// Ends the device: flushes what must not be lost and lets its peers go.
    fn halt(&mut self) {}

    /// The state of a paused device, enough for [`Lifecycle::restore`] on an
    /// equally configured one to go on where this one stopped.
    ///
    /// # Errors
    /// The state cannot be encoded.
    fn save(&self) -> Result<SavedState, Error>;

    /// Takes over a saved state. On an error the device must be reset.
    ///
    /// # Errors
    /// The state is damaged, too new, or another device's.
    fn restore(&mut self, state: &SavedState) -> Result<(), Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Old {
        a: u32,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct New {
        a: u32,
        #[serde(default)]
        b: Vec<u8>,
    }

    #[test]
    fn readers_ignore_new_fields_and_default_missing_ones() {
        let new = SavedState::pack("x", 1, &New { a: 7, b: vec![1] }).unwrap();
        assert_eq!(new.unpack::<Old>("x", 1).unwrap(), Old { a: 7 });
        let old = SavedState::pack("x", 1, &Old { a: 7 }).unwrap();
        assert_eq!(old.unpack::<New>("x", 1).unwrap(), New { a: 7, b: vec![] });
    }

    #[test]
    fn newer_versions_other_kinds_and_garbage_are_refused() {
        let state = SavedState::pack("x", 2, &Old { a: 7 }).unwrap();
        assert!(matches!(
            state.unpack::<Old>("x", 1),
            Err(Error::Version { .. })
        ));
        assert!(matches!(
            state.unpack::<Old>("y", 2),
            Err(Error::Kind { .. })
        ));
        let garbage = SavedState {
            data: vec![0xff; 3],
            ..state
        };
        assert!(matches!(
            garbage.unpack::<Old>("x", 2),
            Err(Error::Encoding { .. })
        ));
    }
}
