//! Between frames and the bytes in a guest's buffers.

use virtio_bindings::virtio_net as net;
use vm_memory::VolatileSlice;

use super::features::has;
use crate::drops::Reason;
use crate::frame::{Frame, HEAD, Head, Kind, OFFLOAD_BYTES, Offload, Pieces, Segments, copy};

/// Bytes of a frame at most: 64 KiB of IP with Ethernet and two tags.
const LONGEST: usize = 65535 + 40 + 22;

/// Where the header has the number of merged buffers (virtio 1.2, 5.1.6).
const COUNT: usize = 10;

/// Bytes of the header before each frame: without merged buffers, old drivers
/// have a shorter one (virtio 1.2, 5.1.6.1).
pub(super) fn header_len(features: u64) -> usize {
    let long = has(features, net::VIRTIO_NET_F_MRG_RXBUF)
        || has(features, virtio_bindings::virtio_config::VIRTIO_F_VERSION_1);
    if long {
        OFFLOAD_BYTES
    } else {
        OFFLOAD_BYTES - 2
    }
}

/// Takes the header and head out of a frame of `len` bytes, of which `pieces`
/// are the body then.
pub(super) fn take(
    pieces: &mut Pieces<'_>,
    len: usize,
    features: u64,
    head: &mut Head,
) -> Result<Offload, Reason> {
    let header_len = header_len(features);
    let len = len.checked_sub(header_len).ok_or(Reason::Malformed)?;
    if len > LONGEST {
        return Err(Reason::TooBig);
    }
    let mut header = [0; OFFLOAD_BYTES];
    pieces.take(&mut header[..header_len]);
    let mut offload = Offload::from_virtio(&header, len).map_err(|_| Reason::Offload)?;
    // A guest's word is none.
    offload.valid = false;
    let sums = has(features, net::VIRTIO_NET_F_CSUM);
    let segments = offload.segments.as_ref();
    if (offload.checksum.is_some() && !sums)
        || segments.is_some_and(|segments| !offered(features, segments))
    {
        return Err(Reason::Offload);
    }
    pieces.take(head.room(len.min(HEAD)));
    Ok(offload)
}

/// Whether the guest may leave this to be cut.
pub(super) fn offered(features: u64, segments: &Segments) -> bool {
    let feature = match segments.kind {
        Kind::Tcp4 => net::VIRTIO_NET_F_HOST_TSO4,
        Kind::Tcp6 => net::VIRTIO_NET_F_HOST_TSO6,
        Kind::Udp => net::VIRTIO_NET_F_HOST_USO,
        Kind::Fragments => return false,
    };
    has(features, feature) && (!segments.ecn || has(features, net::VIRTIO_NET_F_HOST_ECN))
}

/// Whether the guest takes this without its being cut.
pub(super) fn takes(features: u64, segments: &Segments) -> bool {
    let all = |bits: &[u32]| bits.iter().all(|bit| has(features, *bit));
    let kind = match segments.kind {
        Kind::Tcp4 => all(&[net::VIRTIO_NET_F_GUEST_TSO4]),
        Kind::Tcp6 => all(&[net::VIRTIO_NET_F_GUEST_TSO6]),
        Kind::Udp => all(&[net::VIRTIO_NET_F_GUEST_USO4, net::VIRTIO_NET_F_GUEST_USO6]),
        Kind::Fragments => false,
    };
    kind && has(features, net::VIRTIO_NET_F_GUEST_CSUM)
        && (!segments.ecn || has(features, net::VIRTIO_NET_F_GUEST_ECN))
}

/// A number that all frames of a flow have in common, from their first bytes.
pub(super) fn flow(head: &[u8]) -> u32 {
    let part = match head.get(12..15) {
        // With options in between, the addresses only.
        Some([8, 0, 0x45])
            if head
                .get(20..22)
                .is_some_and(|f| f[0] & 0x3f == 0 && f[1] == 0) =>
        {
            26..38
        }
        Some([8, 0, _]) => 26..34,
        Some([0x86, 0xdd, _]) => 22..58,
        _ => 0..12,
    };
    let bytes = head.get(part).unwrap_or_default();
    let mix = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = bytes.iter().fold(0x811c_9dc5, mix);
    hash ^ hash >> 16
}

/// What is left to be copied of a frame.
pub(super) struct Source<'s, 'm> {
    /// The header before it, and its head.
    heads: [&'s [u8]; 2],
    body: &'s [VolatileSlice<'s>],
    /// Bytes of the body's first piece that are done.
    skip: usize,
    /// Bytes that are left, and bytes that are done.
    left: usize,
    done: usize,
    /// Where the number of merged buffers is, byte by byte.
    count: [Option<VolatileSlice<'m>>; 2],
}

impl<'s, 'm> Source<'s, 'm> {
    pub(super) fn new(header: &'s [u8], frame: &'s Frame<'s>) -> Self {
        Self {
            heads: [header, frame.head.bytes()],
            body: frame.body,
            skip: 0,
            left: header.len() + frame.len(),
            done: 0,
            count: [None; 2],
        }
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Copies as much as there is room for into `to`; how much.
    pub(super) fn fill(&mut self, mut to: VolatileSlice<'m>) -> usize {
        let before = self.left;
        self.keep_count(&to);
        for head in &mut self.heads {
            let len = copy::from_bytes(head, &to);
            *head = &head[len..];
            self.left -= len;
            to = rest(to, len);
        }
        while let Some(piece) = self.body.first()
            && !to.is_empty()
        {
            let from = rest(*piece, self.skip);
            let len = from.len().min(to.len());
            from.copy_to_volatile_slice(to);
            to = rest(to, len);
            self.left -= len;
            self.skip += len;
            if self.skip == piece.len() {
                self.body = &self.body[1..];
                self.skip = 0;
            }
        }
        let len = before - self.left;
        self.done += len;
        len
    }

    /// Remembers where the number of buffers comes to lie.
    fn keep_count(&mut self, to: &VolatileSlice<'m>) {
        if self.done >= OFFLOAD_BYTES {
            return;
        }
        for (i, place) in self.count.iter_mut().enumerate() {
            let at = (COUNT + i).checked_sub(self.done);
            if let Some(byte) = at.and_then(|at| to.subslice(at, 1).ok()) {
                *place = Some(byte);
            }
        }
    }

    /// Says how many buffers there are, in the header that has been copied.
    pub(super) fn set_count(&self, count: u16) {
        for (place, byte) in self.count.iter().zip(count.to_le_bytes()) {
            if let Some(place) = place {
                place.copy_from(&[byte]);
            }
        }
    }
}

/// What is behind the first `len` bytes, if there are as many.
fn rest<'m>(slice: VolatileSlice<'m>, len: usize) -> VolatileSlice<'m> {
    slice
        .offset(len)
        .unwrap_or_else(|_| VolatileSlice::from(&mut [][..]))
}
