//! One connection to a backend.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use blanket_memory::shared_log::SharedLog;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::watchdog::Watchdog;
use super::{Error, Memory};

/// A backend's answers to all that belongs together are awaited so long.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Rings that a front end may name: there is a byte for their number.
const MOST_RINGS: u64 = 256;

/// `VHOST_F_LOG_ALL`: the backend notes what it writes.
const LOG_ALL: u64 = 1 << 26;

/// Where the backend is told that memory lies in this process. Where it does
/// is no business of the backend's, which only translates what it is told.
const USER: u64 = 1 << 44;

/// A ring as a backend is told of it.
pub(crate) struct Ring {
    /// Entries.
    pub(crate) size: u16,
    /// The next entry of the available ring to be taken.
    pub(crate) base: u16,
    /// Addresses in [`Setup::memory`] of the descriptors ...
    pub(crate) descriptors: u64,
    /// ... the available ring ...
    pub(crate) available: u64,
    /// ... and the used ring.
    pub(crate) used: u64,
    /// Tells the backend of available buffers.
    pub(crate) kick: EventFd,
    /// By which the backend tells of used buffers.
    pub(crate) call: EventFd,
    /// Whether the ring is in use.
    pub(crate) enabled: bool,
}

/// All that a backend is told when it is to begin.
pub(crate) struct Setup {
    /// The features in use, of those that it offers.
    pub(crate) features: u64,
    /// What addresses in the rings refer to.
    pub(crate) memory: Memory,
    /// The rings, from the first on.
    pub(crate) rings: Vec<Ring>,
    /// Whether another backend has served them before.
    pub(crate) resumed: bool,
}

/// Where a backend keeps what it has taken and not handed back, for its
/// successor: only they look into it.
pub(super) struct Inflight {
    is: VhostUserInflight,
    file: File,
}

/// A connection that has been greeted.
pub(super) struct Session {
    frontend: Frontend,
    socket: UnixStream,
    /// The features that the backend offers.
    pub(super) features: u64,
    /// Whether it can note what it writes.
    pub(super) logs: bool,
    /// Whether it can tell its successor what it was at.
    tracks: bool,
    /// Rings that have been begun, and the features in use with them.
    rings: Vec<VringConfigData>,
    used: u64,
}

/// Connects to the socket at `path` without waiting.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(socket.into())
}

impl Session {
    /// Connects to the backend at `path` and agrees on the protocol with it,
    /// for `pairs` pairs of queues.
    ///
    /// # Errors
    /// Nobody listens, or the backend is too old or none at all, or does not
    /// answer.
    pub(super) fn open(path: &Path, pairs: u16, watchdog: &Watchdog) -> Result<Self, Error> {
        let socket = connect(path).map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::greet(socket, pairs, watchdog)
    }

