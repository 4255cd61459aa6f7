//! A TAP of this node as an uplink: for a switch that runs inside a node whose
//! own network is the way out (nested set-ups, tests without a NIC).
//!
//! The uplink is a station of its own behind the TAP. The node is its gateway:
//! every frame goes to the node, which delivers or forwards it, and the node is
//! told where the station is, so that nobody has to ask for it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use blanket_memory::IoVec;

use super::netlink::{self, Netlink};
use super::station::{Fate, fate};
use super::udp::fits;
use super::wire::{self, Checksum, End, FrameError, Headers, VIRTIO_HEADER, VirtioHeader};
use super::{
    Capabilities, Counters, Description, Error, Kind, RX_BUFFER, RxBuffer, Setup, Spec, TxPacket,
    Uplink,
};
use crate::mac::MacAddress;
use crate::tap::{self, HEADER_LEN, Offloads, Tap, TapQueue};

/// Room for a frame with a train in it, and one byte more.
const FRAME: usize = HEADER_LEN + wire::MAX_HEADERS + RX_BUFFER + 1;

/// See the module.
pub(super) struct TapUplink {
    _tap: Tap,
    queue: Arc<TapQueue>,
    node: MacAddress,
    mac: MacAddress,
    description: Description,
    counters: Counters,
    frame: Box<[u8]>,
}

impl TapUplink {
    pub(super) fn open(spec: &Spec) -> Result<Self, Error> {
        let setup = Setup {
            kind: Kind::Tap,
            interface: &spec.interface,
            capabilities: "CAP_NET_ADMIN",
        };
        let tap = Tap::open(&tap::Spec {
            name: Some(spec.interface.clone()),
            host_ip: spec.host_ip,
            queues: 1,
            ..tap::Spec::default()
        })?;
        let offloads = tap.offloads();
        let segmentation = offloads.contains(Offloads::USO);
        // What the node need not compute either.
        let wanted = Offloads(libc::TUN_F_CSUM | if segmentation { all_segmentation() } else { 0 });
        tap.set_offloads(wanted)
            .map_err(|e| setup.error("switch a TAP's offloads on", e))?;
        let queue = tap.queues().first().map(Arc::clone);
        let queue = queue.ok_or_else(|| Error::NoInterface(spec.interface.clone()))?;
        let interface = netlink::interface(tap.name())?;
        let node = interface.mac;
        let node = node.ok_or_else(|| Error::NotEthernet(spec.interface.clone()))?;
        // Next to the node's own, which is unique on this node.
        let mut mac = MacAddress::local(node.0);
        mac.0[5] ^= 1;
        Netlink::open()?
            .set_neighbour(interface.index, spec.local.ip(), mac)
            .map_err(|e| setup.error("tell the node where the uplink is", e))?;
        Ok(Self {
            description: Description {
                kind: Kind::Tap,
                interface: tap.name().to_owned(),
                local: spec.local,
                capabilities: Capabilities {
                    payload: interface.payload(spec.local.ip()),
                    segmentation,
                    coalescing: segmentation,
                    zero_copy: false,
                },
                mode: if segmentation { "GSO" } else { "plain" }.to_owned(),
            },
            _tap: tap,
            queue,
            node,
            mac,
            counters: Counters::default(),
            frame: vec![0; FRAME].into(),
        })
    }

    /// Sends one frame; false: later.
    fn send(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        let end = |mac, address| End { mac, address };
        let from = end(self.mac, self.description.local);
        let to = end(self.node, packet.to);
        let Some(headers) = Headers::new(from, to, packet.bytes, Checksum::Partial) else {
            self.counters.refuse(packet.datagrams(), Fate::Refused);
            return Ok(true);
        };
        // A train's datagrams are shorter than the MTU, which is 16 bits.
        let segment = if packet.is_train() {
            packet.size() as u16
        } else {
            0
        };
        let mut virtio = [0; HEADER_LEN];
        virtio[..VIRTIO_HEADER].copy_from_slice(&VirtioHeader::build(&headers, segment));
        let vectors = [&virtio, headers.as_bytes(), packet.bytes]
            .map(|piece| IoVec::new(piece.as_ptr().cast_mut(), piece.len()));
        // SAFETY: the three pieces outlive the call, which only reads them.
        match unsafe { self.queue.writev(&vectors) } {
            Ok(_) => self.counters.tx.add(packet),
            Err(error) => match fate(error)? {
                Fate::Later => return Ok(false),
                fate => self.counters.refuse(packet.datagrams(), fate),
            },
        }
        Ok(true)
    }

    /// Takes the frame of `len` bytes, virtio header and all, that was read.
    fn take(&mut self, len: usize, buffer: &mut RxBuffer<'_>) -> bool {
        let frame = self.frame.get(..len).unwrap_or_default();
        let virtio = VirtioHeader::parse(frame);
        let parsed = virtio
            .zip(frame.get(HEADER_LEN..))
            .map(|(virtio, bytes)| (virtio, wire::parse(bytes, !virtio.checksum_settled)));
        match parsed {
            Some((virtio, Ok(datagram))) if datagram.to == self.description.local => {
                let payload = datagram.payload;
                let segment = match usize::from(virtio.segment) {
                    0 => payload.len(),
                    segment => segment,
                };
                let taken = buffer.fill(datagram.from, payload, segment);
                if taken {
                    self.counters.rx.add(&buffer.packet());
                } else {
                    self.counters.rx_truncated += 1;
                }
                taken
            }
            Some((_, Err(FrameError::Checksum))) => {
                self.counters.rx_checksum += 1;
                false
            }
            _ => {
                self.counters.rx_malformed += 1;
                false
            }
        }
    }
}

/// Segmentation that the node may leave to us. TCP comes along although there
/// is none: the kernel takes UDP's only with it.
fn all_segmentation() -> libc::c_uint {
    libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | Offloads::USO.0
}

impl Uplink for TapUplink {
    fn description(&self) -> &Description {
        &self.description
    }

    fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> io::Result<usize> {
        let mut kept = 0;
        while let Some(buffer) = buffers.get_mut(kept) {
            let vector = [IoVec::new(self.frame.as_mut_ptr(), self.frame.len())];
            // SAFETY: the frame's memory is ours alone during the call.
            match unsafe { self.queue.readv(&vector) } {
                Ok(len) => kept += usize::from(self.take(len, buffer)),
                Err(error) => match fate(error)? {
                    Fate::Later => break,
                    _ => self.counters.rx_malformed += 1,
                },
            }
        }
        Ok(kept)
    }

    fn tx(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let payload = self.description.capabilities.payload;
        for (done, packet) in packets.iter().enumerate() {
            if !fits(packet, payload) {
                self.counters.refuse(packet.datagrams(), Fate::TooBig);
                continue;
            }
            if !packet.is_train() || self.description.capabilities.segmentation {
                if !self.send(packet)? {
                    return Ok(done);
                }
                continue;
            }
            for bytes in packet.iter() {
                // A TAP takes what the node has memory for: there is no later.
                if !self.send(&TxPacket::new(packet.to, bytes))? {
                    self.counters.refuse(1, Fate::Refused);
                }
            }
        }
        Ok(packets.len())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the queue owns the descriptor and is borrowed as long.
        unsafe { BorrowedFd::borrow_raw(self.queue.as_raw_fd()) }
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
