//! A device's folder in sysfs.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::provider::clean;

/// A file is read up to here, in bytes: those of sysfs have one page at most.
const FILE: u64 = 4096;

/// So many entries of a folder are looked at.
const ENTRIES: usize = 4096;

/// So far a device is from its controller's driver, at most.
const DEPTH: usize = 16;

/// `/sys/block/NAME`.
pub(super) struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`.
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// A folder in it.
    pub(super) fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    fn bytes(&self, file: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(self.0.join(file)).ok()?;
        file.take(FILE).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// What a file says, as one plain line.
    pub(super) fn text(&self, file: &str) -> Option<String> {
        clean(&self.bytes(file)?)
    }

    /// What a file says, as a number.
    pub(super) fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.parse().ok()
    }

    /// Names in a folder in it.
    pub(super) fn children(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(folder)).into_iter().flatten();
        let names = entries.flatten().take(ENTRIES);
        names
            .filter_map(|entry| clean(entry.file_name().as_encoded_bytes()))
            .collect()
    }

    /// Whether there is such a file.
    pub(super) fn has(&self, file: &str) -> bool {
        self.0.join(file).exists()
    }

    /// The device's own number or name.
    pub(super) fn serial(&self) -> Option<String> {
        let page = || {
            // SCSI's "unit serial number" page, behind its header (SPC-5, 7.7.16).
            let bytes = self.bytes("device/vpd_pg80")?;
            clean(bytes.get(4..)?)
        };
        let told = ["device/serial", "serial"];
        told.iter().find_map(|file| self.text(file)).or_else(page)
    }

    /// Where it is plugged in.
    pub(super) fn device_path(&self) -> Option<String> {
        let path = fs::canonicalize(self.0.join("device")).ok()?;
        clean(path.as_os_str().as_encoded_bytes())
    }

    /// The driver of the controller that it hangs on: not that of disks as such.
    pub(super) fn driver(&self) -> Option<String> {
        let device = fs::canonicalize(self.0.join("device")).ok()?;
        let drivers = device.ancestors().take(DEPTH).filter_map(|folder| {
            let driver = fs::read_link(folder.join("driver")).ok()?;
            clean(
                Path::new(driver.file_name()?)
                    .as_os_str()
                    .as_encoded_bytes(),
            )
        });
        drivers.into_iter().find(|driver| driver != "sd")
    }
}
