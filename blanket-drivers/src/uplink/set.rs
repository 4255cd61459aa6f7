//! Several uplinks as one: flows are spread over those that work.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::netlink::Netlink;
use super::xdp::{epoll, watch};
use super::{Cache, Description, Error, Kind, RxBuffer, Spec, TxPacket, Uplink, interfaces};

/// How often interfaces are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long nothing comes in, while others do receive, until an uplink that
/// sends is taken for dead.
const SILENCE: Duration = Duration::from_secs(1);
/// How long a silent or failed uplink is left alone before it is tried again.
const REST: Duration = Duration::from_secs(5);

/// How an uplink is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It is used.
    Good,
    /// Its interface is switched off or gone.
    Down,
    /// There is nothing at the other end of the cable.
    NoCarrier,
    /// It sends, and nothing comes back, while others receive.
    Silent,
    /// It did not work; the text says how.
    Failed(String),
}

/// An uplink of a set.
struct Member {
    uplink: Box<dyn Uplink>,
    index: u32,
    health: Health,
    /// When a silent or failed one is tried again.
    retry: Option<Instant>,
    /// Datagrams out and in when it was last heard, and when that was.
    heard: (u64, u64),
    heard_at: Instant,
}

/// The uplinks of a machine with several interfaces. A flow stays on one of
/// them as long as that one works.
pub struct Uplinks {
    members: Vec<Member>,
    refused: Vec<(Kind, Spec, Error)>,
    netlink: Netlink,
    poll: OwnedFd,
    looked: Instant,
    /// The member that is asked first for what has come.
    first: usize,
}

impl Uplinks {
    /// Opens an uplink at `port` of every interface that is up and has an
    /// address, of the kind that the self-test chose or the user wants. What
    /// has not been measured is measured now: two seconds each.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn start(cache: &Cache, port: u16) -> Result<Self, Error> {
        let mut specs = Vec::new();
        for interface in interfaces()? {
            let Some(address) = interface.addresses.first().copied() else {
                continue;
            };
            let kind = cache.record(&interface.name, address, false);
            // One that is dead is named by `open`.
            let kind = kind.map_or(Kind::Udp, |(record, _)| record.kind());
            specs.push((kind, Spec::new(&interface.name, (address, port).into())));
        }
        Self::open(&specs)
    }

    /// Opens those that can be; the others are in [`Self::refused`]. Where a
    /// raw one is refused but the interface works, a UDP socket takes its
    /// place.
    ///
    /// # Errors
    /// None of them can.
    pub fn open(specs: &[(Kind, Spec)]) -> Result<Self, Error> {
        let mut uplinks = Vec::new();
        let mut refused = Vec::new();
        for (kind, spec) in specs {
            let kinds = [*kind, Kind::Udp];
            // A UDP socket has no substitute.
            let kinds = if *kind == Kind::Udp {
                &kinds[1..]
            } else {
                &kinds
            };
            for kind in kinds {
                match super::open(*kind, spec) {
                    Ok(uplink) => {
                        uplinks.push(uplink);
                        break;
                    }
                    Err(error) => {
                        let substitute = is_of_kind(&error);
                        refused.push((*kind, spec.clone(), error));
                        if !substitute {
                            break;
                        }
                    }
                }
            }
        }
        if uplinks.is_empty() {
            let reasons = refused.iter().map(|(_, _, error)| error.to_string());
            let reasons: Vec<_> = reasons.collect();
            let reasons = reasons.join("; ");
            return Err(Error::None(if reasons.is_empty() {
                "none is configured".to_owned()
            } else {
                reasons
            }));
        }
        Self::new(uplinks, refused)
    }

    fn new(
        uplinks: Vec<Box<dyn Uplink>>,
        refused: Vec<(Kind, Spec, Error)>,
    ) -> Result<Self, Error> {
        let interfaces = interfaces()?;
        let now = Instant::now();
        let watched = || {
            let poll = epoll()?;
            for uplink in &uplinks {
                watch(&poll, uplink.fd())?;
            }
            Ok(poll)
        };
        let poll = watched().map_err(|source| Error::Netlink {
            what: "descriptors",
            source,
        })?;
        let members = uplinks.into_iter().map(|uplink| {
            let name = &uplink.description().interface;
            let index = interfaces.iter().find(|it| it.name == *name);
            Member {
                index: index.map_or(0, |it| it.index),
                uplink,
                health: Health::Good,
                retry: None,
                heard: (0, 0),
                heard_at: now,
            }
        });
        Ok(Self {
            members: members.collect(),
            refused,
            netlink: Netlink::open()?,
            poll,
            looked: now,
            first: 0,
        })
    }

    /// What could not be opened, and why.
    #[must_use]
    pub fn refused(&self) -> &[(Kind, Spec, Error)] {
        &self.refused
    }

    /// The uplinks, and how they are.
    pub fn members(&self) -> impl Iterator<Item = (&dyn Uplink, &Health)> {
        self.members
            .iter()
            .map(|member| (&*member.uplink, &member.health))
    }

    /// Becomes readable when something has come on any of them.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }

    /// The payload in bytes that every one of them carries.
    #[must_use]
    pub fn payload(&self) -> usize {
        let payloads = self.members.iter();
        let payloads = payloads.map(|it| it.uplink.description().capabilities.payload);
        payloads.min().unwrap_or(0)
    }

    /// Receives from all of them, as [`Uplink::rx`] does from one. Each call
    /// starts with another one, so that none is starved.
    pub fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> usize {
        let count = self.members.len();
        let mut kept = 0;
        for step in 0..count {
            let Some(room) = buffers.get_mut(kept..).filter(|room| !room.is_empty()) else {
                break;
            };
            let member = &mut self.members[(self.first + step) % count];
            match member.uplink.rx(room) {
                Ok(got) => kept += got,
                Err(error) => member.fail(&error),
            }
        }
        self.first = (self.first + 1) % count;
        kept
    }

    /// Sends packets of one flow; `flow` is any hash of what must stay in
    /// order. Returns how many are done with, as [`Uplink::tx`] does: 0 also
    /// where no uplink works.
    pub fn tx(&mut self, flow: u64, packets: &[TxPacket<'_>]) -> usize {
        while let Some(index) = self.choose(flow) {
            let member = &mut self.members[index];
            match member.uplink.tx(packets) {
                Ok(done) => return done,
                Err(error) => member.fail(&error),
            }
        }
        0
    }

    /// The uplink of a flow: the highest of a hash of both (rendezvous
    /// hashing), so that those of the others stay where they are when one
    /// fails.
    fn choose(&self, flow: u64) -> Option<usize> {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let good = self.members.iter().enumerate();
        good.filter(|(_, member)| member.health == Health::Good)
            .max_by_key(|(_, member)| hasher.hash_one((flow, member.index)))
            .map(|(index, _)| index)
    }

    /// Looks after the uplinks: call it now and then, some times a second.
    /// Returns those whose health has changed.
    pub fn check(&mut self) -> Vec<(Description, Health)> {
        let now = Instant::now();
        if now.duration_since(self.looked) < LOOK {
            return Vec::new();
        }
        self.looked = now;
        let before: Vec<_> = self.members.iter().map(|it| it.health.clone()).collect();
        let mut received = false;
        for member in &mut self.members {
            received |= member.listen(now);
        }
        for member in &mut self.members {
            let state = self.netlink.state(member.index);
            member.judge(now, state.ok(), received);
        }
        let changed = self.members.iter().zip(before);
        changed
            .filter(|(member, before)| member.health != *before)
            .map(|(member, _)| (member.uplink.description().clone(), member.health.clone()))
            .collect()
    }
}

