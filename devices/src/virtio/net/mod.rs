//! The network interface (virtio 1.2, 5.1) on a TAP ([`Net`]), or with its
//! queues passed through to a vhost-user backend ([`PassedNet`]).
//!
//! A queue pair and its TAP queue have one owner, `Pair`, on one
//! worker: frames go between the guest's buffers and the kernel in one system
//! call each, without a copy in between. Segmentation and checksums are left
//! to whoever has to do them, as the driver negotiated. A backend has the
//! guest's memory and does all that by itself.
//!
//! Receive and transmit queues alternate (0, 1, 2, ...); the control queue
//! comes after the last pair that the driver can use.

mod control;
mod pair;
mod passed;
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
use crate::net::{Attachment, Port};
use control::{Control, Settable};
use pair::Pair;
pub use passed::PassedNet;

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
        lock(&self.mac)
    }
}

impl Settable for Shared {
    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.port.set_queues(pairs)
    }

    fn set_mac(&self, mac: MacAddress) {
        *self.mac() = mac;
    }
}

/// Locks what a panic cannot have left inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the driver can change by the control queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    mac: MacAddress,
    /// Pairs in use.
    pairs: u16,
}

impl Settings {
    /// The settings that were saved, of an interface with at most `most` pairs.
    fn unpack(state: &SavedState, device: &str, most: usize) -> Result<Self, lifecycle::Error> {
        let saved: Self = state.unpack("virtio-net", 1)?;
        if saved.pairs == 0 || usize::from(saved.pairs) > most {
            return Err(lifecycle::Error::Device {
                device: device.to_owned(),
                message: format!(
                    "the driver uses {} queue pairs, the interface has {most}: give it as many",
                    saved.pairs
                ),
            });
        }
        Ok(saved)
    }
}

/// Largest sizes of the queues of an interface with `pairs` pairs.
fn queue_sizes(pairs: u16) -> Vec<u16> {
    let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
    sizes.push(CONTROL_SIZE);
    sizes
}

/// What the monitor offers itself, whoever moves the frames.
fn own_features(pairs: u16, mtu: Option<u16>) -> u64 {
    let mut features = bit(net::VIRTIO_NET_F_MAC)
        | bit(net::VIRTIO_NET_F_STATUS)
        | bit(net::VIRTIO_NET_F_CTRL_VQ)
        | bit(net::VIRTIO_NET_F_CTRL_RX)
        | bit(net::VIRTIO_NET_F_CTRL_MAC_ADDR);
    if pairs > 1 {
        features |= bit(net::VIRTIO_NET_F_MQ);
    }
    if mtu.is_some() {
        features |= bit(net::VIRTIO_NET_F_MTU);
    }
    features
}

/// `struct virtio_net_config` (virtio 1.2, 5.1.4) as far as the MTU.
fn config(mac: MacAddress, up: bool, pairs: u16, mtu: Option<u16>) -> Vec<u8> {
    let status = if up { net::VIRTIO_NET_S_LINK_UP } else { 0 };
    let mut config = mac.0.to_vec();
    config.extend((status as u16).to_le_bytes());
    config.extend(pairs.to_le_bytes());
    config.extend(mtu.unwrap_or(0).to_le_bytes());
    config
}

/// The queues that a driver has enabled, by their use.
struct Chosen {
    /// From the first pair on, without a gap: receive and transmit.
    pairs: Vec<[VirtQueue; 2]>,
    /// The control queue, and the most pairs that it may ask for.
    control: Option<(VirtQueue, u16)>,
}

impl Chosen {
    /// Of an interface with `most` pairs.
    ///
    /// # Errors
    /// There is no pair.
    fn new(queues: Vec<VirtQueue>, features: u64, most: u16) -> io::Result<Self> {
        let has_control = features & bit(net::VIRTIO_NET_F_CTRL_VQ) != 0;
        let multi = has_control && features & bit(net::VIRTIO_NET_F_MQ) != 0;
        let usable = usize::from(if multi { most } else { 1 });
        let mut slots: Vec<Option<VirtQueue>> = Vec::new();
        slots.resize_with(2 * usize::from(most) + 1, || None);
        for queue in queues {
            if let Some(slot) = slots.get_mut(usize::from(queue.index)) {
                *slot = Some(queue);
            }
        }
        let control = slots.get_mut(2 * usable).filter(|_| has_control);
        let control = control.and_then(Option::take);
        let mut pairs = Vec::new();
        for slots in slots.chunks_exact_mut(2).take(usable) {
            let [rx, tx] = slots else { break };
            let (Some(rx), Some(tx)) = (rx.take(), tx.take()) else {
                break;
            };
            pairs.push([rx, tx]);
        }
        if pairs.is_empty() {
            return Err(io::Error::other("the driver enabled no pair of queues"));
        }
        let enabled = if multi { pairs.len() as u16 } else { 1 };
        Ok(Self {
            control: control.map(|queue| (queue, enabled)),
            pairs,
        })
    }
}

/// A network interface on a TAP.
pub struct Net {
    name: String,
    tap_name: String,
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
        let tap_name = tap.name().to_owned();
        let features = features(&tap) | own_features(tap.queues().len() as u16, mtu);
        let sizes = queue_sizes(tap.queues().len() as u16);
        Ok(Self {
            name: name.into(),
            tap_name,
            mac,
            mtu,
            features,
            sizes,
            shared: Arc::new(Shared {
                port: Port::new(Attachment::Tap(tap))?,
                mac: Mutex::new(mac),
            }),
            pairs: 1,
        })
    }

    /// Name of the TAP on the node.
    #[must_use]
    pub fn tap_name(&self) -> &str {
        &self.tap_name
    }

    /// Most pairs that a driver can have.
    fn most_pairs(&self) -> u16 {
        self.shared.port.queues().len() as u16
    }
}

/// What an interface on `tap` offers.
fn features(tap: &Tap) -> u64 {
    let mut features = bit(net::VIRTIO_NET_F_MRG_RXBUF)
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

    fn config(&self) -> Vec<u8> {
        config(*self.shared.mac(), true, self.most_pairs(), self.mtu)
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let features = activation.features;
        let chosen = Chosen::new(activation.queues, features, self.most_pairs())?;
        let port = &self.shared.port;
        port.peer().set_offloads(offloads(features))?;
        port.set_queues(self.pairs.min(chosen.pairs.len() as u16))?;
        let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::new();
        for (queues, frames) in chosen.pairs.into_iter().zip(port.queues()) {
            handlers.push(Box::new(Pair::new(
                queues,
                frames,
                features & bit(net::VIRTIO_NET_F_MRG_RXBUF) != 0,
                &activation.interrupt,
                &self.shared,
            )));
        }
        if let Some((queue, most)) = chosen.control {
            let shared = Arc::clone(&self.shared);
            handlers.push(Box::new(Control::new(queue, shared, most)));
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
            pairs: self.shared.port.used_queues(),
        };
        SavedState::pack("virtio-net", 1, &settings)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let saved = Settings::unpack(state, &self.name, self.most_pairs().into())?;
        self.pairs = saved.pairs;
        *self.shared.mac() = saved.mac;
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.port.read_metrics()
    }
}
