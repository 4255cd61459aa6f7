//! The network interface (virtio 1.2, 5.1) on a TAP.
//!
//! A queue pair and its TAP queue have one owner, `Pair`, on one
//! worker: frames go between the guest's buffers and the kernel in one system
//! call each, without a copy in between. Segmentation and checksums are left
//! to whoever has to do them, as the driver negotiated.
//!
//! Receive and transmit queues alternate (0, 1, 2, ...); the control queue
//! comes after the last pair that the driver can use.

mod control;
mod pair;
mod rx;
mod tx;
mod used;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{self, Offloads, Tap};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as net;

use super::{Activation, Device, QueueHandler, VirtQueue};
use crate::lifecycle::{self, SavedState};
use crate::net::Port;
use control::Control;
use pair::Pair;

/// Device type (virtio 1.2, 5.1.1).
const KIND: u16 = 1;
/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;

/// System calls of the threads that serve an interface.
pub const SYSCALLS: &[libc::c_long] = tap::SYSCALLS;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What the TAP can spare the guest, as a feature and as a TAP's offload.
const GUEST_OFFLOADS: [(u64, libc::c_uint); 7] = [
    (bit(net::VIRTIO_NET_F_GUEST_CSUM), libc::TUN_F_CSUM),
    (bit(net::VIRTIO_NET_F_GUEST_TSO4), libc::TUN_F_TSO4),
    (bit(net::VIRTIO_NET_F_GUEST_TSO6), libc::TUN_F_TSO6),
    (bit(net::VIRTIO_NET_F_GUEST_ECN), libc::TUN_F_TSO_ECN),
    (bit(net::VIRTIO_NET_F_GUEST_UFO), libc::TUN_F_UFO),
    (bit(net::VIRTIO_NET_F_GUEST_USO4), libc::TUN_F_USO4),
    (bit(net::VIRTIO_NET_F_GUEST_USO6), libc::TUN_F_USO6),
];

/// The TAP's offloads for a driver's features. Without checksums there is no
/// segmentation, and UDP's is switched for both versions of IP at once.
fn offloads(features: u64) -> Offloads {
    let mut bits = GUEST_OFFLOADS
        .iter()
        .filter(|(feature, _)| features & feature != 0)
        .fold(0, |bits, (_, offload)| bits | offload);
    if bits & libc::TUN_F_CSUM == 0 {
        return Offloads::default();
    }
    if !Offloads(bits).contains(Offloads::USO) {
        bits &= !Offloads::USO.0;
    }
    if bits & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        bits &= !libc::TUN_F_TSO_ECN;
    }
    Offloads(bits)
}

/// What the handlers of one interface have in common.
struct Shared {
    port: Port,
    /// The address, which the driver can change.
    mac: Mutex<MacAddress>,
}

impl Shared {
    fn mac(&self) -> MutexGuard<'_, MacAddress> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the driver can change by the control queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    mac: MacAddress,
    /// Pairs in use.
    pairs: u16,
}

/// A network interface.
pub struct Net {
    name: String,
    mac: MacAddress,
    mtu: Option<u16>,
    features: u64,
    sizes: Vec<u16>,
    shared: Arc<Shared>,
    /// Pairs to begin with: 1, or what a restored driver had set.
    pairs: u16,
}

impl Net {
    /// An interface with address `mac` on `tap`, with as many queue pairs as
    /// the TAP has queues. The guest is told `mtu` (in bytes) if there is one.
    ///
    /// # Errors
    /// The TAP's spare queues cannot be detached.
    pub fn new(
        name: impl Into<String>,
        tap: Tap,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        let pairs = tap.queues().len() as u16;
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
        sizes.push(CONTROL_SIZE);
        Ok(Self {
            name: name.into(),
            mac,
            mtu,
            features: features(&tap, mtu),
            sizes,
            shared: Arc::new(Shared {
                port: Port::new(tap)?,
                mac: Mutex::new(mac),
            }),
            pairs: 1,
        })
    }

    /// Name of the TAP on the node.
    #[must_use]
    pub fn tap_name(&self) -> &str {
        self.shared.port.tap().name()
    }

