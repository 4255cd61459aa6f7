//! Tunnels: frames to other nodes and from them, sealed.
//!
//! [`Tunnels`] is a state machine without sockets and clocks: it is given what
//! has come and the time, and leaves what is to be sent in a [`TrainBuffer`].
//! One worker owns it; workers that each have their own UDP port have their
//! own tunnels, with the same key.
//!
//! ```text
//! Frame --seal--> TrainBuffer --packets--> Uplink ~~~ Uplink --Received--> open --> Frame
//!                  ^                                                        |
//!                  +---- tick: probes, handshakes <---- answers ------------+
//! ```
//!
//! - A frame up to 64 KiB is a unit (*super-frame*): chunks of one size, which
//!   form a train that crosses the stack as one packet. Each is sealed on its
//!   own. Those that come together are opened and handed on where they lie;
//!   others are copied and put together, within bounds.
//! - Small frames of a burst to one peer share datagrams.
//! - When much is lost, [`Tunnels::mode`] says so: then whoever calls cuts
//!   large frames up to [`Tunnels::max_frame`] first, since a frame is lost
//!   with any of its chunks.
//!
//! | module | what it does |
//! |---|---|
//! | [`wire`] | datagrams and records, byte by byte |
//! | `noise`, `cookie` | handshakes; what keeps strangers from starting many |
//! | `session`, `aead`, `window` | keys, nonces, what has come already |
//! | `peer`, `path` | the ways to a peer: health, loss, size, which one a flow takes |
//! | `seal`, `train` | frames become datagrams |
//! | `open`, `assemble` | datagrams become frames |
//! | `timers` | probes, new keys, what expires |
//! | [`io`] | all of it over uplinks |
//! | [`vxlan`], [`geneve`] | frames to others' tunnels, without encryption |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;
use thiserror::Error;

use crate::drops::Drops;

mod aead;
mod assemble;
mod cookie;
pub mod geneve;
pub mod io;
mod noise;
mod open;
mod path;
mod peer;
mod seal;
mod session;
mod timers;
mod train;
mod udp;
pub mod vxlan;
mod window;
pub mod wire;

#[cfg(test)]
mod tests;

pub use aead::{Cipher, Costs};
pub use noise::{generate, prepare, public};
pub use open::{Each, Received};
pub use seal::{Gaps, flow_hash};
pub use train::{Train, TrainBuffer};

/// Time since some moment, the same for all calls.
pub type Time = Duration;
/// An X25519 private key.
pub type PrivateKey = [u8; 32];
/// An X25519 public key: who a node is.
pub type PublicKey = [u8; 32];

/// Peers at most.
const MAX_PEERS: usize = 8192;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        // Linux has random numbers from the start of user space on. Without
        // them there are no secrets, and nothing here is worth going on with.
        std::process::abort();
    }
    bytes
}

/// A peer, as a number: never used again.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct PeerId(pub u32);

/// Whether large frames go as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Large frames cross the tunnel whole.
    Whole,
    /// So much is lost that they should be segmented before.
    PerPacket,
}

/// What a node's tunnels need to know.
#[derive(Clone)]
pub struct Config {
    /// The node's private key.
    pub private: PrivateKey,
    /// The time since 1970, at time 0: it must not go backwards by much when
    /// a node starts anew, or peers think that its handshakes are old ones.
    pub epoch: Duration,
    /// For each uplink what a datagram has at most
    /// ([`Capabilities::payload`](blanket_drivers::uplink::Capabilities)).
    pub uplinks: Vec<usize>,
    /// What sealing costs here.
    pub costs: Costs,
}

/// A way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathConfig {
    /// The local uplink.
    pub uplink: u8,
    /// Where the peer receives.
    pub remote: SocketAddr,
    /// Which part of the flows takes it, compared with others; 0: only if
    /// nothing else is left.
    pub weight: u16,
}

/// Another node.
#[derive(Clone)]
pub struct PeerConfig {
    /// Who it is.
    pub public: PublicKey,
    /// A secret that only the two nodes have, besides their keys.
    pub psk: Option<[u8; 32]>,
    /// Where it may be. None: it is waited for.
    pub paths: Vec<PathConfig>,
}

/// Why a peer was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// There is a peer with that key.
    #[error("there is a peer with this key already")]
    Twice,
    /// It is this node's own key.
    #[error("this is the node's own key")]
    Own,
    /// There are too many.
    #[error("there are {MAX_PEERS} peers already")]
    TooMany,
}

/// What was carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Stats {
    /// Frames sealed.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames handed on.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Of these, frames of several chunks that were handed on in place.
    pub in_place: u64,
    /// Those that had to be put together.
    pub assembled: u64,
    /// Handshakes that made new keys.
    pub handshakes: u64,
    /// The peer's address has changed.
    pub moves: u64,
}

/// What is known of a path.
#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
pub struct PathStatus {
    /// The local uplink.
    pub uplink: u8,
    /// The peer's address.
    pub remote: SocketAddr,
    /// It is used.
    pub up: bool,
    /// It is up, but loses too much to be used.
    pub lossy: bool,
    /// Round trip in microseconds, if it was measured.
    pub rtt_us: Option<u64>,
    /// Parts of one that are lost.
    pub loss: f32,
    /// A datagram's bytes at most.
    pub datagram: usize,
    /// Data datagrams sent.
    pub sent: u64,
    /// Data datagrams received.
    pub received: u64,
}

