//! TAP interfaces: a guest's frames as the node's kernel sees them.
//!
//! A [`Tap`] is opened (and, where it is not there yet, made) before the
//! monitor gives up its privileges. Its [`TapQueue`]s then carry whole frames
//! with a 12-byte virtio header (virtio 1.2, 5.1.6) in front, so that checksums
//! and segmentation stay with whoever does them best. Sources for the ioctls:
//! Linux `Documentation/networking/tuntap.rst` and `drivers/net/tun.c`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_memory::IoVec;
use serde::{Deserialize, Serialize};

pub use crate::mac::MacAddress;

mod front;
mod link;

use front::Front;
use link::Link;

/// Bytes of the virtio header in front of each frame: `virtio_net_hdr_v1`.
pub const HEADER_LEN: usize = 12;

/// Queues that the kernel gives one tap at most (`MAX_TAP_QUEUES`).
pub const MAX_QUEUES: u16 = 256;

/// System calls of the threads that move frames or switch queues and offloads.
pub const SYSCALLS: &[libc::c_long] = &[
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_read,
    libc::SYS_ioctl,
];

/// The only ioctls among [`SYSCALLS`].
pub const IOCTLS: &[libc::Ioctl] = &[libc::TUNSETOFFLOAD, libc::TUNSETQUEUE];

/// What a tap should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// An existing tap's name, or the name of the one to make; the kernel picks
    /// one (`tap0`, ...) if absent.
    pub name: Option<String>,
    /// Bridge to join.
    pub bridge: Option<String>,
    /// Address and prefix length that the node takes on the tap.
    pub host_ip: Option<(Ipv4Addr, u8)>,
    /// MTU in bytes of a tap that is made here; an existing one keeps its own.
    pub mtu: Option<u16>,
    /// Queues, 1 to [`MAX_QUEUES`]. More than one needs a multi-queue tap.
    pub queues: u16,
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such name for an interface.
    #[error(
        "'{0}' is not an interface name: use 1 to 15 letters, digits, '-', '_' or '.', and not just dots"
    )]
    Name(String),
    /// Not an address with a prefix length.
    #[error("'{0}' is not an address for the node: write it like 10.1.0.1/24")]
    Address(String),
    /// More queues than the kernel has, or none.
    #[error("{0} queues: a tap has 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// The kernel has no TUN/TAP driver.
    #[error("/dev/net/tun: {0}; load the driver with `modprobe tun`")]
    NoDriver(io::Error),
    /// The device node is not for this user.
    #[error(
        "/dev/net/tun: {0}; let this user open it (chmod 0666 /dev/net/tun, the usual mode) or run with the right to"
    )]
    DeviceDenied(io::Error),
    /// The user may not make or use this tap.
    #[error(
        "tap '{name}': not permitted to {what}; run with CAP_NET_ADMIN, or let root make the tap for this user once: ip tuntap add {name} mode tap {multi_queue}user $USER && ip link set {name} up"
    )]
    Denied {
        /// The tap.
        name: String,
        /// What was refused.
        what: &'static str,
        /// `multi_queue ` where the tap must have it.
        multi_queue: &'static str,
    },
    /// Another process is attached.
    #[error("tap '{0}' is in use by another process; stop that one or name another tap")]
    Busy(String),
    /// The interface is there, but is not such a tap.
    #[error(
        "interface '{name}' is there, but is not a tap {} multiple queues; {}, or name another one",
        if *.queues > 1 { "with" } else { "without" },
        if *.queues > 1 { "use queues=1 or make it with `ip tuntap add ... multi_queue`" }
        else { "use queues=2 or more or make it without `multi_queue`" }
    )]
    Kind {
        /// The interface.
        name: String,
        /// Queues asked for.
        queues: u16,
    },
    /// No such bridge.
    #[error(
        "bridge '{0}' is not there; make it with `ip link add {0} type bridge && ip link set {0} up`"
    )]
    NoBridge(String),
    /// The tap is a port of something else.
    #[error(
        "tap '{tap}' cannot join '{bridge}', it belongs to another bridge already; `ip link set {tap} nomaster` frees it"
    )]
    OtherBridge {
        /// The tap.
        tap: String,
        /// The bridge it should join.
        bridge: String,
    },
    /// Anything else that the kernel refused.
    #[error("tap '{name}': cannot {what}: {source}")]
    Io {
        /// The tap.
        name: String,
        /// What was refused.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Parses an address with a prefix length, like `10.1.0.1/24`.
///
/// # Errors
/// [`Error::Address`]: it is none, or not one for a host.
pub fn parse_host_ip(text: &str) -> Result<(Ipv4Addr, u8), Error> {
    let wrong = || Error::Address(text.to_owned());
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    if !digits
        || !(1..=32).contains(&prefix)
        || address.is_unspecified()
        || address.is_multicast()
        || address.is_broadcast()
    {
        return Err(wrong());
    }
    Ok((address, prefix))
}

/// Checks that `name` can be an interface's (`dev_valid_name` in Linux, and no
/// `%`, which asks the kernel to fill in a number).
fn check_name(name: &str) -> Result<(), Error> {
    let valid = (1..libc::IFNAMSIZ).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !matches!(name, "." | "..");
    if valid {
        Ok(())
    } else {
        Err(Error::Name(name.to_owned()))
    }
}

/// Offloads that a tap can do on frames towards the guest (`TUN_F_*`): what it
/// has, the guest need not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(
    /// The bits of `TUNSETOFFLOAD`.
    pub libc::c_uint,
);

