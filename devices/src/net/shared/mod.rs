//! A vhost-user backend that serves rings of the monitor's own.
//!
//! For guests whose rings are not virtqueues: the monitor is the driver of
//! virtqueues in memory of its own, which it shares with the backend, and
//! copies frames between that and the guest's pages, once. Each connection gets
//! new memory: a backend that has gone cannot disturb the next one.

mod queue;
mod ring;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use blanket_drivers::tap::Offloads;
use blanket_memory::{Backing, Spec};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use vm_memory::GuestAddress;

use super::{FrameQueue, Peer};
use crate::vhost_user::{self, Setup, VhostUser};
use queue::{QUEUE_BYTES, Rings, SharedQueue};

/// How long a backend may take what was sent, before it is stopped.
const EMPTY: Duration = Duration::from_millis(20);
/// How long it may take until there are rings: whoever serves them comes later.
const BEGIN: Duration = Duration::from_millis(100);

/// What the monitor needs of a backend.
const NEEDED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << net::VIRTIO_NET_F_MRG_RXBUF;

/// Offloads of a TAP with the features of a backend: on frames to the guest,
/// and on frames from it.
const OFFLOADS: [(libc::c_uint, u32, u32); 3] = [
    (
        libc::TUN_F_CSUM,
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_CSUM,
    ),
    (
        libc::TUN_F_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_HOST_TSO4,
    ),
    (
        libc::TUN_F_TSO6,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_HOST_TSO6,
    ),
];

/// The features without those that need others (virtio 1.2, 5.1.3.1): whoever
/// cuts segments completes their checksums.
fn whole(features: u64) -> u64 {
    OFFLOADS
        .iter()
        .fold(features, |features, (_, guest, host)| {
            let lacks = |checksums: u32| features & 1 << checksums == 0;
            let mut left = features;
            if lacks(net::VIRTIO_NET_F_GUEST_CSUM) {
                left &= !(1 << guest);
            }
            if lacks(net::VIRTIO_NET_F_CSUM) {
                left &= !(1 << host);
            }
            left
        })
}

/// The other end of an interface: a backend.
pub(super) struct SharedPeer {
    backend: VhostUser,
    queues: Vec<Arc<SharedQueue>>,
    /// Queues in use.
    attached: AtomicU16,
    /// What the backend may leave undone on frames to the guest.
    offloads: AtomicU32,
    /// How often there were new rings.
    generation: Arc<AtomicU16>,
}

impl SharedPeer {
    /// With all queues of the backend's in use.
    ///
    /// # Errors
    /// The backend lacks what the monitor needs.
    pub(super) fn new(backend: VhostUser) -> io::Result<Self> {
        if backend.features() & NEEDED != NEEDED {
            return Err(io::Error::other(
                "the vhost-user backend cannot merge receive buffers; use another one",
            ));
        }
        let pairs = backend.pairs();
        let queues = (0..pairs).map(|_| Ok(Arc::new(SharedQueue::new(backend.handle())?)));
        Ok(Self {
            queues: queues.collect::<io::Result<_>>()?,
            attached: AtomicU16::new(pairs),
            offloads: AtomicU32::new(0),
            generation: Arc::default(),
            backend,
        })
    }

    /// The features to be used now.
    fn features(&self) -> u64 {
        let wanted = self.offloads.load(Ordering::Relaxed);
        let mut features = NEEDED;
        for (offload, guest, host) in OFFLOADS {
            features |= 1 << host;
            if wanted & offload != 0 {
                features |= 1 << guest;
            }
        }
        if self.queues.len() > 1 {
            features |= 1 << net::VIRTIO_NET_F_MQ;
        }
        whole(features & self.backend.features())
    }
}

impl Peer for SharedPeer {
    fn queues(&self) -> Vec<Arc<dyn FrameQueue>> {
        let all = self.queues.iter();
        all.map(|queue| Arc::clone(queue) as Arc<dyn FrameQueue>)
            .collect()
    }

