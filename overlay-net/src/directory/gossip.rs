//! Telling peers, as a state machine: messages in, messages out.
//!
//! What changes here is pushed to all peers at once, in one message each, and
//! again until each has acknowledged it. What got lost all the same is found
//! by comparing hashes, first of all, then of parts, with one peer after the
//! other, and with each when it comes up.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::wire::{self, Message, Wrong};
use super::{BUCKETS, Directory, Merged, NodeId};

/// Times.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often one peer's hashes are asked for.
    pub compare: Duration,
    /// How long an acknowledgement may take; twice as long each time.
    pub resend: Duration,
    /// How often a push is sent, before it is left to comparing.
    pub tries: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            compare: Duration::from_secs(5),
            resend: Duration::from_millis(40),
            tries: 6,
        }
    }
}

/// Pushes to a peer that wait for its acknowledgement, at most.
const UNACKED: usize = 256;
/// Parts that a peer is sent in one [`Gossip::poll`].
const PARTS: u32 = 8;
/// Newer records that one message is answered with.
const CORRECTIONS: usize = 256;

/// A message for a peer.
pub type Outgoing = (NodeId, Arc<[u8]>);

#[derive(Debug)]
struct Push {
    number: u64,
    bytes: Arc<[u8]>,
    again: Duration,
    tries: u32,
}

#[derive(Debug, Default)]
struct Peer {
    unacked: VecDeque<Push>,
    /// Parts that it is to be sent.
    parts: u128,
    /// Keys of which it knows something old.
    corrections: std::collections::BTreeSet<super::Key>,
    /// It is to be asked for its hashes as soon as may be.
    compare: bool,
}

/// Counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Messages sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages that came.
    pub received: u64,
    /// Those of them that were none.
    pub wrong: u64,
    /// Pushes sent again.
    pub resent: u64,
}

/// The conversation with all peers.
#[derive(Debug)]
pub struct Gossip {
    settings: Settings,
    peers: BTreeMap<NodeId, Peer>,
    number: u64,
    /// Whom to compare with next, and when.
    turn: NodeId,
    at: Duration,
    out: Vec<Outgoing>,
    traffic: Traffic,
}

