//! Another node: its sessions, the ways to it, and which of them frames take.

use std::net::SocketAddr;
use std::time::Duration;

use super::cookie::To;
use super::noise::Started;
use super::path::Path;
use super::session::Table;
use super::wire::{MAX_FRAME, MIN_DATAGRAM, OVERHEAD};
use super::{Mode, PathConfig, PeerConfig, PublicKey, Stats, Time};

/// Sessions of a peer at once: the current one, those before it that datagrams
/// may still come in, and one that the peer has not confirmed yet.
const SESSIONS: usize = 4;
/// Paths to a peer at most.
pub(super) const MAX_PATHS: usize = 16;
/// Paths that were learned from where datagrams came.
const LEARNED: usize = 4;
/// A path that loses more is not used, if others are left.
const LOSSY: f32 = 0.01;
/// It is used again when it loses less.
const CLEAN: f32 = 0.002;
/// Frames are cut up before the tunnel when more is lost: of frames of 46
/// chunks, 13 % would be.
const PER_PACKET: f32 = 0.003;
/// And no more when less is.
const WHOLE: f32 = 0.000_7;
/// Flows are told apart this far.
const BUCKETS: usize = 64;

/// A handshake that waits for its response.
pub(super) struct Handshake {
    pub(super) id: u32,
    pub(super) started: Started,
    pub(super) at: Time,
}

pub(super) struct Peer {
    pub(super) public: PublicKey,
    pub(super) psk: [u8; 32],
    pub(super) to: To,
    pub(super) paths: Vec<Path>,
    /// The session that is sent in.
    pub(super) current: Option<u32>,
    /// All, the oldest first.
    pub(super) sessions: Vec<u32>,
    pub(super) handshake: Option<Handshake>,
    pub(super) next_try: Time,
    pub(super) tries: u32,
    /// The stamp of the last initiation that was answered.
    pub(super) stamp: u64,
    pub(super) answered: Option<Time>,
    pub(super) mode: Mode,
    pub(super) stats: Stats,
    /// For each bucket of flows its path.
    spray: [u8; BUCKETS],
    shunned: u16,
}

impl Peer {
    pub(super) fn new(config: &PeerConfig, uplinks: &[usize], now: Time) -> Self {
        let mut peer = Self {
            public: config.public,
            psk: config.psk.unwrap_or_default(),
            to: To::new(&config.public),
            paths: Vec::new(),
            current: None,
            sessions: Vec::with_capacity(SESSIONS + 1),
            handshake: None,
            next_try: now,
            tries: 0,
            stamp: 0,
            answered: None,
            mode: Mode::Whole,
            stats: Stats::default(),
            spray: [0; BUCKETS],
            shunned: 0,
        };
        peer.set_paths(now, &config.paths, uplinks);
        peer
    }

    pub(super) fn set_paths(&mut self, now: Time, paths: &[PathConfig], uplinks: &[usize]) {
        let mut before = std::mem::take(&mut self.paths);
        for config in paths.iter().take(MAX_PATHS - LEARNED) {
            let is = |path: &Path| {
                let remote = path.home.unwrap_or(path.remote);
                (path.uplink, remote) == (config.uplink, config.remote)
            };
            let mut path = match before.iter().position(is) {
                Some(at) => before.swap_remove(at),
                None => {
                    let greatest = greatest(uplinks, config.uplink);
                    Path::new(config.uplink, config.remote, config.weight, greatest)
                }
            };
            (path.home, path.weight) = (Some(config.remote), config.weight);
            path.hurry(now);
            self.paths.push(path);
        }
        let learned = before.into_iter().filter(|path| path.home.is_none());
        self.paths.extend(learned);
        self.renumbered();
    }

    /// Paths have other places now.
    fn renumbered(&mut self) {
        self.shunned = 0;
        for path in &mut self.paths {
            path.shunned = false;
        }
        self.judge();
    }

    /// Which path a flow takes.
    pub(super) fn route(&self, flow: u32) -> u8 {
        self.spray[flow as usize % BUCKETS]
    }

    /// A datagram's data at most, whichever path it takes.
    pub(super) fn size(&self) -> usize {
        let used = self.paths.iter().filter(|path| path.up);
        used.map(|path| path.size).min().unwrap_or(MIN_DATAGRAM)
    }

    pub(super) fn path(&self, uplink: u8, remote: SocketAddr) -> Option<usize> {
        let mut paths = self.paths.iter();
        paths.position(|path| path.uplink == uplink && path.remote == remote)
    }

