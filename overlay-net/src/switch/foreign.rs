//! Others' tunnels: VXLAN and Geneve, without encryption.
//!
//! A socket on the address of the node's first uplink for each kind and port,
//! opened when a peer needs it. Whoever sends from a peer's address is taken
//! for it: nothing here tells him from others.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use blanket_drivers::uplink::{
    self, MAX_SEGMENTS, MAX_TRAIN, RX_BUFFER, RxBuffer, Spec, TxPacket, Uplink,
};
use vm_memory::VolatileSlice;

use crate::api::types::{ForeignKind, PeerSpec};
use crate::directory::NodeId;
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, HEAD, Head, Offload, Segmenter, Vni};
use crate::tunnel::{Mode, PathStatus, PeerStatus, Stats, geneve, vxlan};

/// Buffers that are received into at once.
const BATCH: usize = 16;

/// Bytes that wait to be sent, about.
const WAIT: usize = 256 << 10;

/// Bytes before a packet in a datagram, without tags: the tunnel's header and
/// Ethernet's.
pub(super) const BEFORE: usize = vxlan::HEADER + 14;

/// How often a socket without room is asked again.
const PATIENCE: usize = 8;

/// Why there is no way to others' tunnels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForeignError {
    /// No address, or several.
    #[error("a VXLAN or Geneve peer has one address, and one or more networks (--vni)")]
    Address,
    /// Another peer has the address.
    #[error("another peer has that address already")]
    Twice,
    /// No socket.
    #[error("cannot take UDP port {0} on {1}: {2}; does the kernel have a device of that kind?")]
    Socket(u16, IpAddr, String),
}

/// Datagrams of one size to one peer.
struct Train {
    socket: usize,
    to: SocketAddr,
    start: usize,
    end: usize,
    segment: usize,
    count: usize,
    /// Its last datagram is shorter.
    closed: bool,
}

struct Socket {
    kind: ForeignKind,
    port: u16,
    uplink: Box<dyn Uplink>,
}

struct Peer {
    spec: PeerSpec,
    kind: ForeignKind,
    vnis: Vec<Vni>,
    to: SocketAddr,
    socket: usize,
    stats: Stats,
    sent: u64,
    received: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Foreign {
    sockets: Vec<Socket>,
    peers: HashMap<NodeId, Peer>,
    /// Whose what comes is.
    from: HashMap<(usize, IpAddr), NodeId>,
    last: u64,
    buffers: Vec<Box<[u8]>>,
    out: Vec<u8>,
    trains: Vec<Train>,
    pub(super) drops: Drops,
}

fn write(kind: ForeignKind, vni: Vni, frame: &Frame<'_>, to: &mut [u8]) -> Result<usize, Reason> {
    match kind {
        ForeignKind::Vxlan => vxlan::write(vni, frame, to),
        ForeignKind::Geneve => geneve::write(vni, frame, to),
    }
}

impl Foreign {
    /// Whether it is a peer of these.
    pub(super) fn has(&self, node: NodeId) -> bool {
        self.peers.contains_key(&node)
    }

    /// What a peer was said to be.
    pub(super) fn spec(&self, node: NodeId) -> Option<&PeerSpec> {
        self.peers.get(&node).map(|peer| &peer.spec)
    }

