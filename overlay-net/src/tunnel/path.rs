//! One way to a peer: is it there, how good is it, how much does it take.
//!
//! - **Health.** Probes are answered, or are lost. Three in a row that are
//!   lost, and the path is not used any more: within a second, while there is
//!   traffic (probes are 150 ms apart then). It is used again after some in a
//!   row that were answered.
//! - **Loss.** A probe's answer says how many data datagrams have come on the
//!   path up to it; the sender knows how many it had sent.
//! - **Size.** Probes of the size that is looked for: first the greatest that
//!   the uplink takes, then half way between what was answered and what was
//!   not. Every other probe of health is as large as data may be: if only
//!   those are lost, the path takes less than it did.

use std::net::SocketAddr;
use std::time::Duration;

use super::Time;
use super::wire::MIN_DATAGRAM;

/// Between probes of a path that is in use, or should be.
const ACTIVE: Duration = Duration::from_millis(150);
/// Between those of one that is not.
const IDLE: Duration = Duration::from_secs(2);
/// Between those of one that has been dead for long.
const GONE: Duration = Duration::from_secs(1);
/// After how many that were lost in a row.
const LONG: u8 = 60;
/// When a dead path that was learned is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Addresses that alternate faster than this are two paths, not one that moves.
const FLAPS: Duration = Duration::from_secs(5);
/// How long a path that something comes by is not another one.
const ALIVE: Duration = Duration::from_secs(1);
/// How long after the last frame a path is in use.
const IN_USE: Duration = Duration::from_secs(2);
/// Probes lost in a row that end a path's use.
const LOST: u8 = 3;
/// Probes answered in a row that begin it again.
const BACK: u8 = 5;
/// A probe's answer comes within this, unless the path is known to be longer.
const PATIENCE: Duration = Duration::from_millis(400);
/// And while nothing has been measured.
const UNKNOWN: Duration = Duration::from_secs(1);
/// Datagrams that loss is counted over.
const SAMPLE: u64 = 500;
/// Sizes closer than this are the same.
const STEP: usize = 8;
/// Probes of one size that must be lost before it is too large.
const TRIES: u8 = 3;
/// Until larger sizes are looked for again.
const GROW: Duration = Duration::from_secs(600);
const PROBES: usize = 16;

#[derive(Clone, Copy)]
struct Outstanding {
    id: u64,
    at: Time,
    /// Data datagrams sent before it.
    sent: u64,
    size: usize,
    /// It is about the size, not about health.
    search: bool,
}

/// A probe to send: its number and the datagram's size; 0: as small as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ToSend {
    pub(super) id: u64,
    pub(super) size: usize,
}

/// A local uplink and a remote address.
pub(super) struct Path {
    pub(super) uplink: u8,
    pub(super) remote: SocketAddr,
    /// What the configuration says that the remote address is.
    pub(super) home: Option<SocketAddr>,
    /// Where it led before, and until when.
    before: Option<(SocketAddr, Time)>,
    pub(super) weight: u16,
    pub(super) up: bool,
    /// It is up, but loses so much that others are used.
    pub(super) shunned: bool,
    /// Data datagrams sent and received.
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) last_received: Time,
    pub(super) rtt: Option<Duration>,
    /// Parts of one that are lost.
    pub(super) loss: f32,
    /// What a datagram may have.
    pub(super) size: usize,
    greatest: usize,
    too_large: usize,
    tries: u8,
    grow: Time,
    probes: [Option<Outstanding>; PROBES],
    next: Time,
    in_use: Time,
    lost: u8,
    large_lost: u8,
    answered: u8,
    turn: u64,
    /// Sent and received as of the last sample of loss.
    sample: Option<(u64, u64)>,
}

impl Path {
    /// `greatest`: what the uplink takes.
    pub(super) fn new(uplink: u8, remote: SocketAddr, weight: u16, greatest: usize) -> Self {
        Self {
            uplink,
            remote,
            home: None,
            before: None,
            weight,
            up: false,
            shunned: false,
            sent: 0,
            received: 0,
            last_received: Time::ZERO,
            rtt: None,
            loss: 0.0,
            size: MIN_DATAGRAM,
            greatest: greatest.max(MIN_DATAGRAM),
            too_large: greatest.max(MIN_DATAGRAM) + 1,
            tries: 0,
            grow: Time::ZERO,
            probes: [None; PROBES],
            next: Time::ZERO,
            in_use: Time::ZERO,
            lost: 0,
            large_lost: 0,
            answered: 0,
            turn: 0,
            sample: None,
        }
    }