    /// Agrees on the protocol with the backend at the other end of `socket`.
    pub(super) fn greet(
        socket: UnixStream,
        pairs: u16,
        watchdog: &Watchdog,
    ) -> Result<Self, Error> {
        let _guard = watchdog.limit(&socket, PATIENCE).map_err(Error::Resource)?;
        let clone = || socket.try_clone().map_err(Error::Resource);
        let mut frontend = Frontend::from_stream(clone()?, MOST_RINGS);
        frontend.set_owner()?;
        let mut protocol = agree(&mut frontend)?;
        if pairs > 1 {
            if !protocol.contains(VhostUserProtocolFeatures::MQ) {
                return Err(Error::Pairs { pairs, most: 1 });
            }
            let most = frontend.get_queue_num()?;
            if most < pairs.into() {
                return Err(Error::Pairs { pairs, most });
            }
            // Backends of network interfaces count pairs, but the front end
            // would now take the number for one of rings.
            frontend = Frontend::from_stream(clone()?, MOST_RINGS);
            protocol = agree(&mut frontend)?;
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let features = frontend.get_features()?;
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Old("virtio 1.0"));
        }
        Ok(Self {
            frontend,
            socket,
            logs: features & LOG_ALL != 0
                && protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD),
            tracks: protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD),
            features: features & !VhostUserVirtioFeatures::all().bits() & !LOG_ALL,
            rings: Vec::new(),
            used: 0,
        })
    }

    /// The connection: readable only when it has ended, since a backend has
    /// nothing to say without being asked.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Has the backend begin, and note what it writes if there is a log. What
    /// the last one was at is in `inflight`, and what this one will be.
    ///
    /// # Errors
    /// It lacks a feature, refuses something, or does not answer.
    pub(super) fn start(
        &mut self,
        setup: &Setup,
        log: Option<&SharedLog>,
        inflight: &mut Option<Inflight>,
        watchdog: &Watchdog,
    ) -> Result<(), Error> {
        let _guard = self.limit(watchdog)?;
        let lacking = setup.features & !self.features;
        if lacking != 0 {
            return Err(Error::Features(lacking));
        }
        if let Some(log) = log {
            self.share(log)?;
        }
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.used = setup.features | protocol;
        self.frontend.set_features(in_use(self.used, log))?;
        *inflight = self.track(setup, inflight.take())?;
        let frontend = &mut self.frontend;
        frontend.set_mem_table(&regions(&setup.memory)?)?;
        self.rings.clear();
        for (i, ring) in setup.rings.iter().enumerate() {
            frontend.set_vring_num(i, ring.size)?;
            frontend.set_vring_base(i, ring.base)?;
            let addresses = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: USER + ring.descriptors,
                used_ring_addr: USER + ring.used,
                avail_ring_addr: USER + ring.available,
                log_addr: None,
            };
            frontend.set_vring_addr(i, &logged(&addresses, log))?;
            frontend.set_vring_call(i, &ring.call)?;
            frontend.set_vring_kick(i, &ring.kick)?;
            self.rings.push(addresses);
        }
        for (i, ring) in setup.rings.iter().enumerate() {
            frontend.set_vring_enable(i, ring.enabled)?;
        }
        // It may have missed what its predecessor was told of.
        for ring in &setup.rings {
            ring.kick.write(1).map_err(Error::Resource)?;
        }
        Ok(())
    }

    /// Hands over what the last backend was at, or has this one begin to keep
    /// that. One whose successor refuses it is forgotten.
    fn track(&mut self, setup: &Setup, last: Option<Inflight>) -> Result<Option<Inflight>, Error> {
        if !self.tracks {
            return Ok(None);
        }
        let size = setup.rings.iter().map(|ring| ring.size).max();
        let (count, size) = (setup.rings.len() as u16, size.unwrap_or(0));
        if let Some(last) = last.filter(|last| {
            setup.resumed && (last.is.num_queues, last.is.queue_size) == (count, size)
        }) {
            self.frontend
                .set_inflight_fd(&last.is, last.file.as_raw_fd())?;
            return Ok(Some(last));
        }
        let wanted = VhostUserInflight::new(0, 0, count, size);
        let (is, file) = self.frontend.get_inflight_fd(&wanted)?;
        // Some only begin to use it when it comes back.
        self.frontend.set_inflight_fd(&is, file.as_raw_fd())?;
        Ok(Some(Inflight { is, file }))
    }

    /// Uses the first `pairs` pairs of queues only.
    ///
    /// # Errors
    /// The backend refuses or does not answer.
    pub(super) fn enable(&mut self, pairs: u16, watchdog: &Watchdog) -> Result<(), Error> {
        let _guard = self.limit(watchdog)?;
        for i in 0..self.rings.len() {
            let enabled = i < 2 * usize::from(pairs);
            self.frontend.set_vring_enable(i, enabled)?;
        }
        Ok(())
    }

    /// Has the backend stop: on return it touches no memory. Where each ring
    /// stopped, by the backend's account.
    ///
    /// # Errors
    /// It does not answer, or with what is no place in a ring.
    pub(super) fn stop(&mut self, watchdog: &Watchdog) -> Result<Vec<u16>, Error> {
        let _guard = self.limit(watchdog)?;
        let mut bases = Vec::with_capacity(self.rings.len());
        for i in 0..std::mem::take(&mut self.rings).len() {
            let base = self.frontend.get_vring_base(i)?;
            bases.push(u16::try_from(base).map_err(|_| Error::Base(base))?);
        }
        Ok(bases)
    }

    /// Has the backend note from now on what it writes, or no more.
    ///
    /// # Errors
    /// It cannot, or does not answer.
    pub(super) fn log(
        &mut self,
        log: Option<&SharedLog>,
        watchdog: &Watchdog,
    ) -> Result<(), Error> {
        let _guard = self.limit(watchdog)?;
        if let Some(log) = log {
            self.share(log)?;
        }
        if self.rings.is_empty() {
            // It is told when it begins.
            return Ok(());
        }
        for (i, ring) in self.rings.iter().enumerate() {
            self.frontend.set_vring_addr(i, &logged(ring, log))?;
        }
        Ok(self.frontend.set_features(in_use(self.used, log))?)
    }

    /// Hands the log over. Backends do not agree on what they answer, but all do.
    fn share(&mut self, log: &SharedLog) -> Result<(), Error> {
        const SET_LOG_BASE: u32 = 6;
        const VERSION: u32 = 1;
        const MOST: u32 = 64;
        if !self.logs {
            return Err(Error::Old("log of what it writes"));
        }
        let mut message = Vec::new();
        for word in [SET_LOG_BASE, VERSION, 16] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(log.len().to_ne_bytes());
        message.extend(0u64.to_ne_bytes());
        let sent = self
            .socket
            .send_with_fd(&message[..], log.as_raw_fd())
            .map_err(io::Error::from);
        if sent.map_err(Error::Resource)? != message.len() {
            return Err(Error::Resource(io::ErrorKind::WriteZero.into()));
        }
        let mut words = [[0; 4]; 3];
        let mut read = |bytes: &mut [u8]| {
            let read = self.socket.read_exact(bytes);
            read.map_err(|_| Error::Old("log that it says to have"))
        };
        for word in &mut words {
            read(word)?;
        }
        let [request, _, len] = words.map(u32::from_ne_bytes);
        if request != SET_LOG_BASE || len > MOST {
            return Err(Error::Old("log that it says to have"));
        }
        read(&mut [0; MOST as usize][..len as usize])
    }

    fn limit<'a>(&self, watchdog: &'a Watchdog) -> Result<super::watchdog::Guard<'a>, Error> {
        watchdog
            .limit(&self.socket, PATIENCE)
            .map_err(Error::Resource)
    }
}