/// What is known of a peer.
#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
pub struct PeerStatus {
    /// There are keys.
    pub connected: bool,
    /// How datagrams are sealed.
    pub cipher: Option<Cipher>,
    /// The age of the keys, in seconds.
    pub key_age: Option<u64>,
    /// Whether large frames go as they are.
    pub mode: Mode,
    /// What was carried.
    pub stats: Stats,
    /// The ways to it.
    pub paths: Vec<PathStatus>,
}

/// A node's tunnels.
pub struct Tunnels {
    identity: noise::Identity,
    public: PublicKey,
    epoch: Duration,
    stamp: u64,
    uplinks: Vec<usize>,
    gate: cookie::Gate,
    table: session::Table,
    peers: Vec<Option<Box<peer::Peer>>>,
    keys: HashMap<PublicKey, PeerId>,
    assembler: assemble::Assembler,
    drops: Drops,
    probe: u64,
    /// Where [`Tunnels::tick`] was when there was no room any more.
    resume: usize,
    /// When it is to come again.
    due: Time,
}

impl Tunnels {
    /// Without peers.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let public = noise::public(&config.private);
        Self {
            identity: noise::Identity {
                private: config.private,
                costs: config.costs,
            },
            public,
            epoch: config.epoch,
            stamp: 0,
            uplinks: config.uplinks,
            gate: cookie::Gate::new(&public),
            table: session::Table::default(),
            peers: Vec::new(),
            keys: HashMap::new(),
            assembler: assemble::Assembler::default(),
            drops: Drops::default(),
            probe: 0,
            resume: 0,
            due: Time::ZERO,
        }
    }

    /// Who this node is.
    #[must_use]
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// Adds a peer. [`Tunnels::tick`] connects.
    ///
    /// # Errors
    ///
    /// There is one with that key, or there are too many.
    pub fn add(&mut self, now: Time, config: &PeerConfig) -> Result<PeerId, Error> {
        if config.public == self.public {
            return Err(Error::Own);
        }
        if self.keys.contains_key(&config.public) {
            return Err(Error::Twice);
        }
        if self.keys.len() >= MAX_PEERS {
            return Err(Error::TooMany);
        }
        let id = PeerId(u32::try_from(self.peers.len()).map_err(|_| Error::TooMany)?);
        let peer = peer::Peer::new(config, &self.uplinks, now);
        self.peers.push(Some(Box::new(peer)));
        self.keys.insert(config.public, id);
        self.due = now;
        Ok(id)
    }

    /// Removes a peer and forgets its keys. What is not finished in a
    /// [`TrainBuffer`] is lost. False: there is none.
    pub fn remove(&mut self, peer: PeerId) -> bool {
        let slot = self.peers.get_mut(peer.0 as usize);
        let Some(gone) = slot.and_then(Option::take) else {
            return false;
        };
        let handshake = gone.handshake.as_ref().map(|handshake| handshake.id);
        for id in gone.sessions.iter().copied().chain(handshake) {
            self.table.remove(id);
        }
        self.keys.remove(&gone.public);
        self.assembler.forget(peer);
        true
    }

    /// Changes where a peer may be. What is known of paths that stay, stays;
    /// those that were learned are kept. What is not finished in a
    /// [`TrainBuffer`] still goes the old way. False: there is no such peer.
    pub fn set_paths(&mut self, now: Time, peer: PeerId, paths: &[PathConfig]) -> bool {
        let slot = self.peers.get_mut(peer.0 as usize);
        let Some(peer) = slot.and_then(Option::as_deref_mut) else {
            return false;
        };
        peer.set_paths(now, paths, &self.uplinks);
        self.due = now;
        true
    }

    /// The peer with that key.
    #[must_use]
    pub fn find(&self, public: &PublicKey) -> Option<PeerId> {
        self.keys.get(public).copied()
    }

    fn peer(&self, peer: PeerId) -> Option<&peer::Peer> {
        self.peers.get(peer.0 as usize)?.as_deref()
    }

    /// Whether large frames to a peer should go as they are.
    #[must_use]
    pub fn mode(&self, peer: PeerId) -> Mode {
        self.peer(peer).map_or(Mode::Whole, |peer| peer.mode)
    }

    /// Bytes of a frame to a peer that goes in one datagram.
    #[must_use]
    pub fn max_frame(&self, peer: PeerId) -> usize {
        self.peer(peer)
            .map_or(wire::MIN_DATAGRAM - wire::OVERHEAD, peer::Peer::max_frame)
    }

    /// What was dropped.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// What is known of a peer.
    #[must_use]
    pub fn status(&mut self, now: Time, peer: PeerId) -> Option<PeerStatus> {
        let peer = self.peers.get(peer.0 as usize)?.as_deref()?;
        let session = peer.current.and_then(|id| self.table.get(id));
        let session = session.filter(|session| session.usable(now));
        let paths = peer.paths.iter().map(|path| PathStatus {
            uplink: path.uplink,
            remote: path.remote,
            up: path.up,
            lossy: path.shunned,
            rtt_us: path.rtt.map(|rtt| rtt.as_micros() as u64),
            loss: path.loss,
            datagram: path.size,
            sent: path.sent,
            received: path.received,
        });
        Some(PeerStatus {
            connected: session.is_some(),
            cipher: session.as_ref().map(|session| session.keys.cipher),
            key_age: session.map(|session| now.saturating_sub(session.born).as_secs()),
            mode: peer.mode,
            stats: peer.stats,
            paths: paths.collect(),
        })
    }
}
