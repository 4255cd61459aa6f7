//! A disk with programs that put guests under load.

use std::fs;
use std::path::PathBuf;

use super::add_packages;
use crate::cache::{self, Key};
use crate::error::{Context, Result};
use crate::packages::Set;
use crate::payload;
use crate::tree::Tree;

/// What the disk consists of.
const PACKAGES: [&str; 4] = ["stress-ng", "fio", "iperf3", "busybox-static"];

/// An ext4 image with a root for `chroot`, in which there are stress-ng, fio and iperf3.
///
/// # Errors
/// When the packages cannot be downloaded or unpacked.
pub fn workloads() -> Result<PathBuf> {
    let packages = Set::closure(&PACKAGES)?;
    let key = Key::default()
        .with(packages.identity())
        .with(include_bytes!("workloads.rs"))
        .with(include_bytes!("mod.rs"))
        .with(include_bytes!("../payload.rs"));
    let folder = cache::entry("workloads", key, |folder| {
        let mut tree = Tree::new();
        add_packages(&mut tree, &packages)?;
        tree.link("usr/bin/sh", "busybox");
        let files = payload::subfolder(folder, "files")?;
        tree.write_folder(&files)?;
        payload::make(&files, &folder.join("workloads.ext4"))?;
        fs::remove_dir_all(&files).context(|| format!("cannot remove {}", files.display()))
    })?;
    Ok(folder.join("workloads.ext4"))
}
