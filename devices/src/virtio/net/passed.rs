//! A network interface whose queues a vhost-user backend serves.
//!
//! The backend maps the guest's memory. It takes the driver's notifications
//! right from KVM and moves the frames; the monitor keeps the device's
//! registers and the control queue, and passes the backend's notifications on
//! to the driver, whose interrupts may be masked.
//!
//! When the backend goes, the link goes down. The next one begins where the
//! last one had handed the last buffer back: what it had taken and not used is
//! taken again.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use blanket_drivers::mac::MacAddress;
use blanket_memory::GuestRam;
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_net as net;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::super::queue::watch;
use super::super::{Activation, Device, Interrupt, QueueHandler, TRANSPORT_FEATURES, VirtQueue};
use super::control::{Control, Settable};
use super::{Chosen, KIND, Settings, bit, config, lock, own_features, queue_sizes};
use crate::lifecycle::{self, SavedState};
use crate::vhost_user::{self, Ring, Rings, Setup, VhostUser};
use crate::worker::Handler;

/// Features that are the backend's to offer.
const BACKEND: u64 = bit(net::VIRTIO_NET_F_CSUM)
    | bit(net::VIRTIO_NET_F_GUEST_CSUM)
    | bit(net::VIRTIO_NET_F_GUEST_TSO4)
    | bit(net::VIRTIO_NET_F_GUEST_TSO6)
    | bit(net::VIRTIO_NET_F_GUEST_ECN)
    | bit(net::VIRTIO_NET_F_GUEST_UFO)
    | bit(net::VIRTIO_NET_F_GUEST_USO4)
    | bit(net::VIRTIO_NET_F_GUEST_USO6)
    | bit(net::VIRTIO_NET_F_HOST_TSO4)
    | bit(net::VIRTIO_NET_F_HOST_TSO6)
    | bit(net::VIRTIO_NET_F_HOST_ECN)
    | bit(net::VIRTIO_NET_F_HOST_UFO)
    | bit(net::VIRTIO_NET_F_HOST_USO)
    | bit(net::VIRTIO_NET_F_MRG_RXBUF);

/// What the device, its handlers and the backend's thread have in common.
struct Shared {
    backend: VhostUser,
    mac: Mutex<MacAddress>,
    /// Pairs in use.
    pairs: Arc<AtomicU16>,
    /// Whether the driver reads that the link is up.
    up: Arc<AtomicBool>,
}

impl Settable for Shared {
    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.pairs.store(pairs, Ordering::Relaxed);
        self.backend.enable(pairs);
        Ok(())
    }

    fn set_mac(&self, mac: MacAddress) {
        *lock(&self.mac) = mac;
    }
}

/// A network interface that a backend serves.
pub struct PassedNet {
    name: String,
    mac: MacAddress,
    mtu: Option<u16>,
    sizes: Vec<u16>,
    shared: Arc<Shared>,
}

impl PassedNet {
    /// An interface with address `mac` that `backend` serves, for a guest
    /// with the memory `ram`. The guest is told `mtu` (in bytes) if there is
    /// one.
    ///
    /// # Errors
    /// The memory is private.
    pub fn new(
        name: impl Into<String>,
        backend: VhostUser,
        ram: &GuestRam,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        if let Some(region) = ram.iter().find(|region| region.file_offset().is_none()) {
            let private = vhost_user::Error::Private(region.start_addr());
            return Err(io::Error::other(private));
        }
        Ok(Self {
            name: name.into(),
            mac,
            mtu,
            sizes: queue_sizes(backend.pairs()),
            shared: Arc::new(Shared {
                backend,
                mac: Mutex::new(mac),
                pairs: Arc::new(AtomicU16::new(1)),
                up: Arc::default(),
            }),
        })
    }

    /// The backend's socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shared.backend.path()
    }
}

impl Device for PassedNet {
    fn kind(&self) -> u16 {
        KIND
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let backend = &self.shared.backend;
        own_features(backend.pairs(), self.mtu) | backend.features() & BACKEND
    }

    fn transport_features(&self) -> u64 {
        TRANSPORT_FEATURES & self.shared.backend.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        let up = self.shared.up.load(Ordering::Acquire);
        let pairs = self.shared.backend.pairs();
        config(*lock(&self.shared.mac), up, pairs, self.mtu)
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let most = self.shared.backend.pairs();
        let chosen = Chosen::new(activation.queues, activation.features, most)?;
        let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::new();
        let queues: Vec<_> = chosen.pairs.into_iter().flatten().collect();
        let calls = queues
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
        handlers.push(Box::new(Passed {
            calls: calls.collect::<io::Result<_>>()?,
            queues,
            ram: activation.ram,
            features: activation.features,
            interrupt: Arc::clone(&activation.interrupt),
            shared: Arc::clone(&self.shared),
        }));
        if let Some((queue, most)) = chosen.control {
            let shared = Arc::clone(&self.shared);
            handlers.push(Box::new(Control::new(queue, shared, most)));
        }
        Ok(handlers)
    }

    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        drop(handlers);
        self.shared.pairs.store(1, Ordering::Relaxed);
        self.shared.up.store(false, Ordering::Release);
        *lock(&self.shared.mac) = self.mac;
    }

    fn save(&self, _: &[Box<dyn QueueHandler>]) -> Result<SavedState, lifecycle::Error> {
        let settings = Settings {
            mac: *lock(&self.shared.mac),
            pairs: self.shared.pairs.load(Ordering::Relaxed),
        };
        SavedState::pack("virtio-net", 1, &settings)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let most = self.shared.backend.pairs();
        let saved = Settings::unpack(state, &self.name, most.into())?;
        self.shared.pairs.store(saved.pairs, Ordering::Relaxed);
        *lock(&self.shared.mac) = saved.mac;
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.backend.metrics().into()
    }
}

