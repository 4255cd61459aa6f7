//! What a machine is made of, opened while the process still may.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use blanket_devices::char::{self, CharPort};
use blanket_drivers::mac::MacAddress;
use blanket_drivers::store::{self, Image};
use blanket_drivers::tap::{self, Tap};
use blanket_memory::{Backing, GuestRam};

use super::boot::Payload;
use super::error::Error;
use super::kvm::{self, Host};
use crate::config::{CharConfig, DiskConfig, HugePages, NetConfig, VmConfig};

/// An opened disk and what is to be shown of it.
pub(super) struct Disk {
    pub image: Image,
    pub path: PathBuf,
    pub serial: Option<String>,
    pub queues: u16,
}

/// An opened interface.
pub(super) struct Interface {
    pub tap: Tap,
    pub mac: MacAddress,
    pub mtu: Option<u16>,
}

/// Everything that needs a name in the file system or a privilege.
pub struct Parts {
    pub(super) host: Host,
    pub(super) ram: GuestRam,
    pub(super) payload: Payload,
    pub(super) disks: Vec<Disk>,
    pub(super) interfaces: Vec<Interface>,
    pub(super) serial: CharPort,
    pub(super) console: Option<CharPort>,
}

impl Parts {
    /// Opens all that `config` names.
    ///
    /// # Errors
    /// The first thing that is missing, in use or not permitted, with the
    /// remedy. What was made until then (taps, sockets) goes away again.
    pub fn open(config: &VmConfig) -> Result<Self, Error> {
        let kernel = config.kernel.as_deref().ok_or(Error::NoKernel)?;
        let payload = Payload::open(
            kernel,
            config.initrd.as_deref(),
            config.cmdline(),
            config.memory(),
        )?;
        let host = kvm::open(config.cpus())?;
        let ram = blanket_memory::build(&blanket_memory::Spec {
            size: config.memory(),
            backing: match config.hugepages.unwrap_or_default() {
                HugePages::Off => Backing::Small,
                HugePages::Thp => Backing::Transparent,
                HugePages::Hugetlb2M => Backing::Hugetlb { shift: 21 },
                HugePages::Hugetlb1G => Backing::Hugetlb { shift: 30 },
            },
            shared: config.shared_memory.unwrap_or(false),
        })?;
        let queues = config.default_queues();
        let disks = config.disk.iter().map(|disk| open_disk(disk, queues));
        let disks = disks.collect::<Result<_, _>>()?;
        let interfaces = config.net.iter().map(|net| open_interface(net, queues));
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

fn open_disk(config: &DiskConfig, queues: u16) -> Result<Disk, Error> {
    let image = Image::open(&store::Spec {
        path: config.path.clone(),
        readonly: config.readonly,
        format: config.format,
        direct: config.direct,
        backing: config.backing,
        engine: config.engine,
    })?;
    Ok(Disk {
        serial: config.serial.clone(),
        path: config.path.clone(),
        queues: config.queues.unwrap_or(queues),
        image,
    })
}

fn open_interface(config: &NetConfig, queues: u16) -> Result<Interface, Error> {
    let host_ip = config.host_ip.as_deref().map(tap::parse_host_ip);
    let tap = Tap::open(&tap::Spec {
        name: config.tap.clone(),
        bridge: config.bridge.clone(),
        host_ip: host_ip.transpose()?,
        mtu: config.mtu,
        queues: config.queues.unwrap_or(queues),
    })?;
    Ok(Interface {
        tap,
        mac: config.mac.map_or_else(random_mac, Ok)?,
        mtu: config.mtu,
    })
}

fn random_mac() -> Result<MacAddress, Error> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(Error::Random)?;
    Ok(MacAddress::local(bytes))
}

fn open_char(config: &CharConfig) -> Result<CharPort, Error> {
    Ok(CharPort::open(&char::Spec {
        stdio: config.stdio,
        socket: config.socket.clone(),
        log: config.log.clone(),
    })?)
}