/// Whether an error is about the kind of uplink, not about the interface.
fn is_of_kind(error: &Error) -> bool {
    matches!(
        error,
        Error::Missing { .. } | Error::Denied { .. } | Error::Busy { .. } | Error::NotEthernet(_)
    )
}

impl Member {
    fn fail(&mut self, error: &io::Error) {
        self.health = Health::Failed(error.to_string());
        self.retry = Some(Instant::now() + REST);
    }

    /// Notes whether something has come in, or nothing was sent that could
    /// have been answered.
    fn listen(&mut self, now: Instant) -> bool {
        let counters = self.uplink.counters();
        let (tx, rx) = (counters.tx.datagrams, counters.rx.datagrams);
        let received = rx != self.heard.1;
        if received || tx == self.heard.0 {
            self.heard = (tx, rx);
            self.heard_at = now;
        }
        received
    }

    /// Decides how it is. `state`: up and carrier; `others`: whether any
    /// uplink has received lately.
    fn judge(&mut self, now: Instant, state: Option<(bool, bool)>, others: bool) {
        let (up, carrier) = state.unwrap_or((false, false));
        let health = if !up {
            Health::Down
        } else if !carrier {
            Health::NoCarrier
        } else if self.retry.is_some_and(|retry| now < retry) {
            return;
        } else if others && now.duration_since(self.heard_at) >= SILENCE {
            self.retry = Some(now + REST);
            // It has a second again when it is tried.
            self.heard_at = now + REST;
            Health::Silent
        } else {
            self.retry = None;
            Health::Good
        };
        self.health = health;
    }
}
