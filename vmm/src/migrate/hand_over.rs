//! What of a machine another monitor gets: handed over where that is on the same
//! node, else copied.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_devices::lifecycle::SavedState;
use blanket_devices::vhost_user::Logger;
use blanket_drivers::mac::MacAddress;
use blanket_drivers::store::{self, Access, Image};
use blanket_drivers::tap::{self, Tap, TapQueue};
use blanket_memory::absent::Absent;
use blanket_migration::Disks;
use serde::{Deserialize, Serialize};

use super::Frames;
use crate::config::VmConfig;
use crate::machine::Given;
use crate::machine::open::{Attachment, Disk, Interface};

/// How long another node may take to let shared disks go when the guest has left it.
const LET_GO: Duration = Duration::from_secs(10);

/// A machine's disks and interfaces, open.
#[derive(Default)]
pub struct HandOver {
    disks: Vec<File>,
    /// Which of them can be written.
    writable: Vec<bool>,
    /// Another node's monitor has the same disks, or gets them.
    shared: bool,
    /// The content of those that can be written.
    contents: Vec<Arc<dyn blanket_migration::Disk>>,
    taps: Vec<(tap::Description, Vec<Arc<TapQueue>>)>,
    addresses: Vec<MacAddress>,
    /// Of backends that map guest memory.
    loggers: Vec<Logger>,
    /// What cannot be handed over, and the remedy.
    obstacle: Option<String>,
    /// Why the guest cannot be migrated at all.
    unable: Option<String>,
}

impl HandOver {
    /// Of these. `maps` says that a vhost-user backend maps guest memory.
    pub(crate) fn of<'a>(
        disks: impl Iterator<Item = &'a Disk>,
        interfaces: &[Interface],
        maps: bool,
    ) -> io::Result<Self> {
        let mut all = Self::default();
        for disk in disks {
            if !disk.image.readonly() {
                all.contents.push(Arc::new(Content::of(&disk.image)));
            }
            match disk.image.hand_over()? {
                Some(file) => {
                    all.disks.push(file);
                    all.writable.push(!disk.image.readonly());
                }
                None => {
                    all.obstacle = Some(format!(
                        "the disk {} is no raw image in one piece, and only those can be handed over while they are in use: convert it with `qemu-img convert -O raw`",
                        disk.path.display()
                    ));
                }
            }
        }
        for interface in interfaces {
            match &interface.attachment {
                Attachment::Tap(tap) => {
                    all.taps.push((tap.describe(), tap.queues().to_vec()));
                    all.addresses.push(interface.mac);
                }
                Attachment::VhostUser(backend) if maps => match backend.logger() {
                    Some(logger) => all.loggers.push(logger),
                    None => {
                        all.unable = Some(format!(
                            "the vhost-user backend {} does not tell what it writes to guest memory (VHOST_F_LOG_ALL): pause the guest and use blanket snapshot",
                            backend.path().display()
                        ));
                    }
                },
                Attachment::VhostUser(_) => {}
            }
        }
        Ok(all)
    }

    /// The disks whose content is copied to a node that they are not on.
    #[must_use]
    pub fn contents(&self) -> Arc<Disks> {
        self.contents.clone().into()
    }

    /// Whether a guest with these devices can be migrated, and they be handed
    /// over if `wanted`.
    ///
    /// # Errors
    /// It cannot: why, and the remedy.
    pub fn check(&self, wanted: bool) -> Result<(), String> {
        let late = self.contents.iter().filter_map(|disk| disk.absent());
        if late.into_iter().any(|absent| absent.any()) {
            return Err("a part of its disks has not come from where it was".to_owned());
        }
        let obstacle = self.obstacle.iter().filter(|_| wanted);
        match self.unable.iter().chain(obstacle).next() {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    /// Another node's monitor has the same disks, or gets them.
    pub(crate) fn share(&mut self, shared: bool) {
        self.shared = shared;
    }

    /// Makes durable what is on shared disks: another node will read it.
    ///
    /// # Errors
    /// A disk fails.
    pub(crate) fn flush_shared(&self) -> io::Result<()> {
        let contents = self.contents.iter().filter(|_| self.shared);
        contents.into_iter().try_for_each(|disk| disk.flush())
    }

    /// Takes the locks of shared disks, which the other node's monitor has just
    /// let go. To lock a file of a network file system is also what has it read
    /// anew.
    pub(crate) fn lock_shared(&mut self) {
        if !std::mem::take(&mut self.shared) {
            return;
        }
        let end = Instant::now() + LET_GO;
        for (file, writable) in self.disks.iter().zip(&self.writable) {
            loop {
                match store::lock_file(file, *writable) {
                    Ok(true) => break,
                    Ok(false) if Instant::now() < end => {}
                    // The guest is this monitor's: nobody else may use them.
                    Ok(false) => {
                        tracing::error!("somebody else has locked a disk of this guest");
                        break;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a disk cannot be locked");
                        break;
                    }
                }
            }
        }
    }

    /// Lets shared disks go: they are another node's.
    pub(crate) fn unlock_shared(&self) {
        for file in self.disks.iter().filter(|_| self.shared) {
            if let Err(error) = store::unlock_file(file) {
                tracing::warn!(%error, "a disk is not let go before this monitor ends");
            }
        }
    }

    /// Its descriptors: disks, then each tap's queues.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let queues = self.taps.iter().flat_map(|(_, queues)| queues);
        let disks = self.disks.iter().map(AsRawFd::as_raw_fd);
        disks.chain(queues.map(AsRawFd::as_raw_fd)).collect()
    }

    /// What has the backends that map guest memory note what they write.
    #[must_use]
    pub(crate) fn loggers(&self) -> &[Logger] {
        &self.loggers
    }

    /// What reaches the guest by its taps.
    #[must_use]
    pub(crate) fn frames(&self) -> Frames {
        let queues = self.taps.iter().map(|(_, queues)| queues.clone());
        Frames::of(queues.zip(self.addresses.iter().copied()))
    }

    /// Tells the networks of its interfaces that the guest is here.
    pub fn announce(&self) {
        for ((tap, queues), mac) in self.taps.iter().zip(&self.addresses) {
            let sent = queues.first().map_or(Ok(()), |queue| queue.announce(*mac));
            if let Err(error) = sent {
                tracing::warn!(?tap, %error, "the guest is not announced");
            }
        }
    }

    fn taps(&self) -> Vec<tap::Description> {
        self.taps.iter().map(|(tap, _)| tap.clone()).collect()
    }
}

