//! Where this node keeps replicas of other nodes' VMs.
//!
//! ```text
//! STATE/disks/.standby/NAME/
//!   replica.json      whose it is, how the VM is configured, its last point
//!   kernel, initrd    what it starts from
//!   N.img             its disks, as they were at that point
//!   journal           the next point, whole: to be put on the disks
//!   journal.SESSION   one that is still coming
//!   lock              held by who touches the disks
//! ```
//!
//! What has become a `journal` is the last point, whatever happens then. Each
//! connection has a session's name of its own: the last one counts, so that one
//! of which nobody knows yet that it is dead does no harm.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use blanket_migration::{Disk, Disks, Journal, Point, Replica, replay};
use blanket_vmm::config::VmConfig;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::image::Image;
use crate::cluster::parcel::Blank;
use crate::commands::migrate::folder::Owner;
use crate::failure::failure;
use crate::home::Home;
use crate::name::VmName;

/// How long another one may be at work on a replica.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of a replica.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Whose it is.
    #[serde(flatten)]
    pub(crate) owner: Owner,
    /// What the VM is called where it runs.
    pub(crate) name: String,
    /// How it is configured there.
    pub(super) config: Option<VmConfig>,
    /// Its disks.
    pub(super) disks: Vec<Blank>,
    /// The last point; none before the first one is whole.
    pub(crate) point: Option<Point>,
    /// The connection that counts.
    pub(super) session: String,
}

impl Record {
    /// Milliseconds since the last point.
    pub(crate) fn age_ms(&self) -> Option<u64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let now = u64::try_from(now.as_millis()).ok()?;
        self.point.map(|point| now.saturating_sub(point.at_ms))
    }
}

/// The right to touch a replica's disks.
pub(super) struct Lock {
    _file: File,
}

/// A replica's directory.
#[derive(Clone)]
pub(crate) struct Store {
    pub(crate) path: PathBuf,
}

impl Store {
    /// The one of this name, which need not exist.
    pub(crate) fn of(home: &Home, name: &VmName) -> Self {
        Self {
            path: home.standby().join(name.as_str()),
        }
    }

    /// All of them, by name.
    pub(crate) fn all(home: &Home) -> Vec<(VmName, Self)> {
        let entries = fs::read_dir(home.standby()).into_iter().flatten().flatten();
        let mut names: Vec<VmName> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        let store = |name: VmName| (name.clone(), Self::of(home, &name));
        names.into_iter().map(store).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.file("journal")
    }

    pub(super) fn image(&self, index: usize) -> PathBuf {
        self.file(&format!("{index}.img"))
    }