    /// Whether a datagram from `remote` says that this path leads there now,
    /// rather than that there is another one.
    pub(super) fn may_move(&self, now: Time, remote: SocketAddr, only: bool) -> bool {
        let flaps = self
            .before
            .is_some_and(|(before, at)| before == remote && now < at + FLAPS);
        !flaps && (only || now >= self.last_received + ALIVE)
    }

    /// The peer is somewhere else now. What was found out about the way there
    /// is void.
    pub(super) fn roam(&mut self, now: Time, remote: SocketAddr) {
        *self = Self {
            home: self.home,
            before: Some((self.remote, now)),
            up: true,
            last_received: now,
            received: self.received,
            in_use: self.in_use,
            next: now,
            ..Self::new(self.uplink, remote, self.weight, self.greatest)
        };
    }

    /// There are new keys: the peer may have started anew, and counts so.
    pub(super) fn fresh(&mut self, now: Time) {
        self.probes = [None; PROBES];
        (self.lost, self.answered, self.large_lost) = (0, 0, 0);
        (self.sample, self.next) = (None, now);
    }

    /// A frame goes this way. True: there is to be a probe, soon.
    pub(super) fn used(&mut self, now: Time, datagrams: usize) -> bool {
        self.sent += datagrams as u64;
        self.in_use = now + IN_USE;
        let idle = self.next > now + ACTIVE;
        if idle {
            self.next = now;
        }
        idle
    }

    /// Probes at once.
    pub(super) fn hurry(&mut self, now: Time) {
        self.next = self.next.min(now);
    }

    /// When something is to be done.
    pub(super) fn deadline(&self) -> Time {
        let patience = self.patience();
        let probes = self.probes.iter().flatten();
        probes
            .map(|probe| probe.at + patience)
            .fold(self.next, Time::min)
    }

    fn patience(&self) -> Duration {
        let least = Duration::from_millis(100);
        self.rtt
            .map_or(UNKNOWN, |rtt| (rtt * 4).clamp(least, PATIENCE.max(rtt * 2)))
    }

    fn pace(&self, now: Time) -> Duration {
        if !self.up {
            return if self.lost < LONG { ACTIVE } else { GONE };
        }
        if now < self.in_use || self.searching(now) || self.shunned {
            ACTIVE
        } else {
            IDLE
        }
    }

    /// It was learned, and nobody is there any more.
    pub(super) fn is_forgotten(&self, now: Time) -> bool {
        self.home.is_none() && !self.up && now >= self.last_received + FORGOTTEN
    }

    /// Nobody is there, as far as one can tell: probes are not answered, and
    /// nothing else has come for a while. What is sent would be lost.
    pub(super) fn is_dead(&self, now: Time) -> bool {
        !self.up && self.lost >= LOST && now >= self.last_received + ALIVE
    }

    /// Whether sizes are still tried.
    fn searching(&self, now: Time) -> bool {
        self.up && (self.too_large > self.size + STEP || now >= self.grow)
    }

    /// Gives up probes that were not answered, and makes new ones, with the
    /// numbers that `id` gives. True: whether it is used has changed.
    pub(super) fn tick(
        &mut self,
        now: Time,
        id: &mut dyn FnMut() -> u64,
        send: &mut dyn FnMut(ToSend),
    ) -> bool {
        let was_up = self.up;
        let patience = self.patience();
        for at in 0..PROBES {
            if let Some(probe) = self.probes[at].filter(|probe| now >= probe.at + patience) {
                self.probes[at] = None;
                self.not_answered(now, probe);
            }
        }
        if now >= self.next {
            self.next = now + self.pace(now);
            self.turn += 1;
            let large = self.up && self.turn.is_multiple_of(2);
            let size = if large { self.size } else { 0 };
            self.send(now, id, size, false, send);
            let trying = self.probes.iter().flatten().any(|probe| probe.search);
            if self.searching(now) && !trying {
                self.search(now, id, send);
            }
        }
        was_up != self.up
    }

