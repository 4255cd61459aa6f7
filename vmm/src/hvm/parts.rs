//! What a machine is made of, opened while the process still may.

use blanket_devices::char::CharPort;
use blanket_memory::GuestRam;

use super::boot::Payload;
use super::kvm::{self, Host};
use crate::config::{CharConfig, VmConfig};
use crate::machine::Error;
use crate::machine::open::{self, Disk, Given, Interface, open_char, open_disk, open_interface};

/// Everything that needs a name in the file system or a privilege.
pub struct Parts {
    pub(super) host: Host,
    pub(super) ram: GuestRam,
    pub(super) payload: Payload,
    pub(crate) disks: Vec<Disk>,
    pub(crate) interfaces: Vec<Interface>,
    pub(super) serial: CharPort,
    pub(super) console: Option<CharPort>,
}

impl Parts {
    /// Opens all that `config` names, but for what is given.
    ///
    /// # Errors
    /// The first thing that is missing, in use or not permitted, with the
    /// remedy. What was made until then (taps, sockets) goes away again.
    pub fn open(config: &VmConfig, mut given: Given) -> Result<Self, Error> {
        let kernel = config.kernel.as_deref().ok_or(Error::NoKernel)?;
        let payload = Payload::open(
            kernel,
            config.initrd.as_deref(),
            config.cmdline(),
            config.memory(),
        )?;
        let host = kvm::open(config)?;
        // A backend maps it.
        let shared = config.net.iter().any(|net| net.vhost_user.is_some());
        let ram = blanket_memory::build(&open::memory(config, config.memory(), shared))?;
        let queues = config.default_queues();
        let disks = config
            .disk
            .iter()
            .map(|disk| open_disk(disk, queues, &mut given));
        let disks = disks.collect::<Result<_, _>>()?;
        let interfaces = config
            .net
            .iter()
            .map(|net| open_interface(net, queues, &mut given));
        let interfaces = interfaces.collect::<Result<_, _>>()?;
        let stdio = CharConfig {
            stdio: true,
            ..CharConfig::default()
        };
        Ok(Self {
            host,
            ram,
            payload,
            disks,
            interfaces,
            serial: open_char(config.serial.as_ref().unwrap_or(&stdio))?,
            console: config
                .console
                .as_ref()
                .filter(|char| **char != CharConfig::default())
                .map(open_char)
                .transpose()?,
        })
    }
}