    /// Makes a handler for each pair that the driver has enabled, from the
    /// first on without a gap.
    fn pairs(
        &self,
        queues: &mut [Option<VirtQueue>],
        usable: usize,
        activation: (u64, &Arc<dyn super::Interrupt>),
    ) -> Vec<Box<dyn QueueHandler>> {
        let (features, interrupt) = activation;
        let mut pairs: Vec<Box<dyn QueueHandler>> = Vec::new();
        let taps = self.shared.port.tap().queues().iter();
        for (tap, slots) in taps.zip(queues.chunks_exact_mut(2)).take(usable) {
            let [rx, tx] = slots else { break };
            let (Some(rx), Some(tx)) = (rx.take(), tx.take()) else {
                break;
            };
            pairs.push(Box::new(Pair::new(
                [rx, tx],
                tap,
                features & bit(net::VIRTIO_NET_F_MRG_RXBUF) != 0,
                interrupt,
                &self.shared,
            )));
        }
        pairs
    }
}

/// What an interface on `tap` offers.
fn features(tap: &Tap, mtu: Option<u16>) -> u64 {
    let mut features = bit(net::VIRTIO_NET_F_MAC)
        | bit(net::VIRTIO_NET_F_STATUS)
        | bit(net::VIRTIO_NET_F_MRG_RXBUF)
        | bit(net::VIRTIO_NET_F_CTRL_VQ)
        | bit(net::VIRTIO_NET_F_CTRL_RX)
        | bit(net::VIRTIO_NET_F_CTRL_MAC_ADDR)
        | bit(net::VIRTIO_NET_F_CSUM)
        | bit(net::VIRTIO_NET_F_HOST_TSO4)
        | bit(net::VIRTIO_NET_F_HOST_TSO6)
        | bit(net::VIRTIO_NET_F_HOST_ECN)
        | bit(net::VIRTIO_NET_F_HOST_UFO);
    for (feature, offload) in GUEST_OFFLOADS {
        if tap.offloads().contains(Offloads(offload)) {
            features |= feature;
        }
    }
    if tap.offloads().contains(Offloads::USO) {
        features |= bit(net::VIRTIO_NET_F_HOST_USO);
    }
    if tap.queues().len() > 1 {
        features |= bit(net::VIRTIO_NET_F_MQ);
    }
    if mtu.is_some() {
        features |= bit(net::VIRTIO_NET_F_MTU);
    }
    features
}

impl Device for Net {
    fn kind(&self) -> u16 {
        KIND
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    /// `struct virtio_net_config` (virtio 1.2, 5.1.4) as far as the MTU.
    fn config(&self) -> Vec<u8> {
        let mut config = self.shared.mac().0.to_vec();
        config.extend((net::VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config.extend((self.shared.port.tap().queues().len() as u16).to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let features = activation.features;
        let control = features & bit(net::VIRTIO_NET_F_CTRL_VQ) != 0;
        let multi = control && features & bit(net::VIRTIO_NET_F_MQ) != 0;
        let usable = if multi {
            self.shared.port.tap().queues().len()
        } else {
            1
        };
        let mut queues: Vec<Option<VirtQueue>> = self.sizes.iter().map(|_| None).collect();
        for queue in activation.queues {
            if let Some(slot) = queues.get_mut(usize::from(queue.index)) {
                *slot = Some(queue);
            }
        }
        let control_queue = queues
            .get_mut(2 * usable)
            .filter(|_| control)
            .and_then(Option::take);
        let mut handlers = self.pairs(&mut queues, usable, (features, &activation.interrupt));
        if handlers.is_empty() {
            return Err(io::Error::other("the driver enabled no pair of queues"));
        }
        self.shared.port.tap().set_offloads(offloads(features))?;
        let enabled = handlers.len() as u16;
        self.shared.port.set_queues(self.pairs.min(enabled))?;
        if let Some(queue) = control_queue {
            let most = if multi { enabled } else { 1 };
            handlers.push(Box::new(Control::new(queue, &self.shared, most)));
        }
        Ok(handlers)
    }

    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        drop(handlers);
        self.pairs = 1;
        self.shared.port.clear(&self.name);
        *self.shared.mac() = self.mac;
    }

    fn save(&self, _: &[Box<dyn QueueHandler>]) -> Result<SavedState, lifecycle::Error> {
        let settings = Settings {
            mac: *self.shared.mac(),
            pairs: self.shared.port.queues(),
        };
        SavedState::pack("virtio-net", 1, &settings)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let saved: Settings = state.unpack("virtio-net", 1)?;
        let most = self.shared.port.tap().queues().len();
        if saved.pairs == 0 || usize::from(saved.pairs) > most {
            return Err(lifecycle::Error::Device {
                device: self.name.clone(),
                message: format!(
                    "the driver uses {} queue pairs, the interface has {most}: give it as many",
                    saved.pairs
                ),
            });
        }
        self.pairs = saved.pairs;
        *self.shared.mac() = saved.mac;
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.port.metrics.read()
    }
}