/// The queues that the backend serves.
struct Passed {
    queues: Vec<VirtQueue>,
    /// By which the backend tells of used buffers.
    calls: Vec<EventFd>,
    ram: GuestRam,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
}

impl Passed {
    /// Tells the driver of what the backend has told, if it has.
    fn pass_on(&self, index: usize) {
        if let Some(call) = self.calls.get(index)
            && call.read().is_ok()
        {
            // The queues are those from the first on.
            self.interrupt.queue(index as u16);
        }
    }

    fn rings(&self) -> io::Result<GuestRings> {
        let rings = self.queues.iter().zip(&self.calls);
        let rings = rings.map(|(queue, call)| {
            Ok(GuestRing {
                queue: Queue::try_from(queue.queue.state()).map_err(io::Error::other)?,
                kick: queue.kick.try_clone()?,
                call: call.try_clone()?,
            })
        });
        Ok(GuestRings {
            rings: rings.collect::<io::Result<_>>()?,
            ram: self.ram.clone(),
            features: self.features & self.shared.backend.features(),
            began: false,
            interrupt: Arc::clone(&self.interrupt),
            pairs: Arc::clone(&self.shared.pairs),
            up: Arc::clone(&self.shared.up),
        })
    }
}

impl MutEventSubscriber for Passed {
    fn init(&mut self, ops: &mut EventOps) {
        for (token, call) in (0..).zip(&self.calls) {
            if let Err(error) = watch(ops, call, token) {
                tracing::error!(%error, "a backend's calls cannot be watched");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        self.pass_on(events.data() as usize);
    }
}

impl Handler for Passed {
    fn kick(&mut self) {
        match self.rings() {
            Ok(rings) => self.shared.backend.start(Box::new(rings)),
            Err(error) => {
                tracing::error!(%error, "the queues cannot be passed on");
                self.interrupt.needs_reset();
            }
        }
    }

    fn quiesce(&mut self) {
        let bases = self.shared.backend.stop().unwrap_or_else(|error| {
            tracing::error!(%error, "the guest's memory may still change");
            None
        });
        for (i, queue) in self.queues.iter_mut().enumerate() {
            let told = bases.as_ref().and_then(|bases| bases.get(i)).copied();
            if let Some((next, used)) = position(&queue.queue, queue.ram(), told) {
                queue.queue.set_next_avail(next);
                queue.queue.set_next_used(used);
            }
        }
        for index in 0..self.calls.len() {
            self.pass_on(index);
        }
    }
}

impl QueueHandler for Passed {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}

/// Where a ring is: the next available entry, and the next used one. The used
/// ring says where the backend has handed the last buffer back. Entry `told`
/// counts only if it is between that and what the driver has made available.
/// `None` if the ring makes no sense, of which the driver will hear.
fn position(queue: &Queue, ram: &GuestRam, told: Option<u16>) -> Option<(u16, u16)> {
    let index = |ring: u64| {
        let index = ram.load(GuestAddress(ring.checked_add(2)?), Ordering::Acquire);
        index.ok().map(u16::from_le)
    };
    let (available, used) = (index(queue.avail_ring())?, index(queue.used_ring())?);
    let waiting = available.wrapping_sub(used);
    if waiting > queue.size() {
        return None;
    }
    let taken = told.map(|told| told.wrapping_sub(used));
    let taken = taken.filter(|taken| *taken <= waiting).unwrap_or(0);
    Some((used.wrapping_add(taken), used))
}

/// A ring of the guest's.
struct GuestRing {
    queue: Queue,
    kick: EventFd,
    call: EventFd,
}

/// The guest's rings, as each backend is told of them.
struct GuestRings {
    rings: Vec<GuestRing>,
    ram: GuestRam,
    features: u64,
    /// Whether a backend has begun: the rings have moved since.
    began: bool,
    interrupt: Arc<dyn Interrupt>,
    pairs: Arc<AtomicU16>,
    up: Arc<AtomicBool>,
}

impl Rings for GuestRings {
    fn begin(&mut self) -> io::Result<Setup> {
        let ram = self.ram.clone();
        let pairs = usize::from(self.pairs.load(Ordering::Relaxed));
        let mut rings = Vec::new();
        for (i, ring) in self.rings.iter().enumerate() {
            let queue = &ring.queue;
            let base = if self.began {
                let position = position(queue, &ram, None);
                position
                    .ok_or_else(|| io::Error::other("the guest broke a virtqueue"))?
                    .0
            } else {
                queue.next_avail()
            };
            rings.push(Ring {
                size: queue.size(),
                base,
                descriptors: queue.desc_table(),
                available: queue.avail_ring(),
                used: queue.used_ring(),
                kick: ring.kick.try_clone()?,
                call: ring.call.try_clone()?,
                enabled: i < 2 * pairs,
            });
        }
        Ok(Setup {
            features: self.features,
            memory: ram,
            rings,
            resumed: std::mem::replace(&mut self.began, true),
        })
    }

    fn link(&mut self, up: bool) {
        if self.up.swap(up, Ordering::AcqRel) != up {
            self.interrupt.config();
        }
        if up {
            // The last backend may have gone before it told of what it did.
            for index in 0..self.rings.len() {
                self.interrupt.queue(index as u16);
            }
        }
    }
}
