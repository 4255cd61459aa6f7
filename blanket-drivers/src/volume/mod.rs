//! The block devices of this machine: what each is, can do, and is used for,
//! and what serves it best.
//!
//! [`list`] reads what the kernel says (`/sys/block`); a [`Cache`] adds the
//! self-test of the engines ([`crate::store::measure`]). What devices say about
//! themselves is text from strangers: bounded, and one plain line each.

mod cache;
mod sysfs;
#[cfg(test)]
mod tests;
mod uses;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use cache::{Cache, Key, Record};

use crate::provider::{self, DiskFacts, Instance, Place};
use sysfs::Folder;

/// So many devices are looked at.
const DEVICES: usize = 1024;

/// A volume or disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// The kernel's name for it, like `nvme0n1`.
    pub name: String,
    /// Where it is opened.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// What it calls itself.
    pub model: Option<String>,
    /// Who made it.
    pub vendor: Option<String>,
    /// Its number.
    pub serial: Option<String>,
    /// Driver of the controller that it hangs on.
    pub driver: Option<String>,
    /// What becomes of its content.
    pub place: Place,
    /// What tells that.
    pub told_by: String,
    /// Whether it cannot be written.
    pub readonly: bool,
    /// What it is used for now; nothing if it is free.
    pub uses: Vec<String>,
    /// What it can do.
    pub limits: Limits,
}

/// What a device can do, as far as the kernel tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Smallest unit of I/O in bytes: what direct I/O is aligned to.
    pub logical_block: Option<u32>,
    /// Unit in bytes that is written at once below.
    pub physical_block: Option<u32>,
    /// Best length of a request in bytes, if it has one.
    pub optimal_io: Option<u64>,
    /// Largest request in bytes.
    pub largest_io: Option<u64>,
    /// Whether it turns.
    pub rotational: bool,
    /// Whether what it has completed may be lost until it is flushed.
    pub volatile_cache: Option<bool>,
    /// Whether a single write can be made durable without a flush of all (FUA).
    pub fua: bool,
    /// Largest discard in bytes; 0 if it knows none.
    pub discard: u64,
    /// Largest range in bytes that it writes zeros to by itself; 0 if none.
    pub write_zeroes: u64,
    /// Its queues.
    pub queues: usize,
    /// Whether it has queues whose completions can be polled for.
    pub polled: bool,
}

/// Every volume and disk of the machine whose `sys` and `proc` are in `root`,
/// which is of the provider of this name ([`provider::Report::provider`]).
#[must_use]
pub fn list(root: &Path, provider: &str) -> Vec<Volume> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/block")) else {
        return Vec::new();
    };
    let names = entries.flatten().take(DEVICES);
    let mut names: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_volume(name))
        .collect();
    // As people count: by kind, then sdb before sdaa.
    names.sort_by_key(|name| (name[..2].to_owned(), name.len(), name.clone()));
    let in_use = uses::Table::read(root);
    let volumes = names.iter().filter_map(|name| {
        let folder = Folder::new(root.join("sys/block").join(name));
        read(&folder, name, provider, &in_use)
    });
    volumes.collect()
}

impl Volume {
    /// Whether it is a disk of Xen of which nothing is known.
    #[must_use]
    pub fn is_xens(&self) -> bool {
        self.place == Place::Unknown && self.name.starts_with("xvd")
    }
}

/// Tells disks apart that do not tell it themselves, by what their provider
/// tells of the machine.
pub fn tell_apart(volumes: &mut [Volume], instance: &Instance) {
    let Some(stores) = &instance.instance_stores else {
        return;
    };
    for volume in volumes.iter_mut().filter(|it| it.is_xens()) {
        volume.place = match stores.contains(&volume.name) {
            true => Place::InstanceStore,
            false => Place::Network,
        };
        "the metadata service".clone_into(&mut volume.told_by);
    }
}

/// Whether a block device of this name is a disk: no part of one, and nothing
/// that the kernel has made up.
fn is_volume(name: &str) -> bool {
    let letters =
        |rest: &str| (1..=4).contains(&rest.len()) && rest.bytes().all(|c| c.is_ascii_lowercase());
    let number =
        |text: &str| (1..=6).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_digit());
    if let Some(rest) = name.strip_prefix("nvme") {
        return rest
            .split_once('n')
            .is_some_and(|(a, b)| number(a) && number(b));
    }
    ["xvd", "vd", "sd"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .is_some_and(letters)
}

fn read(folder: &Folder, name: &str, provider: &str, in_use: &uses::Table) -> Option<Volume> {
    let size = folder.number("size")?.checked_mul(512)?;
    // A card reader without a card.
    if size == 0 {
        return None;
    }
    let model = folder.text("device/model");
    // Virtio's is a number of PCI's.
    let vendor = folder
        .text("device/vendor")
        .filter(|it| !it.starts_with("0x"));
    let path = folder.device_path();
    let (place, told_by) = match folder.text("device/transport") {
        Some(fabric) if fabric != "pcie" => (Place::Network, format!("NVMe over {fabric}")),
        _ => provider::place(
            provider,
            &DiskFacts {
                model: model.clone(),
                vendor: vendor.clone(),
                path,
            },
        ),
    };
    Some(Volume {
        name: name.to_owned(),
        path: Path::new("/dev").join(name),
        size,
        serial: folder.serial(),
        driver: folder.driver(),
        readonly: folder.number("ro") == Some(1),
        uses: uses::of(folder, name, in_use),
        limits: limits(folder),
        model,
        vendor,
        place,
        told_by,
    })
}

fn limits(folder: &Folder) -> Limits {
    let block = |name: &str| {
        let bytes = u32::try_from(folder.number(name)?).ok()?;
        let sound = bytes.is_power_of_two() && (512..=1 << 20).contains(&bytes);
        sound.then_some(bytes)
    };
    let is = |name: &str, wanted: u64| folder.number(name) == Some(wanted);
    let kib = folder.number("queue/max_sectors_kb");
    Limits {
        logical_block: block("queue/logical_block_size"),
        physical_block: block("queue/physical_block_size"),
        optimal_io: folder.number("queue/optimal_io_size").filter(|n| *n > 0),
        largest_io: kib.and_then(|kib| kib.checked_mul(1024)),
        rotational: is("queue/rotational", 1),
        volatile_cache: match folder.text("queue/write_cache").as_deref() {
            Some("write back") => Some(true),
            Some("write through") => Some(false),
            _ => None,
        },
        fua: is("queue/fua", 1),
        discard: folder.number("queue/discard_max_bytes").unwrap_or(0),
        write_zeroes: folder.number("queue/write_zeroes_max_bytes").unwrap_or(0),
        queues: folder.children("mq").len(),
        polled: is("queue/io_poll", 1),
    }
}