/// A disk's content, as the engine sees it.
pub struct Content {
    access: Access,
    absent: Option<Arc<Absent>>,
}

impl Content {
    /// Of this disk.
    #[must_use]
    pub fn of(image: &Image) -> Self {
        Self {
            access: image.access(),
            absent: image.absent(),
        }
    }
}

impl blanket_migration::Disk for Content {
    fn capacity(&self) -> u64 {
        self.access.capacity()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.access.next_data(offset)
    }

    fn absent(&self) -> Option<Arc<Absent>> {
        self.absent.clone()
    }

    fn watch(&self) -> io::Result<()> {
        self.access.log().start()
    }

    fn written(&self, most: usize) -> Vec<(u64, usize)> {
        self.access.log().take_runs(most)
    }

    fn unwatch(&self) {
        self.access.log().stop();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.access.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.access.write(offset, bytes)
    }

    fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        self.access.clear(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.access.flush()
    }
}

/// What a source tells of its machine.
#[derive(Serialize, Deserialize)]
pub struct Offered {
    /// How it is configured.
    pub config: VmConfig,
    /// What the other machine has to have in common with it.
    pub likeness: SavedState,
    /// Whether the content of its disks comes, instead of the disks.
    pub copies: bool,
    /// Whether the other machine has taps of its own.
    pub own_taps: bool,
    /// Disks whose files it hands over.
    disks: u32,
    taps: Vec<tap::Description>,
}

impl Offered {
    /// Of a machine that hands `devices` over, if there are some; else the other
    /// one gets the content of its disks, or has the same ones (`shared`).
    #[must_use]
    pub fn new(
        config: VmConfig,
        likeness: SavedState,
        devices: Option<&HandOver>,
        shared: bool,
    ) -> Self {
        Self {
            config,
            likeness,
            copies: devices.is_none() && !shared,
            own_taps: devices.is_none(),
            disks: devices.map_or(0, |devices| devices.disks.len() as u32),
            taps: devices.map(HandOver::taps).unwrap_or_default(),
        }
    }

    /// The devices that `descriptors` open.
    ///
    /// # Errors
    /// There are not as many as it says.
    pub fn given(&self, descriptors: Vec<OwnedFd>) -> Result<Given, tap::Error> {
        let mut rest = descriptors.into_iter();
        let disks: VecDeque<_> = (0..self.disks)
            .filter_map(|_| rest.next())
            .map(File::from)
            .collect();
        let mut taps = VecDeque::new();
        for tap in &self.taps {
            let queues = rest.by_ref().take(tap.queues.into()).collect();
            taps.push_back(Tap::adopt(tap.clone(), queues)?);
        }
        Ok(Given {
            guest: true,
            disks,
            taps,
            ..Given::default()
        })
    }
}
