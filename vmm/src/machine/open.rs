//! Opening what a configuration names: for every kind of machine.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use blanket_devices::char::{self, CharPort};
use blanket_devices::vhost_user::Opened;
use blanket_drivers::mac::MacAddress;
use blanket_drivers::store::{self, Image};
use blanket_drivers::tap::{self, Tap};
use blanket_memory::{Backing, Spec};

use super::{Ahead, Error};
use crate::config::{CharConfig, DiskConfig, HugePages, NetConfig, VmConfig};

/// An opened disk and what is to be shown of it.
pub(crate) struct Disk {
    pub image: Image,
    pub path: PathBuf,
    pub serial: Option<String>,
    pub queues: u16,
}

/// An opened interface.
pub(crate) struct Interface {
    pub attachment: Attachment,
    pub mac: MacAddress,
    pub mtu: Option<u16>,
}

/// What an interface is attached to.
pub(crate) enum Attachment {
    Tap(Tap),
    VhostUser(Opened),
}

/// How to map `size` bytes of memory. Where the configuration does not say, it
/// is `shared` if others have to map it.
pub(crate) fn memory(config: &VmConfig, size: u64, shared: bool) -> Spec {
    Spec {
        size,
        backing: match config.hugepages.unwrap_or_default() {
            HugePages::Off => Backing::Small,
            HugePages::Thp => Backing::Transparent,
            HugePages::Hugetlb2M => Backing::Hugetlb { shift: 21 },
            HugePages::Hugetlb1G => Backing::Hugetlb { shift: 30 },
        },
        shared: config.shared_memory.unwrap_or(shared),
    }
}

/// What another monitor hands over, in the order of the configuration; nothing
/// where all is to be opened here.
#[derive(Default)]
pub struct Given {
    /// A guest that runs already, or has: its kernel is not needed before its
    /// next reset.
    pub(crate) guest: bool,
    /// The disks are another node's until the guest comes.
    pub(crate) shared: bool,
    /// A VM that is being made.
    pub(crate) vm: Option<Ahead>,
    /// The content of those that can be written may come after the guest.
    pub(crate) late: bool,
    pub(crate) disks: VecDeque<File>,
    pub(crate) taps: VecDeque<Tap>,
}

impl Given {
    /// The same, but the disks are another node's until the guest comes.
    #[must_use]
    pub fn with_shared_disks(self, shared: bool) -> Self {
        Self { shared, ..self }
    }

    /// The same with a VM that is being made.
    #[must_use]
    pub(crate) fn with_vm(self, vm: Option<Ahead>) -> Self {
        Self { vm, ..self }
    }

    /// The same, but the disks' content may come after the guest.
    #[must_use]
    pub fn with_late_disks(self, late: bool) -> Self {
        Self { late, ..self }
    }

    /// A guest's state comes, and all else is to be opened here.
    #[must_use]
    pub fn guest() -> Self {
        Self {
            guest: true,
            ..Self::default()
        }
    }
}

pub(crate) fn open_disk(
    config: &DiskConfig,
    queues: u16,
    given: &mut Given,
) -> Result<Disk, Error> {
    let spec = store::Spec {
        path: config.path.clone(),
        readonly: config.readonly,
        format: config.format,
        direct: config.direct,
        backing: config.backing,
        engine: config.engine,
        stripe: config.stripe.clone(),
    };
    let image = match given.disks.pop_front() {
        Some(file) => Image::adopt(&spec, file)?,
        None if given.shared => Image::open_unlocked(&spec)?,
        None => Image::open(&spec)?,
    };
    let image = match given.late && !config.readonly {
        true => image.with_late_content(),
        false => image,
    };
    Ok(Disk {
        serial: config.serial.clone(),
        path: config.path.clone(),
        queues: config.queues.unwrap_or(queues),
        image,
    })
}

pub(crate) fn open_interface(
    config: &NetConfig,
    queues: u16,
    given: &mut Given,
) -> Result<Interface, Error> {
    let attachment = match &config.vhost_user {
        Some(path) => Attachment::VhostUser(Opened::connect(path, config.queues.unwrap_or(1))?),
        None => Attachment::Tap(match given.taps.pop_front() {
            Some(tap) => tap,
            None => open_tap(config, queues)?,
        }),
    };
    Ok(Interface {
        attachment,
        mac: config.mac.map_or_else(random_mac, Ok)?,
        mtu: config.mtu,
    })
}

fn open_tap(config: &NetConfig, queues: u16) -> Result<Tap, Error> {
    let host_ip = config.host_ip.as_deref().map(tap::parse_host_ip);
    Ok(Tap::open(&tap::Spec {
        name: config.tap.clone(),
        bridge: config.bridge.clone(),
        host_ip: host_ip.transpose()?,
        mtu: config.mtu,
        queues: config.queues.unwrap_or(queues),
    })?)
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(Error::Random)?;
    Ok(bytes)
}

fn random_mac() -> Result<MacAddress, Error> {
    Ok(MacAddress::local(random()?))
}

/// A random UUID (version 4).
pub(crate) fn random_uuid() -> Result<[u8; 16], Error> {
    let mut bytes: [u8; 16] = random()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

pub(crate) fn open_char(config: &CharConfig) -> Result<CharPort, Error> {
    Ok(CharPort::open(&char::Spec {
        stdio: config.stdio,
        socket: config.socket.clone(),
        log: config.log.clone(),
    })?)
}