impl Offloads {
    /// UDP segmentation; the kernel takes the two only together.
    pub const USO: Self = Self(libc::TUN_F_USO4 | libc::TUN_F_USO6);
    /// What every kernel since 2.6.27 has.
    pub const BASE: Self = Self(
        libc::TUN_F_CSUM
            | libc::TUN_F_TSO4
            | libc::TUN_F_TSO6
            | libc::TUN_F_TSO_ECN
            | libc::TUN_F_UFO,
    );

    /// Whether all of `other` are among these.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// An open tap. It goes away with its last descriptor unless it is persistent.
#[derive(Debug)]
pub struct Tap {
    name: String,
    mtu: u16,
    offloads: Offloads,
    queues: Vec<Arc<TapQueue>>,
    /// What is wanted of one that another process still uses.
    held: Mutex<Option<Held>>,
}

/// Settings that wait until the tap is this process's.
#[derive(Debug)]
struct Held {
    offloads: Offloads,
    /// Whether each queue is to be attached.
    attached: Vec<bool>,
}

/// An open tap as it is described to another process that takes it over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    name: String,
    mtu: u16,
    offloads: libc::c_uint,
    /// Descriptors that come with it.
    pub queues: u16,
}

impl Tap {
    /// Attaches to the tap that `spec` describes, makes it first if need be,
    /// and sets it up. Offloads are off.
    ///
    /// # Errors
    /// See [`Error`]. A tap that was made here is gone again.
    pub fn open(spec: &Spec) -> Result<Self, Error> {
        for name in spec.name.iter().chain(&spec.bridge) {
            check_name(name)?;
        }
        if !(1..=MAX_QUEUES).contains(&spec.queues) {
            return Err(Error::Queues(spec.queues));
        }
        let made = match &spec.name {
            Some(name) => !Link::exists(name)?,
            None => true,
        };
        let mut name = spec.name.clone().unwrap_or_default();
        let mut queues = Vec::with_capacity(spec.queues.into());
        for _ in 0..spec.queues {
            let queue = TapQueue::attach(&mut name, spec.queues)?;
            queues.push(Arc::new(queue));
        }
        let link = Link::new(&name, spec.queues)?;
        if let Some(mtu) = spec.mtu.filter(|_| made) {
            link.set_mtu(mtu)?;
        }
        if let Some(bridge) = &spec.bridge {
            link.join(bridge)?;
        }
        if let Some((address, prefix)) = spec.host_ip {
            link.set_address(address, prefix)?;
        }
        link.bring_up()?;
        let mtu = link.mtu()?;
        let mut tap = Self {
            name,
            mtu,
            offloads: Offloads::default(),
            queues,
            held: Mutex::default(),
        };
        tap.offloads = tap.probe_offloads()?;
        Ok(tap)
    }

    /// Describes it for [`Tap::adopt`], to be given with its queues.
    #[must_use]
    pub fn describe(&self) -> Description {
        Description {
            name: self.name.clone(),
            mtu: self.mtu,
            offloads: self.offloads.0,
            queues: self.queues.len() as u16,
        }
    }