    /// What is known of it; none if there is no such replica.
    pub(crate) fn read(&self) -> Result<Option<Record>> {
        let path = self.file("replica.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let record = serde_json::from_slice(&bytes);
        record
            .map(Some)
            .with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes what is known, whole or not at all.
    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let (path, new) = (self.file("replica.json"), self.file("replica.new"));
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            self.sync()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// What the names in it stand for is durable.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Takes the lock.
    ///
    /// # Errors
    /// Somebody has it for long, or there is no such replica (any more).
    pub(super) fn lock(&self) -> Result<Lock> {
        let path = self.file("lock");
        let context = || format!("cannot lock {}", path.display());
        let end = Instant::now() + PATIENCE;
        loop {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).with_context(context)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    // It may have been moved away before the lock was had.
                    let held = file.metadata()?.ino();
                    if fs::metadata(&path).is_ok_and(|now| now.ino() == held) {
                        return Ok(Lock { _file: file });
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(failure(
                        format!("the replica in {} is being made", self.path.display()),
                        "wait for its first point",
                    ));
                }
                Err(error) => return Err(error).with_context(context),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes its directory.
    pub(super) fn make(&self) -> Result<()> {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&self.path);
        made.with_context(|| format!("cannot make {}", self.path.display()))
    }

    /// Its disks.
    pub(super) fn images(&self, disks: &[Blank]) -> Result<Vec<Image>> {
        let open = |disk: &Blank| {
            let path = self.image(disk.index);
            let image = Image::open(&path, disk.capacity);
            image.with_context(|| format!("the replica's disk {}", path.display()))
        };
        disks.iter().map(open).collect()
    }

    /// Puts a journal that is whole on the disks. For who has the lock.
    pub(super) fn settle(&self, record: &mut Record, disks: &Disks) -> Result<()> {
        let journal = self.journal();
        if !journal.exists() {
            return Ok(());
        }
        let point = replay(&journal, disks)
            .with_context(|| format!("the replica's journal {}", journal.display()))?;
        record.point = Some(point);
        self.write(record)?;
        fs::remove_file(&journal).with_context(|| format!("cannot remove {}", journal.display()))
    }

    /// Removes journals that never became whole.
    pub(super) fn tidy(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("journal."))
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// A connection that brings points.
pub(super) struct Session {
    store: Store,
    name: String,
    disks: Vec<Arc<dyn Disk>>,
    /// There has been a point.
    has_point: AtomicBool,
    /// Held as long as there has not: what comes goes to the disks.
    held: Mutex<Option<Lock>>,
}

impl Session {
    /// Of a replica that has been made, by who has its lock.
    pub(super) fn new(
        store: Store,
        record: &Record,
        disks: Vec<Arc<dyn Disk>>,
        lock: Lock,
    ) -> Self {
        let has_point = record.point.is_some();
        Self {
            store,
            name: record.session.clone(),
            disks,
            has_point: AtomicBool::new(has_point),
            held: Mutex::new(Some(lock).filter(|_| !has_point)),
        }
    }

    fn coming(&self) -> PathBuf {
        self.store.file(&format!("journal.{}", self.name))
    }

    fn has_point(&self) -> bool {
        self.has_point.load(Ordering::SeqCst)
    }

    /// The lock, and what is known: of this session still.
    pub(super) fn own(&self) -> Result<(Lock, Record)> {
        let held = self
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let lock = match held {
            Some(lock) => lock,
            None => self.store.lock()?,
        };
        match self.store.read()? {
            Some(record) if record.session == self.name => Ok((lock, record)),
            _ => anyhow::bail!("the replica was promoted or removed, or another connection has it"),
        }
    }

    /// How the VM is configured now.
    pub(super) fn configure(&self, config: VmConfig) -> Result<()> {
        let (lock, mut record) = self.own()?;
        record.config = Some(config);
        self.store.write(&record)?;
        if !self.has_point() {
            *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
        }
        Ok(())
    }

    fn make_last(&self, point: &Point) -> Result<()> {
        let (_lock, mut record) = self.own()?;
        if self.has_point() {
            fs::rename(self.coming(), self.store.journal())?;
            self.store.sync()?;
        } else {
            record.point = Some(*point);
            self.store.write(&record)?;
            self.has_point.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    fn put_on_disks(&self) -> Result<()> {
        let (_lock, mut record) = self.own()?;
        self.store.settle(&mut record, &self.disks)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.coming());
    }
}

impl Replica for Session {
    fn disks(&self) -> &Disks {
        &self.disks
    }

    fn journal(&self) -> io::Result<Option<Journal>> {
        if !self.has_point() {
            return Ok(None);
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        Ok(Some(Journal::new(options.open(self.coming())?)))
    }

    fn keep(&self, point: &Point) -> Result<(), String> {
        self.make_last(point).map_err(|error| format!("{error:#}"))
    }

    fn apply(&self) -> Result<(), String> {
        self.put_on_disks().map_err(|error| format!("{error:#}"))
    }
}

/// The image of a stopped VM's disk, as somewhere to begin.
pub(super) fn seed(image: &Image, path: &Path, capacity: u64) -> Result<()> {
    let len = fs::metadata(path)?.len();
    anyhow::ensure!(len == capacity, "it has another length");
    image.copy(&Image::open(path, capacity)?)?;
    Ok(())
}
