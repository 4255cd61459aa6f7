//! What a monitor hands over to another on its node.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use blanket_devices::lifecycle::SavedState;
use blanket_drivers::tap::{self, Tap, TapQueue};
use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::machine::Given;
use crate::machine::open::{Attachment, Disk, Interface};

/// A machine's disks and interfaces, open.
#[derive(Default)]
pub struct HandOver {
    disks: Vec<File>,
    taps: Vec<(tap::Description, Vec<Arc<TapQueue>>)>,
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
            match disk.image.hand_over()? {
                Some(file) => all.disks.push(file),
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
                Attachment::Tap(tap) => all.taps.push((tap.describe(), tap.queues().to_vec())),
                Attachment::VhostUser(backend) if maps => {
                    all.unable = Some(format!(
                        "the vhost-user backend {} writes guest memory unseen: pause the guest and use blanket snapshot",
                        backend.path().display()
                    ));
                }
                Attachment::VhostUser(_) => {}
            }
        }
        Ok(all)
    }

    /// Whether a guest with these devices can be migrated, and they be handed
    /// over if `wanted`.
    ///
    /// # Errors
    /// It cannot: why, and the remedy.
    pub fn check(&self, wanted: bool) -> Result<(), String> {
        let obstacle = self.obstacle.iter().filter(|_| wanted);
        match self.unable.iter().chain(obstacle).next() {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    /// Its descriptors: disks, then each tap's queues.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let queues = self.taps.iter().flat_map(|(_, queues)| queues);
        let disks = self.disks.iter().map(AsRawFd::as_raw_fd);
        disks.chain(queues.map(AsRawFd::as_raw_fd)).collect()
    }

    fn taps(&self) -> Vec<tap::Description> {
        self.taps.iter().map(|(tap, _)| tap.clone()).collect()
    }
}

/// What a source tells of its machine.
#[derive(Serialize, Deserialize)]
pub struct Offered {
    /// How it is configured.
    pub config: VmConfig,
    /// What the other machine has to have in common with it.
    pub likeness: SavedState,
    /// Disks whose files it hands over.
    disks: u32,
    taps: Vec<tap::Description>,
}

impl Offered {
    /// Of a machine that hands `devices` over, if there are some.
    #[must_use]
    pub fn new(config: VmConfig, likeness: SavedState, devices: Option<&HandOver>) -> Self {
        Self {
            config,
            likeness,
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
        Ok(Given { disks, taps })
    }
}