impl Gossip {
    /// Without peers.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            peers: BTreeMap::new(),
            number: 0,
            turn: NodeId(0),
            at: Duration::ZERO,
            out: Vec::new(),
            traffic: Traffic::default(),
        }
    }

    /// A peer can be reached now (again).
    pub fn up(&mut self, peer: NodeId) {
        self.peers.entry(peer).or_default().compare = true;
        self.at = Duration::ZERO;
    }

    /// A peer cannot be reached any more.
    pub fn down(&mut self, peer: NodeId) {
        self.peers.remove(&peer);
    }

    /// Messages that were sent and came.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Pushes that peers have not acknowledged yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.peers.values().map(|peer| peer.unacked.len()).sum()
    }

    /// A message from a peer. Afterwards, [`Gossip::poll`].
    ///
    /// # Errors
    ///
    /// It is no message; it was counted.
    pub fn on_message(
        &mut self,
        now: Duration,
        directory: &mut Directory,
        from: NodeId,
        bytes: &[u8],
    ) -> Result<(), Wrong> {
        self.traffic.received += 1;
        let message = Message::from_bytes(bytes).inspect_err(|_| self.traffic.wrong += 1)?;
        let Some(peer) = self.peers.get_mut(&from) else {
            return Ok(());
        };
        let mut reply = None;
        match message {
            Message::Push(number, records) => {
                for (record, age) in records {
                    peer.merge(now, directory, record, age);
                }
                reply = Some(Message::Ack(number));
            }
            Message::Records(records) => {
                for (record, age) in records {
                    peer.merge(now, directory, record, age);
                }
            }
            Message::Ack(number) => peer.unacked.retain(|push| push.number != number),
            Message::Root(hash) if hash == directory.root() => reply = Some(Message::Same),
            Message::Root(_) => {
                reply = Some(Message::Buckets(Box::new(*directory.hashes())));
            }
            Message::Buckets(theirs) => {
                peer.compare = false;
                let ours = directory.hashes();
                let bits = (0..BUCKETS).filter(|at| ours[*at] != theirs[*at]);
                let bits = bits.fold(0, |bits, at| bits | 1 << at);
                if bits != 0 {
                    peer.parts |= bits;
                    reply = Some(Message::Want(bits));
                }
            }
            Message::Want(bits) => peer.parts |= bits,
            Message::Same => peer.compare = false,
        }
        if let Some(reply) = reply {
            self.send(from, reply.to_bytes().into());
        }
        Ok(())
    }

    fn send(&mut self, to: NodeId, bytes: Arc<[u8]>) {
        self.traffic.sent += 1;
        self.traffic.sent_bytes += bytes.len() as u64;
        self.out.push((to, bytes));
    }

    /// What is to be sent now. To be called after every change and message,
    /// and when [`Gossip::next`] says so.
    pub fn poll(&mut self, now: Duration, directory: &mut Directory) -> Vec<Outgoing> {
        directory.expire(now);
        self.push(now, directory);
        self.resend(now);
        self.compare(now, directory);
        self.tell(now, directory);
        std::mem::take(&mut self.out)
    }

    /// When [`Gossip::poll`] has something to do even if nothing happens.
    #[must_use]
    pub fn next(&self, now: Duration) -> Duration {
        let busy = |peer: &Peer| peer.parts != 0 || !peer.corrections.is_empty();
        if self.peers.values().any(busy) {
            return now;
        }
        let pushes = self.peers.values().flat_map(|peer| &peer.unacked);
        pushes.map(|push| push.again).fold(self.at, Duration::min)
    }

    /// What is new goes to all.
    fn push(&mut self, now: Duration, directory: &mut Directory) {
        let keys = directory.take_fresh();
        let records = keys.iter().filter_map(|key| directory.with_age(now, key));
        let number = &mut self.number;
        let first = *number + 1;
        let messages = wire::pack(records, &mut || {
            *number += 1;
            Message::Push(*number, Vec::new()).to_bytes()
        });
        for (number, bytes) in (first..).zip(messages) {
            let bytes: Arc<[u8]> = bytes.into();
            for (id, peer) in &mut self.peers {
                if peer.unacked.len() >= UNACKED {
                    peer.unacked.pop_front();
                    peer.compare = true;
                }
                peer.unacked.push_back(Push {
                    number,
                    bytes: Arc::clone(&bytes),
                    again: now + self.settings.resend,
                    tries: 1,
                });
                self.traffic.sent += 1;
                self.traffic.sent_bytes += bytes.len() as u64;
                self.out.push((*id, Arc::clone(&bytes)));
            }
        }
    }

    fn resend(&mut self, now: Duration) {
        let settings = self.settings;
        for (id, peer) in &mut self.peers {
            let (out, traffic, compare) = (&mut self.out, &mut self.traffic, &mut peer.compare);
            peer.unacked.retain_mut(|push| {
                if push.again > now {
                    return true;
                }
                if push.tries >= settings.tries {
                    *compare = true;
                    return false;
                }
                push.again = now + settings.resend * (1 << push.tries.min(10));
                push.tries += 1;
                traffic.sent += 1;
                traffic.resent += 1;
                traffic.sent_bytes += push.bytes.len() as u64;
                out.push((*id, Arc::clone(&push.bytes)));
                true
            });
        }
    }

    /// Asks a peer for its hashes: the next in turn, and all that have come up
    /// or did not acknowledge.
    fn compare(&mut self, now: Duration, directory: &Directory) {
        let up: Vec<NodeId> = match now >= self.at {
            true => {
                self.at = now + self.settings.compare;
                let after = (
                    std::ops::Bound::Excluded(self.turn),
                    std::ops::Bound::Unbounded,
                );
                let next = self.peers.range(after).next().or(self.peers.iter().next());
                if let Some((id, _)) = next {
                    self.turn = *id;
                }
                let due = |(id, peer): &(&NodeId, &Peer)| peer.compare || **id == self.turn;
                self.peers.iter().filter(due).map(|(id, _)| *id).collect()
            }
            false => return,
        };
        let root: Arc<[u8]> = Message::Root(directory.root()).to_bytes().into();
        for id in up {
            self.send(id, Arc::clone(&root));
        }
    }

    /// Sends what peers want, a part at a time.
    fn tell(&mut self, now: Duration, directory: &Directory) {
        let header = &mut || Message::Records(Vec::new()).to_bytes();
        let mut messages: Vec<(NodeId, Vec<u8>)> = Vec::new();
        for (id, peer) in &mut self.peers {
            for _ in 0..PARTS {
                let at = peer.parts.trailing_zeros();
                if at >= BUCKETS as u32 {
                    break;
                }
                peer.parts &= !(1 << at);
                let packed = wire::pack(directory.part(now, at as u8), header);
                messages.extend(packed.into_iter().map(|bytes| (*id, bytes)));
            }
            let keys = std::mem::take(&mut peer.corrections);
            let records = keys.iter().filter_map(|key| directory.with_age(now, key));
            let packed = wire::pack(records, header);
            messages.extend(packed.into_iter().map(|bytes| (*id, bytes)));
        }
        for (id, bytes) in messages {
            self.send(id, bytes.into());
        }
    }
}

impl Peer {
    fn merge(
        &mut self,
        now: Duration,
        directory: &mut Directory,
        record: super::Record,
        age: Duration,
    ) {
        let key = record.key;
        let older = directory.merge(now, record, age) == Merged::Older;
        if older && self.corrections.len() < CORRECTIONS {
            self.corrections.insert(key);
        }
    }
}