    /// The tap that another process has described and still uses: nothing in it
    /// changes until [`Tap::release`].
    ///
    /// # Errors
    /// [`Error::Queues`]: there are not as many queues as it has.
    pub fn adopt(description: Description, queues: Vec<OwnedFd>) -> Result<Self, Error> {
        if queues.is_empty() || queues.len() != usize::from(description.queues) {
            return Err(Error::Queues(description.queues));
        }
        Ok(Self {
            name: description.name,
            mtu: description.mtu,
            offloads: Offloads(description.offloads),
            held: Mutex::new(Some(Held {
                offloads: Offloads::default(),
                attached: vec![true; queues.len()],
            })),
            queues: queues
                .into_iter()
                .map(|fd| Arc::new(TapQueue::from(fd)))
                .collect(),
        })
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other process does not use it any more: brings it to what was set
    /// since it was adopted.
    ///
    /// # Errors
    /// The kernel refuses a setting.
    pub fn release(&self) -> io::Result<()> {
        let Some(held) = self.held().take() else {
            return Ok(());
        };
        self.set_offloads(held.offloads)?;
        for (queue, attached) in self.queues.iter().zip(held.attached) {
            match queue.set_attached(attached) {
                // It is so already; or there is but one.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Attaches or detaches one of its queues: [`TapQueue::set_attached`].
    ///
    /// # Errors
    /// As there.
    pub fn set_attached(&self, index: u16, attached: bool) -> io::Result<()> {
        if let Some(held) = &mut *self.held() {
            if let Some(place) = held.attached.get_mut(usize::from(index)) {
                *place = attached;
            }
            return Ok(());
        }
        let queue = self.queues.get(usize::from(index));
        queue.map_or(Ok(()), |queue| queue.set_attached(attached))
    }

    /// Throws away what waits in it.
    pub fn drain(&self) {
        if self.held().is_none() {
            self.queues.iter().for_each(|queue| queue.drain());
        }
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's MTU in bytes when it was opened.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The offloads that this kernel's taps have.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Its queues, all attached.
    #[must_use]
    pub fn queues(&self) -> &[Arc<TapQueue>] {
        &self.queues
    }

    /// Switches offloads of frames towards the guest, on all queues.
    ///
    /// # Errors
    /// The kernel does not have them.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if let Some(held) = &mut *self.held() {
            held.offloads = offloads;
            return Ok(());
        }
        // `open` made at least one queue.
        self.queues.first().map_or(Ok(()), |queue| {
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, offloads.0) })
        })
    }

    /// Tries what the kernel takes; leaves everything off.
    fn probe_offloads(&self) -> Result<Offloads, Error> {
        let with_uso = Offloads(Offloads::BASE.0 | Offloads::USO.0);
        let had = [with_uso, Offloads::BASE]
            .into_iter()
            .find(|offloads| self.set_offloads(*offloads).is_ok())
            .unwrap_or_default();
        self.set_offloads(Offloads::default())
            .map_err(|source| Error::Io {
                name: self.name.clone(),
                what: "switch its offloads off",
                source,
            })?;
        Ok(had)
    }
}

/// One queue of a tap: a non-blocking descriptor that is one frame per call.
#[derive(Debug)]
pub struct TapQueue {
    file: File,
    front: Front,
}

/// The Ethernet frame with which a guest is announced.
fn announcement(mac: MacAddress) -> Vec<u8> {
    let mac = mac.0;
    let mut frame = [[0xff; 6], mac].concat();
    // RARP; Ethernet and IPv4; a request for the owner of a hardware address.
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for hardware in [mac, mac] {
        frame.extend(hardware);
        frame.extend([0; 4]);
    }
    frame.resize(60, 0);
    frame
}

/// Whether a frame with its header is the one with which `mac` is announced.
#[must_use]
pub fn announces(frame: &[u8], mac: MacAddress) -> bool {
    let own = announcement(mac);
    frame
        .get(HEADER_LEN..)
        .is_some_and(|frame| frame.starts_with(&own[..42]))
}

