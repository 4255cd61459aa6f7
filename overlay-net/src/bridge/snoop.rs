//! Who listens to which multicast group.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::frame::Vni;

use super::igmp::Word;
use super::table::Place;
use super::vlan::Vlan;

/// How long a report counts, if it is not renewed (RFC 3376, 8.4).
const MEMBER: Duration = Duration::from_secs(260);
/// How long a querier counts as being there (RFC 3376, 8.5).
const QUERIER: Duration = Duration::from_secs(255);
/// How long those who still listen have to say so after somebody left.
const LEAVING: Duration = Duration::from_secs(2);
/// Reports that are remembered, from each place and altogether.
const PER_PLACE: usize = 512;
const ALL: usize = 65_536;

/// A network and a VLAN: where frames to all go.
pub(super) type Domain = (Vni, Vlan);

#[derive(Debug, Default)]
pub(super) struct Snoop {
    groups: HashMap<(Domain, IpAddr), Vec<(Place, Duration)>, RandomState>,
    queriers: HashMap<Domain, Vec<(Place, Duration)>, RandomState>,
    counts: HashMap<Place, usize, RandomState>,
    all: usize,
}

/// Groups that all have to hear, whoever reported: those of one link.
pub(super) fn is_local(group: IpAddr) -> bool {
    match group {
        IpAddr::V4(group) => matches!(group.octets(), [224, 0, 0, _]),
        // Interface and link scope: neighbour discovery among them.
        IpAddr::V6(group) => group.octets()[1] & 0xf <= 2,
    }
}

impl Snoop {
    /// Somebody at `place` said `word`.
    pub(super) fn heard(
        &mut self,
        now: Duration,
        domain: Domain,
        place: Place,
        word: Word,
        fast_leave: bool,
    ) {
        match word {
            Word::Query => {
                let list = self.queriers.entry(domain).or_default();
                put(list, place, now + QUERIER);
            }
            Word::Join(group) if !is_local(group) => self.join(now, (domain, group), place),
            Word::Leave(group) => {
                let Some(list) = self.groups.get_mut(&(domain, group)) else {
                    return;
                };
                let until = if fast_leave { now } else { now + LEAVING };
                for (_, end) in list.iter_mut().filter(|(who, _)| *who == place) {
                    *end = until.min(*end);
                }
            }
            Word::Join(_) => {}
        }
    }

    fn join(&mut self, now: Duration, group: (Domain, IpAddr), place: Place) {
        let until = now + MEMBER;
        if let Some(list) = self.groups.get_mut(&group)
            && let Some((_, end)) = list.iter_mut().find(|(who, _)| *who == place)
        {
            *end = until;
            return;
        }
        let count = self.counts.entry(place).or_default();
        if *count >= PER_PLACE || self.all >= ALL {
            return;
        }
        *count += 1;
        self.all += 1;
        self.groups.entry(group).or_default().push((place, until));
    }

    /// Whether frames to groups go only to those who listen: there is a
    /// querier, so those who listen say so again and again.
    pub(super) fn is_ruled(&self, now: Duration, domain: Domain) -> bool {
        let list = self.queriers.get(&domain);
        list.is_some_and(|list| list.iter().any(|(_, end)| *end > now))
    }

    /// Whether there is a querier, behind which routers listen to all.
    pub(super) fn asks(&self, now: Duration, domain: Domain, place: Place) -> bool {
        let list = self.queriers.get(&domain);
        list.is_some_and(|list| has(list, place, now))
    }

    pub(super) fn listens(
        &self,
        now: Duration,
        domain: Domain,
        group: IpAddr,
        place: Place,
    ) -> bool {
        let list = self.groups.get(&(domain, group));
        list.is_some_and(|list| has(list, place, now)) || self.asks(now, domain, place)
    }

    /// Forgets those who are gone, and whom `is_gone` names.
    pub(super) fn expire(&mut self, now: Duration, is_gone: impl Fn(Place) -> bool) {
        let (counts, all) = (&mut self.counts, &mut self.all);
        self.groups.retain(|_, list| {
            list.retain(|(place, end)| {
                let keep = *end > now && !is_gone(*place);
                if !keep {
                    *all -= 1;
                    if let Some(count) = counts.get_mut(place) {
                        *count -= 1;
                    }
                }
                keep
            });
            !list.is_empty()
        });
        counts.retain(|_, count| *count > 0);
        self.queriers.retain(|_, list| {
            list.retain(|(place, end)| *end > now && !is_gone(*place));
            !list.is_empty()
        });
    }

    /// Groups, and who listens.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Domain, IpAddr, &[(Place, Duration)])> + '_ {
        let groups = self.groups.iter();
        groups.map(|((domain, group), list)| (*domain, *group, list.as_slice()))
    }
}

fn put(list: &mut Vec<(Place, Duration)>, place: Place, until: Duration) {
    match list.iter_mut().find(|(who, _)| *who == place) {
        Some((_, end)) => *end = until,
        None => list.push((place, until)),
    }
}

fn has(list: &[(Place, Duration)], place: Place, now: Duration) -> bool {
    list.iter().any(|(who, end)| *who == place && *end > now)
}
