//! Opening images.

use std::fs::{File, OpenOptions};
use std::io;

use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blanket_memory::absent::Absent;
use blanket_memory::dirty::WriteLog;

use super::access::{self, Access};
use super::late::LateStore;
use super::probe::{self, Geometry};
use super::qcow2::{Layers, check_tables};
use super::raw::RawFile;
use super::ring::{self, RingStore};
use super::stripe::{self, Layout, StripeStore};
use super::thread::{Backend, ThreadStore};
use super::transfer::{Limits, QCOW2_MAGIC};
use super::{Engine, Format, SECTOR, Store, ThreadSetup, lock};

/// What to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes; readers share the image.
    pub readonly: bool,
    /// Told by the first bytes if absent. A guest must then not turn its raw
    /// image into a qcow2 one: such a write to the first sector fails.
    pub format: Option<Format>,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Follow a qcow2 image to its backing files. An image that a stranger
    /// made may name any file of the node there.
    pub backing: bool,
    /// What carries out the I/O.
    pub engine: Engine,
    /// The other volumes of a striped set of which `path` is one, in any order
    /// ([`super::stripe`]); none for an image or device of its own.
    pub stripe: Vec<PathBuf>,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("disk {path}: no such file; make one with `qemu-img create -f raw {path} 10G`")]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// It is not a file or a block device.
    #[error("disk {path} is neither a file nor a block device")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("cannot open disk {path}: {source}{remedy}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What may help.
        remedy: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(
        "disk {path} is in use by another VM{}; stop it or use readonly=on{}",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        if *readonly { " there" } else { " for both" }
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// A process that has it open.
        pid: Option<u32>,
        /// Whether it was wanted for reading only.
        readonly: bool,
    },
    /// There is not one sector in it.
    #[error(
        "disk {path} has {len} bytes, less than one sector of {SECTOR}: was it cut? Copy it again or give it a size with `truncate -s 10G`"
    )]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
    },
    /// It is not what it was said to be.
    #[error("disk {path} is not a qcow2 image; leave out the format, or say raw")]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// The qcow2 image is damaged or uses what is not supported.
    #[error("disk {path}: {source}; `qemu-img check {path}` says more")]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Direct I/O cannot be had.
    #[error(
        "disk {path}: its file system has no direct I/O ({source}); use direct=off or move the image"
    )]
    Direct {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `io_uring` was asked for but cannot be had.
    #[error("disk {path}: no io_uring: {source}; use engine=auto")]
    Engine {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `io_uring` cannot poll for this one's completions.
    #[error(
        "disk {path}: there are no queues to be polled; use engine=auto, or another device (NVMe has some with the kernel's parameter nvme.poll_queues=1)"
    )]
    Polled {
        /// The image.
        path: PathBuf,
    },
    /// The volumes are no striped set.
    #[error(transparent)]
    Stripe(#[from] stripe::Error),
    /// A queue cannot be made.
    #[error("disk {path}: cannot make an I/O queue: {source}")]
    Queue {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// An open and locked image. Its lock is held until the image and all its
/// stores are gone.
///
/// A raw image's bytes behind its last whole block are out of reach: they are
/// neither read nor written, and the image never grows.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    body: Body,
    limits: Limits,
    physical_block: u32,
    /// Block devices in it.
    devices: Vec<(u32, u32)>,
    /// What its users have written, if anybody wants to know.
    log: Arc<WriteLog>,
    /// What has not come of it yet, if it follows its guest.
    absent: Option<Arc<Absent>>,
}

/// What an image consists of.
#[derive(Debug)]
enum Body {
    /// One file or device, and what serves it.
    One(Backend, Engine),
    /// Volumes, in the order in which they are striped.
    Striped(Layout, Vec<Image>),
}

impl Image {
    /// Opens, checks and locks an image.
    ///
    /// # Errors
    /// It is missing, not accessible, in use, empty, damaged, or the engine
    /// that was asked for cannot be had. The message has the remedy.
    pub fn open(spec: &Spec) -> Result<Self, Error> {
        if !spec.stripe.is_empty() {
            return Self::open_striped(spec);
        }
        let path = spec.path.clone();
        let io_error = |source| open_error(&spec.path, source);
        let file = open_file(&path, spec.readonly).map_err(io_error)?;
        if !lock::take(&file, !spec.readonly).map_err(io_error)? {
            return Err(Error::InUse {
                pid: lock::holder(&file),
                readonly: spec.readonly,
                path,
            });
        }
        Self::open_file(spec, file)
    }

    /// Opens a raw image that another node's process has open and locked: it is
    /// not to be used before that one has let it go, and this one has taken its
    /// lock ([`super::lock_file`]).
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_unlocked(spec: &Spec) -> Result<Self, Error> {
        let file = open_file(&spec.path, spec.readonly);
        Self::open_file(spec, file.map_err(|source| open_error(&spec.path, source))?)
    }

    /// Opens an image whose file another process has opened, locked, and hands
    /// over: the lock comes with it. Both may have the image open, if only one
    /// uses it, because nothing of a raw image is kept in memory.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn adopt(spec: &Spec, file: File) -> Result<Self, Error> {
        Self::open_file(spec, file)
    }

    /// What hands it over: its open file, if it is a raw image in one piece.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn hand_over(&self) -> io::Result<Option<File>> {
        self.raw_file().map(File::try_clone).transpose()
    }

    fn open_file(spec: &Spec, file: File) -> Result<Self, Error> {
        let path = spec.path.clone();
        let io_error = |source| open_error(&spec.path, source);
        let geometry = probe::geometry(&file).map_err(io_error)?;
        if geometry.len < SECTOR {
            let len = geometry.len;
            return Err(Error::Empty { path, len });
        }
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, 0).map_err(io_error)?;
        let is_qcow2 = magic == *QCOW2_MAGIC;
        match spec.format {
            Some(Format::Qcow2) if !is_qcow2 => Err(Error::NotQcow2 { path }),
            Some(Format::Qcow2) => Self::open_qcow2(spec, file, &geometry),
            None if is_qcow2 => Self::open_qcow2(spec, file, &geometry),
            None if stripe::is_marked(&file) => Err(stripe::Error::Alone { path }.into()),
            _ => Self::open_raw(spec, file, &geometry),
        }
    }

    fn open_qcow2(spec: &Spec, file: File, geometry: &Geometry) -> Result<Self, Error> {
        let path = spec.path.clone();
        if matches!(spec.engine, Engine::IoUring | Engine::Polled) {
            let source = io::Error::other("qcow2 images are served by a thread");
            return Err(Error::Engine { path, source });
        }
        if let Err(source) = check_tables(&file) {
            return Err(Error::Qcow2 { path, source });
        }
        if spec.direct {
            direct(&file, spec)?;
        }
        let layers = match Layers::open(file, &path, spec) {
            Ok(layers) => layers,
            Err(source) => return Err(Error::Qcow2 { path, source }),
        };
        let limits = *layers.limits();
        if limits.capacity == 0 {
            return Err(Error::Empty { path, len: 0 });
        }
        Ok(Self {
            path,
            limits,
            body: Body::One(Backend::Qcow2(Arc::new(layers)), Engine::Sync),
            physical_block: geometry.physical,
            devices: Vec::new(),
            log: log(&limits),
            absent: None,
        })
    }

    /// Opens a striped set's volumes.
    fn open_striped(spec: &Spec) -> Result<Self, Error> {
        let (layout, volumes) = stripe::open(spec)?;
        let all = |of: fn(&Limits) -> bool| volumes.iter().all(|one| of(&one.limits));
        let most = |of: fn(&Self) -> u32| volumes.iter().map(of).max().unwrap_or(512);
        let limits = Limits {
            capacity: layout.capacity(),
            block: most(Self::block_size),
            // Each volume has its own.
            mem_align: 1,
            readonly: spec.readonly,
            discard: all(|limits| limits.discard),
            keep_raw: false,
            private: false,
            durable: all(|limits| limits.durable),
            device: false,
        };
        Ok(Self {
            path: spec.path.clone(),
            limits,
            physical_block: most(Self::physical_block_size),
            devices: volumes.iter().flat_map(|one| one.devices.clone()).collect(),
            log: log(&limits),
            absent: None,
            body: Body::Striped(layout, volumes),
        })
    }

    fn open_raw(spec: &Spec, file: File, geometry: &Geometry) -> Result<Self, Error> {
        let path = spec.path.clone();
        let mut block = geometry.logical;
        let mut mem_align = 1;
        let is_direct = spec.direct || spec.engine == Engine::Polled;
        if is_direct {
            direct(&file, spec)?;
            block = match probe::direct_block(&file, block) {
                Ok(block) => block,
                Err(source) => return Err(Error::Direct { path, source }),
            };
            mem_align = block as usize;
        }
        let tail = geometry.len % u64::from(block);
        if tail != 0 {
            tracing::warn!(
                path = %path.display(),
                tail,
                block,
                "the disk's size is no multiple of its block size: its last bytes are left out"
            );
        }
        let limits = Limits {
            capacity: geometry.len - tail,
            block,
            mem_align,
            readonly: spec.readonly,
            discard: !spec.readonly && probe::discard(&file, geometry),
            keep_raw: spec.format.is_none(),
            private: false,
            durable: is_direct && probe::is_durable(&file),
            device: probe::device_number(&file).is_some(),
        };
        if limits.capacity == 0 {
            let len = geometry.len;
            return Err(Error::Empty { path, len });
        }
        let engine = choose(spec, &file)?;
        Ok(Self {
            path,
            limits,
            devices: probe::device_number(&file).into_iter().collect(),
            log: log(&limits),
            absent: None,
            body: Body::One(Backend::Raw(Arc::new(RawFile { file, limits })), engine),
            physical_block: geometry.physical.max(block),
        })
    }

    /// Makes a store for `depth` requests at a time. Each thread, if the engine
    /// needs any, runs a `setup()` first.
    ///
    /// Rings and threads are made here and now: call it before the process
    /// confines itself.
    ///
    /// # Errors
    /// No ring, no thread, or `setup` failed.
    pub fn queue(
        &self,
        depth: u16,
        setup: &dyn Fn() -> ThreadSetup,
    ) -> Result<Box<dyn Store>, Error> {
        let store: io::Result<Box<dyn Store>> = match &self.body {
            Body::Striped(layout, volumes) => {
                let stores = volumes.iter().map(|one| one.queue(depth, setup));
                let stores = stores.collect::<Result<_, _>>()?;
                StripeStore::new(*layout, self.limits, stores, depth.max(1))
                    .map(|store| Box::new(store) as _)
            }
            Body::One(Backend::Raw(raw), engine @ (Engine::IoUring | Engine::Polled)) => {
                let polled = *engine == Engine::Polled;
                RingStore::new(Arc::clone(raw), depth, polled).map(|store| Box::new(store) as _)
            }
            Body::One(backend, _) => ThreadStore::new(backend.clone(), depth.max(1), setup())
                .map(|store| Box::new(store) as _),
        };
        let store = store.and_then(|store| match &self.absent {
            Some(absent) => LateStore::new(store, Arc::clone(absent), depth)
                .map(|store| Box::new(store) as Box<dyn Store>),
            None => Ok(store),
        });
        store.map_err(|source| Error::Queue {
            path: self.path.clone(),
            source,
        })
    }

    /// Lets its content come after its guest has begun to use it: from now on its
    /// queues wait for what is missing ([`Image::absent`]). A striped set's never
    /// do.
    #[must_use]
    pub fn with_late_content(mut self) -> Self {
        if let Body::One(..) = self.body {
            self.absent = Some(Arc::new(Absent::new(self.limits.capacity)));
        }
        self
    }

    /// What has not come of it, where that can be.
    #[must_use]
    pub fn absent(&self) -> Option<Arc<Absent>> {
        self.absent.clone()
    }

    /// Where those who use its stores note what they have written, when a write
    /// is done and before the guest knows of it.
    #[must_use]
    pub fn log(&self) -> Arc<WriteLog> {
        Arc::clone(&self.log)
    }

    /// A way to its content beside its stores.
    #[must_use]
    pub fn access(&self) -> Access {
        let body = match &self.body {
            Body::One(backend, _) => access::Body::One(backend.clone()),
            Body::Striped(layout, volumes) => {
                let volumes = volumes.iter().map(Self::access).collect();
                access::Body::Striped(*layout, volumes)
            }
        };
        Access::new(body, self.limits, self.log())
    }

    /// Bytes of the disk, a multiple of [`Image::block_size`].
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.limits.capacity
    }

    /// Smallest unit of I/O in bytes: offsets and lengths are multiples of it.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.limits.block
    }

    /// Unit in bytes that is written at once below; a power of two, not less
    /// than [`Image::block_size`].
    #[must_use]
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn readonly(&self) -> bool {
        self.limits.readonly
    }

    /// Whether discard and write-zeroes work.
    #[must_use]
    pub fn discard(&self) -> bool {
        self.limits.discard
    }

    /// How the bytes are laid out.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.body {
            Body::One(Backend::Qcow2(_), _) => Format::Qcow2,
            _ => Format::Raw,
        }
    }

    /// Whether a request that has completed is durable without a flush: the
    /// device has no volatile cache, nor is there a page cache.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.limits.durable
    }

    /// The block devices that it is on, by major and minor number.
    #[must_use]
    pub fn devices(&self) -> &[(u32, u32)] {
        &self.devices
    }

    /// The engine that was chosen, never [`Engine::Auto`].
    #[must_use]
    pub fn engine(&self) -> Engine {
        match &self.body {
            Body::One(_, engine) => *engine,
            // All are opened alike.
            Body::Striped(_, volumes) => volumes.first().map_or(Engine::Sync, Self::engine),
        }
    }

    /// A serial for guests that were given none: see [`default_serial`].
    #[must_use]
    pub fn default_serial(&self) -> String {
        default_serial(&self.path)
    }

    /// Its file, if it is a raw image.
    pub(super) fn raw_file(&self) -> Option<&File> {
        match &self.body {
            Body::One(Backend::Raw(raw), _) => Some(&raw.file),
            _ => None,
        }
    }

    /// Makes everything that its stores have completed durable.
    ///
    /// # Errors
    /// The node's disk is full or broken.
    pub fn flush(&self) -> io::Result<()> {
        self.access().flush()
    }
}