    /// A genuine datagram, newer than all before it, has come from where no
    /// path leads: the peer has moved, or what is between has given it another
    /// address. Which path it is now.
    pub(super) fn learn(
        &mut self,
        now: Time,
        uplink: u8,
        remote: SocketAddr,
        uplinks: &[usize],
    ) -> usize {
        let only = self.paths.len() == 1;
        let same_ip = |path: &Path| path.remote.ip() == remote.ip();
        let moved = (0..self.paths.len())
            .filter(|at| self.paths[*at].uplink == uplink)
            .filter(|at| self.paths[*at].may_move(now, remote, only))
            .max_by_key(|at| same_ip(&self.paths[*at]));
        if let Some(at) = moved {
            self.paths[at].roam(now, remote);
            self.respray();
            return at;
        }
        let mut path = Path::new(uplink, remote, 1, greatest(uplinks, uplink));
        (path.up, path.last_received) = (true, now);
        path.hurry(now);
        let learned = || (0..self.paths.len()).filter(|at| self.paths[*at].home.is_none());
        let oldest = learned().min_by_key(|at| self.paths[*at].last_received);
        let at = match oldest.filter(|_| learned().count() >= LEARNED) {
            Some(at) => {
                self.paths[at] = path;
                at
            }
            None => {
                self.paths.push(path);
                self.paths.len() - 1
            }
        };
        self.respray();
        at
    }

    /// Forgets paths that were learned and that nobody is on any more.
    pub(super) fn forget_paths(&mut self, now: Time) {
        let before = self.paths.len();
        self.paths.retain(|path| !path.is_forgotten(now));
        if self.paths.len() != before {
            self.renumbered();
        }
    }

    /// There is a session more.
    pub(super) fn add_session(&mut self, id: u32, table: &mut Table) {
        self.sessions.push(id);
        if self.sessions.len() > SESSIONS {
            let mut sessions = self.sessions.iter();
            let oldest = sessions.position(|id| Some(*id) != self.current);
            table.remove(self.sessions.remove(oldest.unwrap_or(0)));
        }
    }

    /// What is sent, is sent in this session from now on.
    pub(super) fn switch(&mut self, now: Time, id: u32) {
        let first = self.current.is_none();
        self.current = Some(id);
        self.tries = 0;
        if first || self.paths.iter().all(|path| !path.up) {
            for path in &mut self.paths {
                path.fresh(now);
            }
        }
    }

    /// A path has come up, gone down or lost something: which ones are used,
    /// and in what mode.
    pub(super) fn judge(&mut self) {
        let up: Vec<usize> = (0..self.paths.len())
            .filter(|at| self.paths[*at].up)
            .collect();
        let weight = |at: &usize| u32::from(self.paths[*at].weight);
        let all: u32 = up.iter().map(weight).sum();
        let mut left = all;
        let mut worst = up.clone();
        worst.sort_by(|one, two| self.paths[*two].loss.total_cmp(&self.paths[*one].loss));
        let before = std::mem::take(&mut self.shunned);
        for at in worst {
            let limit = if before & 1 << at == 0 { LOSSY } else { CLEAN };
            let less = left - weight(&at);
            // Half of what there is must be left, whatever it loses.
            if self.paths[at].loss > limit && less > 0 && less * 2 >= all {
                self.shunned |= 1 << at;
                left = less;
            }
        }
        for (at, path) in self.paths.iter_mut().enumerate() {
            path.shunned = self.shunned & 1 << at != 0;
        }
        self.respray();
        let used = self.paths.iter().filter(|path| path.up && !path.shunned);
        let loss = used.map(|path| path.loss).fold(0.0, f32::max);
        if loss > PER_PACKET {
            self.mode = Mode::PerPacket;
        } else if loss < WHOLE {
            self.mode = Mode::Whole;
        }
    }

    /// Weighted rendezvous hashing: a path that goes takes no other's flows
    /// along.
    fn respray(&mut self) {
        let usable = |path: &Path| path.up && !path.shunned;
        let fallback = self.paths.iter().enumerate();
        let fallback = fallback.max_by_key(|(_, path)| (path.up, path.last_received));
        let fallback = fallback.map_or(0, |(at, _)| at as u8);
        for (bucket, route) in self.spray.iter_mut().enumerate() {
            let mut best = (fallback, 0.0);
            for (at, path) in self
                .paths
                .iter()
                .enumerate()
                .filter(|(_, path)| usable(path))
            {
                let seed = (bucket as u64) << 8 | at as u64;
                let mixed = mix(seed.wrapping_add(1));
                let part = ((mixed >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
                let score = f64::from(path.weight) / -part.ln();
                if score > best.1 {
                    best = (at as u8, score);
                }
            }
            *route = best.0;
        }
    }

    /// Bytes of a frame that goes in a datagram of its own.
    pub(super) fn max_frame(&self) -> usize {
        self.size() - OVERHEAD
    }

    /// How long until a handshake is tried again.
    pub(super) fn backoff(&self) -> Duration {
        let wait = Duration::from_millis(250) * (1 << self.tries.min(5));
        let wait = wait.min(Duration::from_secs(5));
        wait + wait * u32::from(super::random::<1>()[0]) / 1024
    }
}

fn greatest(uplinks: &[usize], uplink: u8) -> usize {
    let known = uplinks.get(usize::from(uplink)).copied();
    known.unwrap_or(MIN_DATAGRAM).min(MAX_FRAME / 2)
}

/// splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
