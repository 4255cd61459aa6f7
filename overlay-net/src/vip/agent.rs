//! What the node of a server does with packets to a service.

use std::hash::RandomState;
use std::net::IpAddr;
use std::time::Duration;

use crate::frame::key::protocol;
use crate::frame::{Key, Mac};

use super::{Choice, local_hash};

/// What is to be done with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The server gets it.
    Deliver,
    /// It is of a connection that another server has: make it one to it (see
    /// [`super::rewrite`]) and send it on.
    SendOn(Mac),
}

/// Connections in a bucket: one is looked for in all of these.
const WAYS: usize = 8;

#[derive(Clone, Copy, Default)]
struct Flow {
    /// What it is, hashed with a secret; 0: none.
    tag: u64,
    /// Seconds.
    seen: u32,
}

/// The connections of the servers on this node that began here, as far as they
/// were heard of lately. Of a fixed size: when it is full, the oldest one of a
/// few makes room, which matters only while its service drains.
pub struct Agent {
    state: RandomState,
    buckets: Vec<[Flow; WAYS]>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Agent({})", self.buckets.len() * WAYS)
    }
}

impl Agent {
    /// For about `connections`, of 16 bytes each.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        let buckets = (connections / WAYS).clamp(1, 1 << 24).next_power_of_two();
        Self {
            state: RandomState::new(),
            buckets: vec![[Flow::default(); WAYS]; buckets],
        }
    }

    /// A packet to a service arrives at the node of server `mac`, to which it
    /// is addressed; `choice` is what a mux would choose for it now.
    pub fn receive(&mut self, now: Duration, key: &Key, mac: Mac, choice: Choice) -> Verdict {
        // It was sent on to the one that had the connection, or comes from a
        // node that does not know of a change yet.
        if choice.backend != mac {
            return Verdict::Deliver;
        }
        let known = self.touch(now, key, mac, choice);
        match choice.before {
            Some(before) if !known && before != mac => Verdict::SendOn(before),
            _ => Verdict::Deliver,
        }
    }

    /// Whether the connection is one of this server's: others may be on the
    /// same node. One that begins is from
    /// now on; where nothing drains, any is.
    fn touch(&mut self, now: Duration, key: &Key, mac: Mac, choice: Choice) -> bool {
        type Flow5 = (Option<(IpAddr, IpAddr)>, Option<(u16, u16)>, u8);
        let flow: Flow5 = (key.ip, key.ports, key.protocol);
        let hash = local_hash(&self.state, (key.vni, mac.0, flow));
        let at = hash as usize & (self.buckets.len() - 1);
        let bucket = &mut self.buckets[at];
        let (tag, seen) = (hash | 1, now.as_secs() as u32);
        if let Some(flow) = bucket.iter_mut().find(|flow| flow.tag == tag) {
            flow.seen = seen;
            return true;
        }
        if choice.before.is_some() && !begins(key) {
            return false;
        }
        let oldest = |flow: &&mut self::Flow| (flow.tag != 0, flow.seen);
        if let Some(flow) = bucket.iter_mut().min_by_key(oldest) {
            *flow = Flow { tag, seen };
        }
        true
    }
}

/// Whether it is the first packet of a connection. Of protocols that do not
/// say, each packet may be.
fn begins(key: &Key) -> bool {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    key.protocol != protocol::TCP || key.tcp_flags & (SYN | ACK) == SYN
}
