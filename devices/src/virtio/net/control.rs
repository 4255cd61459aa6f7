//! The control queue (virtio 1.2, 5.1.6.5).

use std::io;
use std::sync::Arc;

use blanket_drivers::mac::MacAddress;
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_net as net;

use super::super::queue::{Buffers, read_bytes, watch, write_bytes};
use super::super::{QueueHandler, VirtQueue};
use super::pair::wake;
use crate::worker::Handler;

/// Commands that are carried out before others have their turn.
const BUDGET: usize = 64;
/// Bytes of a command that are looked at: class, command and a short argument.
const MAX_COMMAND: usize = 2 + 6;

/// What the driver sets by its commands.
pub(super) trait Settable: Send + Sync {
    /// Uses the first `pairs` pairs of queues only.
    ///
    /// # Errors
    /// It cannot be done.
    fn set_pairs(&self, pairs: u16) -> io::Result<()>;

    /// Takes another address.
    fn set_mac(&self, mac: MacAddress);
}

pub(super) struct Control {
    queue: [VirtQueue; 1],
    interface: Arc<dyn Settable>,
    /// Queue pairs that the driver may use.
    most_pairs: u16,
    buffers: Buffers,
}

impl Control {
    pub(super) fn new(queue: VirtQueue, interface: Arc<dyn Settable>, most_pairs: u16) -> Self {
        Self {
            queue: [queue],
            interface,
            most_pairs,
            buffers: Buffers::default(),
        }
    }

    /// Carries out what the driver asks; true if there may be more.
    fn serve(&mut self) -> bool {
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(head) = self.queue[0].pop(&mut self.buffers) else {
                more = self.queue[0].enable_kicks();
                if more {
                    continue;
                }
                break;
            };
            let mut command = [0; MAX_COMMAND];
            let len = read_bytes(&self.buffers.readable, &mut command);
            let done = self.carry_out(&command[..len]).is_some();
            let ack = if done {
                net::VIRTIO_NET_OK
            } else {
                net::VIRTIO_NET_ERR
            };
            let written = write_bytes(&self.buffers.writable, &[ack as u8]);
            self.queue[0].push(head, written as u32);
        }
        self.queue[0].notify();
        more
    }

    /// `None` if the command is unknown, malformed or failed.
    fn carry_out(&self, command: &[u8]) -> Option<()> {
        let (&[class, command], argument) = command.split_first_chunk()?;
        match (u32::from(class), u32::from(command)) {
            (net::VIRTIO_NET_CTRL_MQ, net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let pairs = u16::from_le_bytes(*argument.first_chunk()?);
                if !(1..=self.most_pairs).contains(&pairs) {
                    return None;
                }
                let set = self.interface.set_pairs(pairs);
                set.inspect_err(|error| tracing::warn!(pairs, %error, "the queues"))
                    .ok()
            }
            (net::VIRTIO_NET_CTRL_MAC, net::VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                let mac = MacAddress(*argument.first_chunk()?);
                mac.is_unicast().then(|| self.interface.set_mac(mac))
            }
            // Filters are the driver's offer to receive less. The other end
            // passes every frame that the node sends here, which they allow for
            // ("best effort", 5.1.6.5.1), so there is nothing to keep.
            (net::VIRTIO_NET_CTRL_MAC, net::VIRTIO_NET_CTRL_MAC_TABLE_SET) => Some(()),
            (
                net::VIRTIO_NET_CTRL_RX,
                net::VIRTIO_NET_CTRL_RX_PROMISC | net::VIRTIO_NET_CTRL_RX_ALLMULTI,
            ) => matches!(argument, [0 | 1, ..]).then_some(()),
            _ => None,
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = watch(ops, &self.queue[0].kick, 0) {
            tracing::error!(%error, "the control queue cannot be watched");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue[0].take_kick();
        if self.serve() {
            wake(&self.queue[0]);
        }
    }
}

impl Handler for Control {
    fn kick(&mut self) {
        wake(&self.queue[0]);
    }
}

impl QueueHandler for Control {
    fn queues(&self) -> &[VirtQueue] {
        &self.queue
    }
}
