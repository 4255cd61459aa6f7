//! Disks that are on storage which both nodes have, by the same paths.
//!
//! The node that the VM leaves says which paths, and puts a file of random bytes
//! beside each disk. The other one looks for them in the directories that its
//! own administrator has named, and nowhere else; where the random bytes are,
//! the directory is the same.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use blanket_vmm::config::VmConfig;
use rustix::fs::OFlags;

use crate::cluster::parcel::{MAX_ITEMS, Shared};
use crate::daemon::random_text;
use crate::failure::failure;

/// What markers' names begin with.
const MARKER: &str = ".blanket-";

/// A file beside a disk, removed when this is dropped.
pub(super) struct Marker(PathBuf);

impl Drop for Marker {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Marks the directories of all disks of a VM.
///
/// # Errors
/// A disk is no file, or its directory cannot be written.
pub(super) fn mark(config: &VmConfig) -> Result<(Vec<Shared>, Vec<Marker>)> {
    let mut all = Vec::new();
    let mut markers = Vec::new();
    for (index, disk) in config.disk.iter().enumerate() {
        let path = fs::canonicalize(&disk.path)
            .with_context(|| format!("cannot find {}", disk.path.display()))?;
        let meta = fs::metadata(&path)?;
        let folder = path
            .parent()
            .filter(|_| meta.is_file() && disk.stripe.is_empty());
        let Some(folder) = folder else {
            return Err(failure(
                format!("the disk {} is no image file", path.display()),
                "only files on storage that both nodes have can be shared: leave out --shared-disks",
            ));
        };
        let (name, nonce) = (format!("{MARKER}{}", random_text()?), random_text()?);
        let marker = folder.join(&name);
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&marker);
        let mut file = file.with_context(|| format!("cannot mark {}", folder.display()))?;
        markers.push(Marker(marker.clone()));
        let written = file
            .write_all(nonce.as_bytes())
            .and_then(|()| file.sync_all());
        written.with_context(|| format!("cannot write {}", marker.display()))?;
        all.push(Shared {
            index,
            path,
            len: meta.len(),
            marker: name,
            nonce,
        });
    }
    Ok((all, markers))
}

/// Finds the disks here, in one of the directories that may be used.
///
/// # Errors
/// One is not there, not the same, or may not be used.
pub(super) fn find(shared: &[Shared], allowed: &[PathBuf]) -> Result<Vec<(usize, PathBuf)>> {
    anyhow::ensure!(shared.len() <= MAX_ITEMS, "the VM has too many disks");
    let one = |shared: &Shared| Ok((shared.index, find_one(shared, allowed)?));
    shared.iter().map(one).collect()
}

fn find_one(shared: &Shared, allowed: &[PathBuf]) -> Result<PathBuf> {
    let shown = shared.path.display();
    let may = |path: &Path| {
        let mut folders = allowed.iter().filter_map(|it| fs::canonicalize(it).ok());
        folders.any(|folder| path.starts_with(folder))
    };
    let refused = || {
        failure(
            format!("no disks of other nodes' may be used at {shown} there"),
            "name the directory to the blanketd there, if it is the same on both nodes (blanketd --shared DIR); or leave out --shared-disks",
        )
    };
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    // Nobody is told whether there are files elsewhere.
    if !shared.path.is_absolute()
        || !shared.path.components().all(plain)
        || !allowed.iter().any(|folder| {
            let real = fs::canonicalize(folder);
            shared.path.starts_with(folder) || real.is_ok_and(|it| shared.path.starts_with(it))
        })
    {
        return Err(refused());
    }
    let gone = || {
        failure(
            format!("{shown} is not the same file there"),
            "check that both nodes have the same storage at that path; or leave out --shared-disks",
        )
    };
    let path = fs::canonicalize(&shared.path).map_err(|_| gone())?;
    if !may(&path) {
        return Err(refused());
    }
    let name = shared.marker.strip_prefix(MARKER).unwrap_or_default();
    let named = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let folder = path.parent().filter(|_| named).ok_or_else(gone)?;
    let meta = fs::metadata(&path)?;
    let same = meta.is_file()
        && meta.len() == shared.len
        && shared.nonce.len() >= 32
        && read(&folder.join(&shared.marker)).is_some_and(|nonce| nonce == shared.nonce);
    same.then_some(path).ok_or_else(gone)
}

/// What is in a marker.
fn read(path: &Path) -> Option<String> {
    let mut options = File::options();
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    options.read(true).custom_flags(flags as i32);
    let mut text = String::new();
    let file = options.open(path).ok()?;
    file.take(64).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use blanket_vmm::config::DiskConfig;

    use super::*;

    fn disk(path: &Path) -> DiskConfig {
        fs::write(path, vec![7; 4096]).unwrap();
        toml::from_str(&format!("path = {path:?}")).unwrap()
    }

    #[test]
    fn a_shared_disk_is_found_where_that_is_allowed_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let folders = ["mine", "other"].map(|name| dir.path().join(name));
        folders.iter().for_each(|it| fs::create_dir(it).unwrap());
        let [mine, other] = &folders;
        let config = VmConfig {
            disk: vec![disk(&mine.join("disk"))],
            ..VmConfig::default()
        };
        let (shared, markers) = mark(&config).unwrap();
        let real = fs::canonicalize(mine.join("disk")).unwrap();
        let found = find(&shared, &[other.clone(), mine.clone()]).unwrap();
        assert_eq!(found, [(0, real.clone())]);
        let alone = std::slice::from_ref::<PathBuf>;
        let fails = |shared: &Shared, allowed: &[PathBuf], why: &str| {
            let error = find(std::slice::from_ref(shared), allowed)
                .unwrap_err()
                .to_string();
            assert!(error.contains(why), "{error}");
        };
        fails(&shared[0], &[], "no disks of other nodes'");
        fails(&shared[0], alone(other), "no disks of other nodes'");
        let at = |path: PathBuf| Shared {
            path,
            ..shared[0].clone()
        };
        // Out of it, on three ways.
        let out = mine.join("../other/disk");
        fails(&at(out), alone(mine), "no disks of other nodes'");
        std::os::unix::fs::symlink(&real, other.join("link")).unwrap();
        fails(
            &at(other.join("link")),
            alone(other),
            "no disks of other nodes'",
        );
        fails(&at("disk".into()), alone(mine), "no disks of other nodes'");
        // Another file of that name.
        disk(&other.join("disk"));
        fails(&at(other.join("disk")), alone(other), "not the same file");
        for other in [
            Shared {
                nonce: "0".repeat(32),
                ..shared[0].clone()
            },
            Shared {
                nonce: String::new(),
                ..shared[0].clone()
            },
            Shared {
                marker: "disk".into(),
                ..shared[0].clone()
            },
            Shared {
                marker: format!("{MARKER}/../disk"),
                ..shared[0].clone()
            },
            Shared {
                len: 4097,
                ..shared[0].clone()
            },
        ] {
            fails(&other, alone(mine), "not the same file");
        }
        drop(markers);
        assert_eq!(fs::read_dir(mine).unwrap().count(), 1);
        fails(&shared[0], alone(mine), "not the same file");
    }
}