    fn takes(&self) -> Offloads {
        let features = whole(self.backend.features());
        let taken = OFFLOADS
            .iter()
            .filter(|(_, _, host)| features & 1 << host != 0);
        let bits = taken.fold(0, |bits, (offload, _, _)| bits | offload);
        // The monitor completes checksums itself, but cuts no segments.
        Offloads(bits | libc::TUN_F_CSUM)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offloads.store(offloads.0, Ordering::Relaxed);
        Ok(())
    }

    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()> {
        let count = if attached { queue + 1 } else { queue };
        self.attached.store(count, Ordering::Relaxed);
        self.backend.enable(count);
        Ok(())
    }

    fn drain(&self) {
        for queue in &self.queues {
            queue.replace(None);
            queue.put(Vec::new());
        }
    }

    fn start(&self) -> io::Result<()> {
        let (tell, begun) = sync_channel(1);
        self.backend.start(Box::new(Driver {
            begun: Some(tell),
            queues: self.queues.clone(),
            attached: self.attached.load(Ordering::Relaxed),
            features: self.features(),
            generation: Arc::clone(&self.generation),
        }));
        // What the guest sends before there are rings would be lost.
        let _ = begun.recv_timeout(BEGIN);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let end = Instant::now() + EMPTY;
        while !self.queues.iter().all(|queue| queue.is_sent()) && Instant::now() < end {
            // As little as that: the backend polls, or has been told.
            std::thread::park_timeout(Duration::from_micros(50));
        }
        let stopped = self.backend.stop().map(drop);
        for queue in &self.queues {
            queue.keep();
            // What has not been taken by then is lost, as on a cable that is
            // pulled out.
            queue.replace(None);
        }
        stopped
    }

    fn waiting(&self, queue: usize) -> Vec<Vec<u8>> {
        let queue = self.queues.get(queue);
        queue.map(|queue| queue.waiting()).unwrap_or_default()
    }

    fn put(&self, queue: usize, frames: Vec<Vec<u8>>) {
        if let Some(queue) = self.queues.get(queue) {
            queue.put(frames);
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.backend.metrics().into()
    }
}

/// Makes the rings for each backend that begins.
struct Driver {
    /// Who waits for the first rings, or to hear that there is no backend.
    begun: Option<SyncSender<()>>,
    queues: Vec<Arc<SharedQueue>>,
    attached: u16,
    features: u64,
    generation: Arc<AtomicU16>,
}

impl Driver {
    fn tell(&mut self) {
        if let Some(begun) = self.begun.take() {
            // Nobody waits any more.
            let _ = begun.send(());
        }
    }
}

impl vhost_user::Rings for Driver {
    fn begin(&mut self) -> io::Result<Setup> {
        let size = QUEUE_BYTES * self.queues.len() as u64;
        let spec = Spec {
            size,
            backing: Backing::Small,
            shared: true,
        };
        // Each time at another address: DPDK takes memory at the same one for
        // that which it has mapped already.
        let start = u64::from(self.generation.fetch_add(1, Ordering::Relaxed)) << 32;
        let memory = blanket_memory::build_at(&spec, &[(GuestAddress(start), size)])
            .map_err(io::Error::other)?;
        let mut described = Vec::new();
        for (i, queue) in (0u16..).zip(&self.queues) {
            let rings = Rings::new(&memory, start + u64::from(i) * QUEUE_BYTES, self.features)?;
            described.extend(queue.describe(&rings, i < self.attached)?);
            queue.replace(Some(rings));
        }
        self.tell();
        Ok(Setup {
            features: self.features,
            memory,
            rings: described,
            resumed: false,
        })
    }

    fn link(&mut self, up: bool) {
        self.tell();
        if !up {
            for queue in &self.queues {
                queue.replace(None);
            }
        }
    }
}
