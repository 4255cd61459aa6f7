//! What a machine is made of, opened while the process still may.

use blanket_devices::char::CharPort;
use blanket_memory::GuestRam;
use kvm_ioctls::VmFd;

use super::boot::Payload;
use super::kvm::{self, Host};
use crate::config::{CharConfig, VmConfig};
use crate::machine::open::{self, Disk, Given, Interface, open_char, open_disk, open_interface};
use crate::machine::{Error, ahead};

/// Everything that needs a name in the file system or a privilege.
pub struct Parts {
    pub(super) host: Host,
    pub(super) vm: VmFd,
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
        // Last: it has had all the time until now.
        let vm = ahead::take(given.vm.take(), &host.kvm)?;
        kvm::prepare(&vm)?;
        Ok(Self {
            host,
            vm,
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