/// The serial of an image at `path` that was given none: its file name, the
/// first 20 printable ASCII characters.
#[must_use]
pub fn default_serial(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    name.chars()
        .filter(char::is_ascii_graphic)
        .take(20)
        .collect()
}

fn log(limits: &Limits) -> Arc<WriteLog> {
    // More than can be addressed cannot be noted.
    let len = usize::try_from(limits.capacity).unwrap_or(usize::MAX);
    Arc::new(WriteLog::new(len))
}

/// The engine for a raw image.
fn choose(spec: &Spec, file: &File) -> Result<Engine, Error> {
    let path = spec.path.clone();
    if spec.engine == Engine::Polled && !probe::can_be_polled(file) {
        return Err(Error::Polled { path });
    }
    if spec.engine == Engine::Sync {
        return Ok(Engine::Sync);
    }
    match ring::probe() {
        Ok(()) if spec.engine == Engine::Polled => Ok(Engine::Polled),
        Ok(()) => Ok(Engine::IoUring),
        Err(error) if spec.engine == Engine::Auto => {
            tracing::info!(path = %path.display(), %error, "no io_uring: a thread does the disk's I/O");
            Ok(Engine::Sync)
        }
        Err(source) => Err(Error::Engine { path, source }),
    }
}

/// Opens a file or a block device; the latter, for writing, exclusively: not
/// while it is mounted.
pub(super) fn open_file(path: &Path, readonly: bool) -> io::Result<File> {
    // Before opening: opening a FIFO or a tape has effects.
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(!readonly);
    if kind.is_block_device() && !readonly {
        options.custom_flags(libc::O_EXCL);
    }
    let busy = || io::Error::from_raw_os_error(libc::EBUSY);
    lock::patiently(|| match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(None),
        other => other.map(Some),
    })?
    .ok_or_else(busy)
}

fn open_error(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match (source.kind(), source.raw_os_error()) {
        (io::ErrorKind::NotFound, _) => Error::Missing { path },
        (io::ErrorKind::InvalidFilename, None) => Error::Kind { path },
        (_, Some(libc::EBUSY)) => Error::Open {
            path,
            remedy: "; unmount it, or stop the VM that has it",
            source,
        },
        (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, _) => Error::Open {
            path,
            remedy: "; give its owner's rights or use readonly=on",
            source,
        },
        _ => Error::Open {
            path,
            remedy: "",
            source,
        },
    }
}

fn direct(file: &File, spec: &Spec) -> Result<(), Error> {
    probe::set_direct(file).map_err(|source| Error::Direct {
        path: spec.path.clone(),
        source,
    })
}
