//! The directory of a VM's disks while they come from another node.
//!
//! If the VM does not come, what has come of its disks is kept: the next time,
//! the monitors compare hashes, and only what differs is sent. A note in the
//! directory says which VM of which node it is for. What is kept is nobody's
//! data: it is removed after some days, when there are too many, and when other
//! disks are to be in its place.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, OFlags, SeekFrom, flock};
use serde::{Deserialize, Serialize};

use crate::cluster::identity::unix_seconds;
use crate::cluster::names::NodeName;
use crate::cluster::parcel::{Base, Blank};
use crate::failure::failure;
use crate::home::Home;
use crate::name::VmName;

/// How long the disks of a VM that has not come are kept.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Of so many VMs at most.
const MOST_KEPT: usize = 8;
/// So much of the node's disk is left free.
const SPARE: u64 = 64 << 20;
/// The file that says what a directory is for.
const NOTE: &str = "arrival.json";

/// Whose disks these are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// What the VM is known by, whatever it is called.
    pub(crate) id: String,
    /// The node that it comes from.
    pub(crate) from: NodeName,
}

/// What a directory is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    #[serde(flatten)]
    owner: Owner,
    /// A monitor may have the disks, and the guest. If nobody is left who knows
    /// whether it has got it, they are used for the same VM only.
    arriving: bool,
    /// Since when, in seconds of Unix time.
    since: u64,
}

impl Note {
    /// The note in `folder`, if there is one that can be read.
    fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(NOTE)).ok()?).ok()
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let new = folder.join("arrival.new");
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&new, folder.join(NOTE))
        };
        write().with_context(|| format!("cannot write {}", new.display()))
    }
}

/// The right to use or remove a directory.
fn lock(folder: &Path) -> Result<Option<File>> {
    let file = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot lock {}", folder.display()));
        }
    }
    // It may have been removed, and another made, before the lock was had.
    let held = file.metadata()?.ino();
    let same = fs::metadata(folder).is_ok_and(|now| now.ino() == held);
    Ok(same.then_some(file))
}

/// The directories with disks that came, or come, from other nodes.
fn folders(home: &Home) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.disks()).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut all: Vec<_> = paths.filter(|path| path.is_dir()).collect();
    all.sort();
    all
}

/// Removes what has been kept for long, and the oldest of too many.
pub(crate) fn prune(home: &Home) {
    let now = unix_seconds(SystemTime::now());
    let mut kept: Vec<_> = folders(home)
        .into_iter()
        .filter_map(|path| Some((Note::read(&path)?, path)))
        .filter(|(note, _)| !note.arriving)
        .collect();
    kept.sort_by_key(|(note, _)| std::cmp::Reverse(note.since));
    for (number, (note, path)) in kept.iter().enumerate() {
        let old = now.saturating_sub(note.since) > KEPT.as_secs();
        if old || number >= MOST_KEPT {
            let removed = remove_kept(path, None);
            if let Err(error) = removed {
                tracing::warn!("{error:#}");
            }
        }
    }
}

/// Removes what is kept of a VM's disks; how many bytes that were.
pub(super) fn discard(home: &Home, owner: &Owner) -> Result<u64> {
    let mut bytes = 0;
    for path in folders(home) {
        if Note::read(&path).is_some_and(|note| note.owner == *owner) {
            bytes += remove_kept(&path, Some(owner))?;
        }
    }
    Ok(bytes)
}