    /// What becomes readable when something has come.
    pub(super) fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|socket| socket.uplink.fd())
    }

    /// Adds a peer, reached from where `uplink` is. Its number, and the bytes
    /// that a packet to it may have.
    pub(super) fn add(
        &mut self,
        uplink: &dyn Uplink,
        spec: &PeerSpec,
    ) -> Result<(NodeId, usize), ForeignError> {
        let (Some(foreign), [to]) = (&spec.foreign, &spec.endpoints[..]) else {
            return Err(ForeignError::Address);
        };
        if foreign.vnis.is_empty() {
            return Err(ForeignError::Address);
        }
        let known = self.sockets.iter();
        let mut known = known.map(|socket| (socket.kind, socket.port) == (foreign.kind, to.port()));
        let socket = match known.position(|same| same) {
            Some(at) => at,
            None => self.open(uplink, foreign.kind, to.port())?,
        };
        if self.from.contains_key(&(socket, to.ip())) {
            return Err(ForeignError::Twice);
        }
        self.last += 1;
        // Others' numbers are the first bytes of their keys: that one is like
        // this is as likely as that two keys are alike in them.
        let node = NodeId(u64::MAX - self.last);
        let payload = self.sockets[socket]
            .uplink
            .description()
            .capabilities
            .payload;
        let peer = Peer {
            spec: spec.clone(),
            kind: foreign.kind,
            vnis: foreign.vnis.clone(),
            to: *to,
            socket,
            stats: Stats::default(),
            sent: 0,
            received: 0,
        };
        self.from.insert((socket, to.ip()), node);
        self.peers.insert(node, peer);
        Ok((node, payload.saturating_sub(BEFORE)))
    }

    fn open(
        &mut self,
        uplink: &dyn Uplink,
        kind: ForeignKind,
        port: u16,
    ) -> Result<usize, ForeignError> {
        let its = uplink.description();
        let local = SocketAddr::new(its.local.ip(), port);
        let spec = Spec::new(&its.interface, local);
        let opened = uplink::open(uplink::Kind::Udp, &spec);
        let uplink =
            opened.map_err(|error| ForeignError::Socket(port, local.ip(), error.to_string()))?;
        self.sockets.push(Socket { kind, port, uplink });
        if self.buffers.is_empty() {
            let buffer = || vec![0; RX_BUFFER].into_boxed_slice();
            self.buffers = (0..BATCH).map(|_| buffer()).collect();
        }
        Ok(self.sockets.len() - 1)
    }

    /// Removes a peer. False: there is none.
    pub(super) fn remove(&mut self, node: NodeId) -> bool {
        self.from.retain(|_, its| *its != node);
        self.peers.remove(&node).is_some()
    }

    /// What is known of a peer: whether it is there, nobody can tell.
    pub(super) fn status(&self, node: NodeId) -> Option<PeerStatus> {
        let peer = self.peers.get(&node)?;
        let uplink = &self.sockets[peer.socket].uplink;
        let path = PathStatus {
            uplink: 0,
            remote: peer.to,
            up: true,
            lossy: false,
            rtt_us: None,
            loss: 0.0,
            datagram: uplink.description().capabilities.payload,
            sent: peer.sent,
            received: peer.received,
        };
        Some(PeerStatus {
            connected: true,
            cipher: None,
            key_age: None,
            mode: Mode::PerPacket,
            stats: peer.stats,
            paths: vec![path],
        })
    }

    /// Sends a frame to a peer, with the next [`Foreign::flush`].
    pub(super) fn seal(&mut self, node: NodeId, vni: Vni, frame: &Frame<'_>) -> Result<(), Reason> {
        let peer = self.peers.get(&node).ok_or(Reason::NoPeer)?;
        if !peer.vnis.contains(&vni) {
            return Err(Reason::NoNetwork);
        }
        if self.out.len() > WAIT {
            self.flush();
        }
        if frame.offload.segments.is_none() {
            self.put(node, vni, frame)?;
        } else {
            let mut segments = Segmenter::new(frame, usize::from(u16::MAX), true)?;
            while let Some(segment) = segments.next() {
                self.put(node, vni, &segment)?;
            }
        }
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.stats.frames_out += 1;
            peer.stats.bytes_out += frame.len() as u64;
        }
        Ok(())
    }

    /// A frame that goes in one datagram.
    fn put(&mut self, node: NodeId, vni: Vni, frame: &Frame<'_>) -> Result<(), Reason> {
        let peer = self.peers.get_mut(&node).ok_or(Reason::NoPeer)?;
        let most = self.sockets[peer.socket]
            .uplink
            .description()
            .capabilities
            .payload;
        let start = self.out.len();
        let size = vxlan::HEADER + frame.len();
        if size > most {
            return Err(Reason::TooBig);
        }
        self.out.resize(start + size, 0);
        if let Err(reason) = write(peer.kind, vni, frame, &mut self.out[start..]) {
            self.out.truncate(start);
            return Err(reason);
        }
        peer.sent += 1;
        let end = start + size;
        if let Some(train) = self.trains.last_mut() {
            let same = (train.socket, train.to) == (peer.socket, peer.to);
            let fits = size <= train.segment
                && train.count < MAX_SEGMENTS
                && end - train.start <= MAX_TRAIN;
            if same && fits && !train.closed {
                train.end = end;
                train.count += 1;
                train.closed = size < train.segment;
                return Ok(());
            }
        }
        self.trains.push(Train {
            socket: peer.socket,
            to: peer.to,
            start,
            end,
            segment: size,
            count: 1,
            closed: false,
        });
        Ok(())
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        for train in &self.trains {
            let bytes = &self.out[train.start..train.end];
            let packet = match train.count {
                1 => TxPacket::new(train.to, bytes),
                _ => TxPacket::train(train.to, bytes, train.segment),
            };
            let uplink = &mut self.sockets[train.socket].uplink;
            let mut patience = PATIENCE;
            let lost = loop {
                match uplink.tx(&[packet]) {
                    Ok(0) if patience > 0 => patience -= 1,
                    Ok(0) => break Some(Reason::Full),
                    Ok(_) => break None,
                    Err(_) => break Some(Reason::Down),
                }
                std::thread::yield_now();
            };
            if let Some(reason) = lost {
                self.drops.add(reason);
            }
        }
        self.trains.clear();
        self.out.clear();
    }

    /// Takes what has come, and hands the frames in it to `each`: how many
    /// datagrams or trains there were.
    pub(super) fn receive(
        &mut self,
        each: &mut dyn FnMut(NodeId, Vni, &mut Frame<'_>),
    ) -> io::Result<usize> {
        let (mut total, mut outcome) = (0, Ok(()));
        for (index, socket) in self.sockets.iter_mut().enumerate() {
            let mut rooms = self.buffers.iter_mut();
            // There are as many of them.
            let mut buffers: [RxBuffer<'_>; BATCH] = std::array::from_fn(|_| match rooms.next() {
                Some(room) => RxBuffer::new(room),
                None => RxBuffer::new(&mut []),
            });
            let count = match socket.uplink.rx(&mut buffers) {
                Ok(count) => count,
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    continue;
                }
            };
            total += count;
            for buffer in buffers.iter_mut().take(count) {
                let node = self.from.get(&(index, buffer.from.ip().to_canonical()));
                let peer = node.and_then(|node| Some((*node, self.peers.get_mut(node)?)));
                let Some((node, peer)) = peer else {
                    self.drops.add(Reason::Stranger);
                    continue;
                };
                let bytes = buffer.bytes.get_mut(..buffer.len).unwrap_or_default();
                let size = match buffer.segment {
                    0 => bytes.len(),
                    size => size,
                };
                for datagram in bytes.chunks_mut(size.max(1)) {
                    peer.received += 1;
                    match take(socket.kind, &peer.vnis, datagram) {
                        Ok((vni, frame)) => {
                            peer.stats.frames_in += 1;
                            peer.stats.bytes_in += frame.len() as u64;
                            hand_on(node, vni, frame, each);
                        }
                        Err(reason) => self.drops.add(reason),
                    }
                }
            }
        }
        outcome.map(|()| total)
    }
}

/// The frame in a datagram, if it is of one of these networks.
fn take<'d>(
    kind: ForeignKind,
    vnis: &[Vni],
    datagram: &'d mut [u8],
) -> Result<(Vni, &'d mut [u8]), Reason> {
    let (vni, frame) = match kind {
        ForeignKind::Vxlan => vxlan::parse(datagram)?,
        ForeignKind::Geneve => geneve::parse(datagram)?,
    };
    if vnis.contains(&vni) {
        Ok((vni, frame))
    } else {
        Err(Reason::NoNetwork)
    }
}

fn hand_on(
    node: NodeId,
    vni: Vni,
    bytes: &mut [u8],
    each: &mut dyn FnMut(NodeId, Vni, &mut Frame<'_>),
) {
    let head = Head::of(bytes);
    let body = [VolatileSlice::from(
        bytes.get_mut(HEAD..).unwrap_or_default(),
    )];
    let mut frame = Frame {
        head,
        body: if body[0].is_empty() { &[] } else { &body },
        offload: Offload::default(),
    };
    each(node, vni, &mut frame);
}