impl TapQueue {
    /// Attaches a new queue to the tap `name`; fills an empty name in.
    fn attach(name: &mut String, queues: u16) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => Error::DeviceDenied(error),
                _ => Error::NoDriver(error),
            })?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut request = link::request(name);
        // The flags are a bit set in 16 bits.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        let set = check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) });
        set.map_err(|source| attach_error(name, queues, source))?;
        *name = link::name_of(&request);
        let header_len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &header_len) })
            .map_err(|source| Error::Io {
                name: name.clone(),
                what: "set the length of its headers",
                source,
            })?;
        Ok(file.into())
    }

    /// Receives one frame with its header. A frame that is longer than the
    /// vectors is cut off: offer a little more than is wanted to notice.
    ///
    /// # Safety
    /// The memory behind `vectors` is mapped and free to be written to.
    ///
    /// # Errors
    /// `WouldBlock`: there is no frame.
    pub unsafe fn readv(&self, vectors: &[IoVec]) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        if let Some(read) = unsafe { self.front.readv(vectors) } {
            return read;
        }
        let count = vectors.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: the caller's promise; `count` vectors are there.
        let n = unsafe { libc::readv(self.as_raw_fd(), IoVec::as_raw(vectors), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// What is readable when there is a frame.
    #[must_use]
    pub fn event(&self) -> RawFd {
        self.front.event().unwrap_or(self.as_raw_fd())
    }

    /// Holds the tap's frames back until [`TapQueue::release`]: those that are
    /// [put](TapQueue::put) here come first. Before anybody waits for
    /// [`TapQueue::event`].
    ///
    /// # Errors
    /// The node is out of descriptors.
    pub fn hold(&self) -> io::Result<()> {
        self.front.hold()
    }

    /// Has a frame, with its header, be received before the tap's own; whether
    /// there was room for it.
    pub fn put(&self, frame: &[u8]) -> bool {
        frame.len() >= HEADER_LEN && self.front.put(frame)
    }

    /// Lets the tap's frames through again.
    ///
    /// # Errors
    /// The node is out of memory for it.
    pub fn release(&self) -> io::Result<()> {
        self.front.release(self.as_raw_fd())
    }

    /// Receives one frame of the tap's own with its header.
    ///
    /// # Errors
    /// `WouldBlock`: there is none.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.file, frame)
    }

    /// Tells the bridges behind the tap that `mac` is here: a RARP request for
    /// its own address (RFC 903), as other hypervisors send when a guest has
    /// moved.
    ///
    /// # Errors
    /// The node is out of memory for it, or the tap is down.
    pub fn announce(&self, mac: MacAddress) -> io::Result<()> {
        let frame = announcement(mac);
        (&self.file).write_all(&[&[0; HEADER_LEN][..], &frame].concat())
    }

    /// Sends one frame with its header.
    ///
    /// # Safety
    /// The memory behind `vectors` is mapped.
    ///
    /// # Errors
    /// The frame or its header is malformed (`InvalidInput`), or the node is
    /// out of memory for it.
    pub unsafe fn writev(&self, vectors: &[IoVec]) -> io::Result<usize> {
        let count = vectors.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: the caller's promise; `count` vectors are there.
        let n = unsafe { libc::writev(self.as_raw_fd(), IoVec::as_raw(vectors), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Throws away the frames that wait in this queue, up to a tap's usual
    /// queue length.
    pub fn drain(&self) {
        let mut scrap = [0u8; 64];
        for _ in 0..1024 {
            // A frame leaves the queue however little of it is taken.
            if self.read(&mut scrap).is_err() {
                break;
            }
        }
    }

    /// Attaches or detaches the queue of a multi-queue tap. The kernel sends
    /// no frame to a detached queue and forgets those that wait in it.
    ///
    /// # Errors
    /// It is so already (`InvalidInput`), or the tap has one queue only.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let flags = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut request = link::request("");
        // The flags are a bit set in 16 bits.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq, which outlives the call.
        check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &request) })
    }
}

/// Any non-blocking descriptor that carries one frame with its header per call
/// can stand in for a queue, such as a datagram socket.
impl From<OwnedFd> for TapQueue {
    fn from(fd: OwnedFd) -> Self {
        File::from(fd).into()
    }
}

impl From<File> for TapQueue {
    fn from(file: File) -> Self {
        Self {
            file,
            front: Front::default(),
        }
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn attach_error(name: &str, queues: u16, source: io::Error) -> Error {
    let shown = if name.is_empty() { "(new)" } else { name }.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::Denied {
            name: if name.is_empty() { "tap0" } else { name }.to_owned(),
            what: "make or attach to it",
            multi_queue: link::multi_queue(queues),
        },
        Some(libc::EBUSY) => Error::Busy(shown),
        Some(libc::EINVAL) => Error::Kind {
            name: shown,
            queues,
        },
        _ => Error::Io {
            name: shown,
            what: "attach to it",
            source,
        },
    }
}

/// The outcome of a system call that returns a negative number on errors.
fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