    fn search(&mut self, now: Time, id: &mut dyn FnMut() -> u64, send: &mut dyn FnMut(ToSend)) {
        if self.too_large <= self.size + STEP {
            // It has been a while: perhaps it takes more now.
            (self.too_large, self.tries) = (self.greatest + 1, 0);
            self.grow = now + GROW;
        }
        if self.too_large <= self.size + STEP {
            return;
        }
        let size = if self.too_large == self.greatest + 1 {
            self.greatest
        } else {
            self.size.midpoint(self.too_large)
        };
        self.send(now, id, size, true, send);
    }

    fn send(
        &mut self,
        now: Time,
        id: &mut dyn FnMut() -> u64,
        size: usize,
        search: bool,
        send: &mut dyn FnMut(ToSend),
    ) {
        let Some(slot) = self.probes.iter_mut().find(|slot| slot.is_none()) else {
            return;
        };
        let id = id();
        *slot = Some(Outstanding {
            id,
            at: now,
            sent: self.sent,
            size,
            search,
        });
        send(ToSend { id, size });
    }

    fn not_answered(&mut self, now: Time, probe: Outstanding) {
        if probe.search {
            self.tries += 1;
            if self.tries >= TRIES {
                (self.too_large, self.tries) = (probe.size, 0);
                if self.too_large <= self.size + STEP {
                    self.grow = now + GROW;
                }
            }
            self.next = now;
            return;
        }
        if probe.size > 0 && probe.size == self.size && self.size > MIN_DATAGRAM {
            self.large_lost += 1;
            if self.large_lost >= TRIES && self.lost < LOST {
                // Small ones get through: a black hole for large ones.
                self.too_large = self.size;
                (self.size, self.large_lost, self.tries) = (MIN_DATAGRAM, 0, 0);
                self.next = now;
            }
        }
        self.answered = 0;
        self.probed(1.0);
        self.lost = self.lost.saturating_add(1);
        if self.lost >= LOST {
            self.up = false;
        }
    }

    /// A probe was answered: `received` of the data datagrams before it have
    /// come. True: whether the path is used has changed, or its loss was
    /// measured. `None`: it is no probe of this path.
    pub(super) fn answered(&mut self, now: Time, id: u64, received: u64) -> Option<bool> {
        let mut probes = self.probes.iter_mut();
        let slot = probes.find(|slot| slot.is_some_and(|probe| probe.id == id))?;
        let probe = slot.take()?;
        let rtt = now.saturating_sub(probe.at);
        self.rtt = Some(self.rtt.map_or(rtt, |old| (old * 7 + rtt) / 8));
        if probe.search {
            self.tries = 0;
            if probe.size > self.size && probe.size < self.too_large {
                self.size = probe.size;
            }
            if self.too_large <= self.size + STEP {
                self.grow = now + GROW;
            } else {
                self.next = now;
            }
        } else if probe.size == self.size {
            self.large_lost = 0;
        }
        self.probed(0.0);
        self.lost = 0;
        self.answered = self.answered.saturating_add(1);
        let was_up = self.up;
        // The first answer of a path that was never used is enough.
        self.up |= self.answered >= BACK || self.sample.is_none();
        if self.up && !was_up {
            // What it lost while it was dead says nothing of it now.
            (self.loss, self.sample) = (0.0, None);
        }
        Some(self.measure(probe.sent, received) || was_up != self.up || self.shunned)
    }

    /// Nothing but probes tells what a path loses that carries no data.
    fn probed(&mut self, lost: f32) {
        if self.shunned {
            self.loss += (lost - self.loss) / 32.0;
        }
    }

    fn measure(&mut self, sent: u64, received: u64) -> bool {
        let Some((sent_before, received_before)) = self.sample else {
            self.sample = Some((sent, received));
            return false;
        };
        let (Some(more), Some(came)) = (
            sent.checked_sub(sent_before),
            received.checked_sub(received_before),
        ) else {
            // An answer was overtaken, or the peer counts anew.
            if received < received_before {
                self.sample = Some((sent, received));
            }
            return false;
        };
        let missing = more.saturating_sub(came);
        // A few are enough to tell when many of them are lost.
        if more < SAMPLE && (more < SAMPLE / 10 || missing * 20 < more) {
            return false;
        }
        let lost = missing as f32 / more as f32;
        self.loss += (lost - self.loss) / if lost > self.loss { 2.0 } else { 8.0 };
        self.sample = Some((sent, received));
        true
    }
}