/// Removes a directory if it is, still, kept and not in use: for anybody, or for
/// this one. How many bytes that were.
fn remove_kept(folder: &Path, owner: Option<&Owner>) -> Result<u64> {
    let Some(_lock) = lock(folder)? else {
        return Ok(0);
    };
    match Note::read(folder) {
        Some(note) if !note.arriving && owner.is_none_or(|owner| *owner == note.owner) => {
            let bytes = content(folder);
            // The note last: without it they would be somebody's disks.
            for entry in fs::read_dir(folder)?.flatten() {
                if entry.file_name() != NOTE {
                    fs::remove_file(entry.path())?;
                }
            }
            fs::remove_dir_all(folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
            Ok(bytes)
        }
        _ => Ok(0),
    }
}

/// Bytes that the disks in it take.
fn content(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let images = entries.filter(|entry| entry.path().extension().is_some_and(|it| it == "img"));
    let blocks = images.filter_map(|image| Some(image.metadata().ok()?.blocks()));
    // In units of 512 bytes, whatever the file system's blocks are.
    blocks.sum::<u64>() * 512
}

/// Copies the first `len` bytes of a file, but for its holes.
fn copy_data(from: &mut File, to: &mut File, len: u64) -> std::io::Result<()> {
    let mut at = 0;
    loop {
        let data = match rustix::fs::seek(&*from, SeekFrom::Data(at)) {
            Ok(data) if data < len => data,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(&*from, SeekFrom::Hole(data))?.min(len);
        from.seek(std::io::SeekFrom::Start(data))?;
        to.seek(std::io::SeekFrom::Start(data))?;
        let copied = std::io::copy(&mut (&mut *from).take(hole - data), to)?;
        if copied == 0 {
            return Ok(());
        }
        at = data + copied;
    }
}

/// Whether there is room for so many bytes of disks.
pub(crate) fn is_room_for(folder: &Path, needed: u64) -> Result<()> {
    let space = rustix::fs::statvfs(folder).context("cannot tell how much room there is")?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free < needed.saturating_add(SPARE) {
        return Err(failure(
            format!(
                "the VM's disks take {} MiB, and {} has {} MiB left there",
                needed >> 20,
                folder.display(),
                free >> 20
            ),
            "make room there, or mount a larger volume at the directory above",
        ));
    }
    Ok(())
}

/// The directory of the disks of a VM that comes.
pub(super) struct Folder {
    path: PathBuf,
    note: Note,
    /// Files that are not kept.
    files: Vec<PathBuf>,
    settled: bool,
    _lock: File,
}

impl Folder {
    /// Makes the disks, from their bases if they have some, or takes those that were
    /// kept; `files` bytes come besides.
    ///
    /// # Errors
    /// There are others in their place, or there is no room.
    pub(super) fn open(
        home: &Home,
        name: &VmName,
        owner: Owner,
        (disks, bases): (&[Blank], &[Base]),
        files: u64,
    ) -> Result<Self> {
        prune(home);
        let path = home.disks().join(name.as_str());
        let context = || format!("cannot make {}", path.display());
        let mut above = DirBuilder::new();
        above.recursive(true).mode(0o700);
        above.create(home.disks()).with_context(context)?;
        let lock = match Self::find(home, &owner, &path)? {
            Some(lock) => lock,
            None => Self::make(&path)?,
        };
        let note = Note {
            owner,
            arriving: false,
            since: unix_seconds(SystemTime::now()),
        };
        note.write(&path)?;
        let folder = Self {
            path,
            note,
            files: Vec::new(),
            settled: false,
            _lock: lock,
        };
        folder.make_disks(disks)?;
        for base in bases {
            let disk = disks.iter().find(|disk| disk.index == base.index);
            if let Some(disk) = disk {
                folder.lay(home, disk, &base.name)?;
            }
        }
        folder.check_room(disks, files)?;
        Ok(folder)
    }

    /// The lock of what is kept for this VM, which is at `path` then.
    fn find(home: &Home, owner: &Owner, path: &Path) -> Result<Option<File>> {
        let of_it = |found: &PathBuf| Note::read(found).is_some_and(|note| note.owner == *owner);
        for found in folders(home).into_iter().filter(of_it) {
            // A VM that has them, whatever became of it.
            let taken = found
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            if taken.is_some_and(|name: VmName| home.existing(&name).is_ok()) {
                continue;
            }
            let Some(lock) = lock(&found)? else {
                return Err(failure(
                    "the VM comes there already, for another command",
                    "wait for that to end, then try again",
                ));
            };
            if found == path {
                return Ok(Some(lock));
            }
            if !path.exists() {
                fs::rename(&found, path)
                    .with_context(|| format!("cannot rename {}", found.display()))?;
                return Ok(Some(lock));
            }
        }
        Ok(None)
    }

    /// A new directory at `path`; what is kept there is for another VM, and goes.
    fn make(path: &Path) -> Result<File> {
        let context = || format!("cannot make {}", path.display());
        if Note::read(path).is_some() {
            remove_kept(path, None)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(failure(
                    format!(
                        "there are disks of an earlier VM of that name in {} there",
                        path.display()
                    ),
                    "take another name with --as, or delete them if nobody needs them",
                ));
            }
            made => made.with_context(context)?,
        }
        lock(path)?.with_context(context)
    }

    /// Leaves the disks that are as long as these, and nothing else; makes those
    /// that are missing.
    fn make_disks(&self, disks: &[Blank]) -> Result<()> {
        let context = || format!("cannot make the disks in {}", self.path.display());
        for entry in fs::read_dir(&self.path).with_context(context)?.flatten() {
            let (path, meta) = (entry.path(), entry.metadata().with_context(context)?);
            let wanted = disks.iter().find(|disk| self.disk(disk.index) == path);
            let fits = wanted.is_some_and(|disk| meta.is_file() && meta.len() == disk.capacity);
            if !fits && entry.file_name() != NOTE {
                fs::remove_file(&path).with_context(context)?;
            }
        }
        for disk in disks {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(OFlags::NOFOLLOW.bits() as i32);
            let file = options.open(self.disk(disk.index)).with_context(context)?;
            file.set_len(disk.capacity).with_context(context)?;
        }
        Ok(())
    }

    /// Puts the content of a base on a new disk. Nobody believes that it is the
    /// disk's: it is compared, as what is kept is.
    fn lay(&self, home: &Home, disk: &Blank, name: &str) -> Result<()> {
        let place = home.bases().join(name);
        if name.contains('/') || name.starts_with('.') || name.is_empty() {
            return Err(failure(
                format!("'{name}' is not the name of a base"),
                "name a file in /var/lib/blanket/bases there, without its path",
            ));
        }
        let path = self.disk(disk.index);
        let context = || format!("cannot lay {} under a disk", place.display());
        let mut to = File::options()
            .write(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .with_context(context)?;
        if to.metadata().with_context(context)?.blocks() > 0 {
            // Of a migration that was broken off: that is more.
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        options.read(true).custom_flags(flags.bits() as i32);
        let mut from = match options.open(&place) {
            Ok(from) => from,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(failure(
                    format!("there is no base '{name}' there"),
                    "put a raw image in /var/lib/blanket/bases of that node, or leave --base out",
                ));
            }
            Err(error) => return Err(error).with_context(context),
        };
        let meta = from.metadata().with_context(context)?;
        if !meta.is_file() {
            return Err(failure(
                format!("the base '{name}' there is no file"),
                "put a raw image there",
            ));
        }
        // If it can, the file system shares what is in it.
        if meta.len() <= disk.capacity && rustix::fs::ioctl_ficlone(&to, &from).is_ok() {
            return to.set_len(disk.capacity).with_context(context);
        }
        is_room_for(&self.path, (meta.blocks() * 512).min(disk.capacity))?;
        copy_data(&mut from, &mut to, meta.len().min(disk.capacity)).with_context(context)
    }

    fn check_room(&self, disks: &[Blank], files: u64) -> Result<()> {
        let needed = disks.iter().map(|blank| blank.used.min(blank.capacity));
        let needed = needed.fold(files, u64::saturating_add);
        is_room_for(&self.path, needed.saturating_sub(content(&self.path)))
    }

    /// Where the disk of this number is.
    pub(super) fn disk(&self, index: usize) -> PathBuf {
        self.path.join(format!("{index}.img"))
    }

    /// A file in it that is not kept.
    pub(super) fn not_kept(&mut self, path: PathBuf) {
        self.files.push(path);
    }

    /// A monitor has the disks from now on.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.note.arriving = true;
        self.note.write(&self.path)
    }

    /// The guest has come, or may have: they are a VM's disks.
    pub(super) fn settle(mut self) -> Result<()> {
        self.settled = true;
        let note = self.path.join(NOTE);
        fs::remove_file(&note).with_context(|| format!("cannot remove {}", note.display()))
    }

    /// The guest has not come for certain: keeps what has come of its disks.
    fn keep(&mut self) -> Result<()> {
        for file in self.files.drain(..) {
            let _ = fs::remove_file(file);
        }
        self.note.arriving = false;
        self.note.write(&self.path)?;
        if content(&self.path) == 0 {
            fs::remove_dir_all(&self.path)
                .with_context(|| format!("cannot remove {}", self.path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.settled
            && let Err(error) = self.keep()
        {
            tracing::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::locate(Some(dir.path())).unwrap();
        (dir, home)
    }

    fn owner(id: &str, from: &str) -> Owner {
        Owner {
            id: id.to_owned(),
            from: from.parse().unwrap(),
        }
    }

    const DISK: Blank = Blank {
        index: 1,
        capacity: 1 << 20,
        used: 1 << 20,
    };

    fn open(home: &Home, name: &str, owner: &Owner) -> Result<Folder> {
        let parts = (&[DISK][..], &[][..]);
        Folder::open(home, &name.parse().unwrap(), owner.clone(), parts, 0)
    }

    /// One that was broken off when something had come.
    fn broken(home: &Home, name: &str, owner: &Owner, content: &str) {
        let folder = open(home, name, owner).unwrap();
        let mut bytes = content.as_bytes().to_vec();
        bytes.resize(DISK.capacity as usize, 0);
        fs::write(folder.disk(1), bytes).unwrap();
    }

    fn has(folder: &Folder, content: &str) -> bool {
        let bytes = fs::read(folder.disk(1)).unwrap();
        assert_eq!(bytes.len() as u64, DISK.capacity);
        bytes.starts_with(content.as_bytes())
    }

    #[test]
    fn what_is_kept_is_for_the_same_vm_of_the_same_node_whatever_it_is_called() {
        let (_dir, home) = home();
        let web = owner("a1", "alpha");
        broken(&home, "web", &web, "content");
        // Others do not get it.
        for other in [owner("a2", "alpha"), owner("a1", "beta")] {
            let folder = open(&home, "other", &other).unwrap();
            assert!(!has(&folder, "content"));
        }
        let folder = open(&home, "site", &web).unwrap();
        assert!(has(&folder, "content"));
        assert!(open(&home, "site", &web).is_err(), "one at a time");
        drop(folder);
        assert!(!home.disks().join("web").exists());
        // One of another size is of no use.
        let large = Blank {
            capacity: 2 << 20,
            ..DISK
        };
        let name = "site".parse().unwrap();
        let folder = Folder::open(&home, &name, web, (&[large], &[]), 0).unwrap();
        assert_eq!(content(&home.disks().join("site")), 0);
        drop(folder);
        assert!(!home.disks().join("site").exists());
    }

    #[test]
    fn a_new_disk_has_what_its_base_has_whatever_its_size() {
        let (_dir, home) = home();
        fs::create_dir(home.bases()).unwrap();
        let len = DISK.capacity as usize;
        // Holes, too.
        let mut bytes = vec![0; 2 * len];
        bytes[..5000].fill(1);
        bytes[700_000..].fill(2);
        for (number, size) in [len / 2, len, 2 * len].into_iter().enumerate() {
            let base = home.bases().join("base.img");
            fs::write(&base, &bytes[..size]).unwrap();
            let of = |name: &str| {
                let base = Base {
                    index: 1,
                    name: name.to_owned(),
                };
                let web = owner(&number.to_string(), "alpha");
                let name = format!("vm{number}").parse().unwrap();
                Folder::open(&home, &name, web, (&[DISK], &[base]), 0)
            };
            for wrong in ["other", "../bases/base.img", ".base", ""] {
                assert!(of(wrong).is_err(), "{wrong}");
            }
            let folder = of("base.img").unwrap();
            let mut wanted = bytes[..size.min(len)].to_vec();
            wanted.resize(len, 0);
            assert!(fs::read(folder.disk(1)).unwrap() == wanted);
            // What was kept since stays.
            fs::write(folder.disk(1), vec![3; len]).unwrap();
            drop(folder);
            let folder = of("base.img").unwrap();
            assert!(fs::read(folder.disk(1)).unwrap() == vec![3; len]);
            drop(folder);
        }
        let link = home.bases().join("link");
        std::os::unix::fs::symlink("/etc/hostname", link).unwrap();
        let base = Base {
            index: 1,
            name: "link".to_owned(),
        };
        let name = "thief".parse().unwrap();
        let web = owner("9", "alpha");
        assert!(Folder::open(&home, &name, web, (&[DISK], &[base]), 0).is_err());
    }

    #[test]
    fn disks_that_are_a_vms_are_never_replaced() {
        let (_dir, home) = home();
        let web = owner("a1", "alpha");
        broken(&home, "web", &web, "content");
        let folder = open(&home, "web", &web).unwrap();
        folder.settle().unwrap();
        for owner in [&web, &owner("a2", "alpha")] {
            let error = open(&home, "web", owner).err().unwrap().to_string();
            assert!(error.contains("disks of an earlier VM"), "{error}");
        }
        assert_eq!(discard(&home, &web).unwrap(), 0);
        assert!(home.disks().join("web/1.img").exists());
    }

    #[test]
    fn disks_of_a_vm_that_may_have_come_are_for_that_one_only() {
        let (_dir, home) = home();
        let web = owner("a1", "alpha");
        broken(&home, "web", &web, "content");
        let mut folder = open(&home, "web", &web).unwrap();
        folder.begin().unwrap();
        // As when the process is killed.
        folder.settled = true;
        drop(folder);
        let path = home.disks().join("web");
        assert!(Note::read(&path).unwrap().arriving);
        prune(&home);
        assert!(remove_kept(&path, None).is_ok() && path.join("1.img").exists());
    }

    #[test]
    fn what_is_kept_is_bounded_in_time_and_number_and_can_be_discarded() {
        let (_dir, home) = home();
        for n in 0..MOST_KEPT + 3 {
            broken(
                &home,
                &format!("vm{n}"),
                &owner(&n.to_string(), "alpha"),
                "x",
            );
            prune(&home);
        }
        assert_eq!(folders(&home).len(), MOST_KEPT);
        let last = home.disks().join(format!("vm{}", MOST_KEPT + 2));
        let mut note = Note::read(&last).unwrap();
        note.since -= KEPT.as_secs() + 1;
        note.write(&last).unwrap();
        prune(&home);
        assert!(!last.exists());
        assert_eq!(folders(&home).len(), MOST_KEPT - 1);
        let path = folders(&home).remove(0);
        let note = Note::read(&path).unwrap();
        assert!(discard(&home, &note.owner).unwrap() >= DISK.capacity);
        assert!(!path.exists());
    }
}
