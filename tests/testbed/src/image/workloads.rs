//! Disks with programs for guests that have none.

use std::fs;
use std::path::PathBuf;

use super::add_packages;
use crate::cache::{self, Key};
use crate::error::{Context, Result};
use crate::packages::Set;
use crate::payload;
use crate::tree::Tree;

/// Programs that put guests under load.
const WORKLOADS: [&str; 4] = ["stress-ng", "fio", "iperf3", "busybox-static"];

/// Programs that tell what a machine has.
const INSPECTION: [&str; 5] = [
    "util-linux",
    "pciutils",
    "iproute2",
    "libgcc-s1",
    "busybox-static",
];

/// An ext4 image with a root for `chroot`, in which there are stress-ng, fio and iperf3.
///
/// # Errors
/// When the packages cannot be downloaded or unpacked.
pub fn workloads() -> Result<PathBuf> {
    disk("workloads", &WORKLOADS)
}

/// An ext4 image with a root for `chroot`, in which there are lspci, lscpu, lsblk and ip.
///
/// # Errors
/// When the packages cannot be downloaded or unpacked.
pub fn inspection() -> Result<PathBuf> {
    disk("inspection", &INSPECTION)
}

fn disk(kind: &str, names: &[&str]) -> Result<PathBuf> {
    let packages = Set::closure(names)?;
    let key = Key::default()
        .with(packages.identity())
        .with(include_bytes!("workloads.rs"))
        .with(include_bytes!("mod.rs"))
        .with(include_bytes!("../payload.rs"));
    let image = format!("{kind}.ext4");
    let folder = cache::entry(kind, key, |folder| {
        let mut tree = Tree::new();
        add_packages(&mut tree, &packages)?;
        tree.link("usr/bin/sh", "busybox");
        let files = payload::subfolder(folder, "files")?;
        tree.write_folder(&files)?;
        payload::make(&files, &folder.join(&image))?;
        fs::remove_dir_all(&files).context(|| format!("cannot remove {}", files.display()))
    })?;
    Ok(folder.join(image))
}
