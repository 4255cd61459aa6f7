//! What the port offers to front ends.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring as ring;

/// `VHOST_F_LOG_ALL`: pages that the port writes are noted.
pub(super) const LOG_ALL: u32 = 26;

/// Whether a feature is among `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// The protocol has features, too.
pub(super) const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What is offered for so many pairs of queues.
pub(super) fn offered(pairs: u16) -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        ring::VIRTIO_RING_F_EVENT_IDX,
        ring::VIRTIO_RING_F_INDIRECT_DESC,
        LOG_ALL,
        net::VIRTIO_NET_F_CSUM,
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_GUEST_ECN,
        net::VIRTIO_NET_F_GUEST_USO4,
        net::VIRTIO_NET_F_GUEST_USO6,
        net::VIRTIO_NET_F_HOST_TSO4,
        net::VIRTIO_NET_F_HOST_TSO6,
        net::VIRTIO_NET_F_HOST_ECN,
        net::VIRTIO_NET_F_HOST_USO,
        net::VIRTIO_NET_F_MRG_RXBUF,
        // The guest announces itself after a migration, if its front end asks it to.
        net::VIRTIO_NET_F_GUEST_ANNOUNCE,
    ];
    let several = u64::from(pairs > 1) << net::VIRTIO_NET_F_MQ;
    bits.iter()
        .fold(PROTOCOL | several, |all, bit| all | 1 << bit)
}

/// What of the protocol is offered. In-flight tracking is not: buffers are
/// handed back in order and within the call that takes them, so the used ring
/// says all.
pub(super) fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}
