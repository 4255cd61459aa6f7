//! Disks of a machine.

use std::path::PathBuf;

/// What becomes of writes to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writes {
    Kept,
    Discarded,
    Refused,
}

/// A raw image that a machine sees as a disk.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
    writes: Writes,
    serial: Option<String>,
}

impl Disk {
    /// A disk whose writes go to the image.
    pub fn persistent(image: impl Into<PathBuf>) -> Self {
        Self {
            path: image.into(),
            writes: Writes::Kept,
            serial: None,
        }
    }

    /// A disk whose writes are kept in temporary space, until the machine ends. Several machines
    /// may use the image at once.
    pub fn scratch(image: impl Into<PathBuf>) -> Self {
        Self {
            path: image.into(),
            writes: Writes::Discarded,
            serial: None,
        }
    }

    /// A read-only disk. Several machines may use the image at once.
    pub fn read_only(image: impl Into<PathBuf>) -> Self {
        Self {
            path: image.into(),
            writes: Writes::Refused,
            serial: None,
        }
    }

    /// Sets the serial number, by which the machine can find the disk (at most 20 bytes).
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = Some(serial.into());
        self
    }

    /// The values of QEMU's `-blockdev`-like `-drive` and of its `-device` for the disk number
    /// `index`.
    pub(crate) fn arguments(&self, device: &str, index: usize) -> (String, String) {
        let path = self.path.to_string_lossy().replace(',', ",,");
        let writes = match self.writes {
            Writes::Kept => "",
            Writes::Discarded => ",snapshot=on",
            Writes::Refused => ",readonly=on",
        };
        let drive = format!("if=none,id=disk{index},format=raw,discard=unmap,file={path}{writes}");
        let serial = self
            .serial
            .clone()
            .unwrap_or_else(|| format!("disk{index}"));
        (drive, format!("{device},drive=disk{index},serial={serial}"))
    }
}