/// The features in use with a log, or without.
fn in_use(features: u64, log: Option<&SharedLog>) -> u64 {
    match log {
        Some(_) => features | LOG_ALL,
        None => features,
    }
}

/// A ring's addresses with a log, or without.
fn logged(ring: &VringConfigData, log: Option<&SharedLog>) -> VringConfigData {
    /// `VHOST_VRING_F_LOG`.
    const LOG: u32 = 1;
    match log {
        Some(_) => VringConfigData {
            flags: LOG,
            log_addr: Some(ring.used_ring_addr - USER),
            ..*ring
        },
        None => *ring,
    }
}

/// Settles the features of the protocol.
fn agree(frontend: &mut Frontend) -> Result<VhostUserProtocolFeatures, Error> {
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    let features = frontend.get_features()?;
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Err(Error::Old("protocol features"));
    }
    let protocol = frontend.get_protocol_features()? & wanted;
    frontend.set_protocol_features(protocol)?;
    Ok(protocol)
}

/// Memory as a backend maps it.
fn regions(memory: &Memory) -> Result<Vec<VhostUserMemoryRegionInfo>, Error> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        let mut info = VhostUserMemoryRegionInfo::from_guest_region(region)
            .map_err(|_| Error::Private(GuestAddress(region.start_addr().0)))?;
        info.userspace_addr = USER + info.guest_phys_addr;
        regions.push(info);
    }
    Ok(regions)
}
