//! Security groups: which ports are in which, who else is, and whether a frame
//! may pass.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use super::Switch;
use crate::api::types::GroupStatus;
use crate::directory::{GroupId, GroupList, Key as Record, Value};
use crate::drops::Reason;
use crate::flow::Connections;
use crate::flow::groups::{self, Direction, Group, Groups, Remote, Rule, Verdict};
use crate::frame::{Frame, Key, Layers, PortId, Vni, parse};
use crate::switch::Error;

/// Groups of a node at most.
const MOST_GROUPS: usize = 1024;

/// Rules of a group at most.
const MOST_RULES: usize = 256;

/// How often other nodes' members are looked at again at most.
const SETTLE: Duration = Duration::from_millis(100);

/// How long connections of before are taken over: after a restart, and after a
/// guest has come.
const ADOPTION: Duration = Duration::from_secs(120);

/// The groups of all networks.
#[derive(Default)]
pub(super) struct Security {
    rules: BTreeMap<String, Vec<Rule>>,
    /// What holds in each network that has a port in a group.
    held: HashMap<Vni, Groups>,
    connections: Connections,
    generation: u64,
    /// Until when connections of before are taken over.
    adopts: Duration,
    /// The same of ports whose guests have come.
    came: HashMap<PortId, Duration>,
    /// Other nodes' members have changed.
    stale: bool,
    /// When they were looked at.
    looked: Duration,
}

impl Security {
    /// When [`Switch::renew_groups`] is to be called, if it is.
    pub(super) fn next(&self) -> Option<Duration> {
        self.stale.then(|| self.looked + SETTLE)
    }
}

impl Switch {
    /// Whether a frame may go to, or has come from, a port that is in groups.
    pub(super) fn screen(
        &self,
        id: PortId,
        vni: Vni,
        direction: Direction,
        frame: (&Key, Layers, &[u8]),
    ) -> Result<(), Reason> {
        let security = &self.security;
        // A port that is not known there is closed.
        let none = Groups::default();
        let groups = security.held.get(&vni).unwrap_or(&none);
        match groups.check(self.now, &security.connections, frame, direction, id) {
            Verdict::Pass => Ok(()),
            Verdict::Drop(reason) => Err(reason),
        }
    }

    /// The same of a frame that is on its way to a port.
    pub(super) fn screen_to(&self, id: PortId, vni: Vni, frame: &Frame<'_>) -> Result<(), Reason> {
        let head = frame.head.bytes();
        let (key, layers) = parse(head, frame.len(), id, vni).map_err(|_| Reason::Malformed)?;
        self.screen(id, vni, Direction::In, (&key, layers, head))
    }

    /// A group's rules, if there is one of that name.
    pub(super) fn rules_of(&self, name: &str) -> Option<&[Rule]> {
        self.security.rules.get(name).map(Vec::as_slice)
    }

    /// Makes a group, without rules, or with these.
    ///
    /// # Errors
    ///
    /// There is one of that name, or there are too many groups or rules.
    pub fn add_group(&mut self, name: &str, rules: Vec<Rule>) -> Result<(), Error> {
        let known = &mut self.security.rules;
        if known.contains_key(name) {
            return Err(Error::GroupExists(name.to_owned()));
        }
        if known.len() == MOST_GROUPS {
            return Err(Error::TooMany(MOST_GROUPS, "groups"));
        }
        if rules.len() > MOST_RULES {
            return Err(Error::TooMany(MOST_RULES, "rules"));
        }
        known.insert(name.to_owned(), rules);
        self.renew_groups();
        Ok(())
    }

    /// Removes a group. Ports that are in it are closed: only with `force`.
    ///
    /// # Errors
    ///
    /// There is none, or it has ports.
    pub fn remove_group(&mut self, name: &str, force: bool) -> Result<(), Error> {
        if !self.security.rules.contains_key(name) {
            return Err(Error::NoGroup(name.to_owned()));
        }
        let ports = self.ports_in(name).count();
        if ports > 0 && !force {
            return Err(Error::GroupInUse(name.to_owned(), ports));
        }
        self.security.rules.remove(name);
        self.renew_groups();
        Ok(())
    }

    /// Adds a rule to a group; nothing if it has it.
    ///
    /// # Errors
    ///
    /// There is no such group, or it has too many rules.
    pub fn add_rule(&mut self, group: &str, rule: Rule) -> Result<(), Error> {
        let rules = self.security.rules.get_mut(group);
        let rules = rules.ok_or_else(|| Error::NoGroup(group.to_owned()))?;
        if !rules.contains(&rule) {
            if rules.len() == MOST_RULES {
                return Err(Error::TooMany(MOST_RULES, "rules"));
            }
            rules.push(rule);
            self.renew_groups();
        }
        Ok(())
    }

    /// Removes a rule from a group.
    ///
    /// # Errors
    ///
    /// There is no such group, or it has no such rule.
    pub fn remove_rule(&mut self, group: &str, rule: &Rule) -> Result<(), Error> {
        let rules = self.security.rules.get_mut(group);
        let rules = rules.ok_or_else(|| Error::NoGroup(group.to_owned()))?;
        let at = rules.iter().position(|one| one == rule);
        rules.remove(at.ok_or_else(|| Error::NoRule(group.to_owned()))?);
        self.renew_groups();
        Ok(())
    }

    fn ports_in<'s>(&'s self, group: &'s str) -> impl Iterator<Item = &'s str> {
        let ports = self.all().map(|(_, slot)| slot);
        ports
            .filter(move |slot| slot.spec.groups.iter().any(|name| name == group))
            .map(|slot| slot.name.as_str())
    }

    /// All groups, by name; those that ports are in and nobody knows, too.
    #[must_use]
    pub fn groups(&self) -> Vec<GroupStatus> {
        let used = self.all().flat_map(|(_, slot)| &slot.spec.groups);
        let names: BTreeSet<&String> = self.security.rules.keys().chain(used).collect();
        let status = |name: &String| GroupStatus {
            name: name.clone(),
            rules: self.security.rules.get(name).cloned(),
            ports: self.ports_in(name).map(str::to_owned).collect(),
        };
        names.into_iter().map(status).collect()
    }

    /// Puts a port into groups, and out of all others; without any, all passes.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn set_port_groups(&mut self, port: &str, groups: Vec<String>) -> Result<(), Error> {
        let missing = || Error::NoPort(port.to_owned());
        let id = *self.names.get(port).ok_or_else(missing)?;
        if groups.is_empty() {
            groups::forget(&self.security.connections, id);
            self.security.came.remove(&id);
        }
        self.slot_mut(id).ok_or_else(missing)?.spec.groups = groups;
        self.renew_groups();
        for (key, value) in self.attached(id) {
            self.claim(key, value);
        }
        Ok(())
    }

    /// The groups of a port, as other nodes are told.
    pub(super) fn told_groups(&self, id: PortId) -> GroupList {
        let groups = self.slot(id).map(|slot| &slot.spec.groups[..]);
        groups
            .unwrap_or_default()
            .iter()
            .map(|name| GroupId::of(name))
            .collect()
    }

    /// A port has gone, and its connections.
    pub(super) fn forget_connections(&mut self, id: PortId) {
        groups::forget(&self.security.connections, id);
        self.renew_groups();
    }

    /// A guest has come to a port, with connections that nothing is known of
    /// here: for two minutes, it is as after a restart.
    pub(super) fn adopt_connections_of(&mut self, id: PortId) {
        let now = self.now;
        let came = &mut self.security.came;
        came.retain(|_, until| now < *until);
        came.insert(id, now + ADOPTION);
        self.renew_groups();
    }

    /// The switch was started again: for two minutes, TCP connections that
    /// rules would have let begin are taken for such as have begun.
    pub fn adopt_connections(&mut self) {
        self.security.adopts = self.now + ADOPTION;
        self.renew_groups();
    }

    /// The directory knows something else of a station.
    pub(super) fn regrouped(&mut self, key: &Record) {
        // It may have been in groups, or have had other addresses.
        if matches!(key, Record::Station(vni, ..) if self.security.held.contains_key(vni)) {
            self.security.stale = true;
        }
    }

    /// Looks at other nodes' members again, if they have changed.
    pub(super) fn refresh_groups(&mut self) {
        if self.security.next().is_some_and(|next| next <= self.now) {
            self.renew_groups();
        }
    }

    /// Has all groups as they are now hold.
    pub(super) fn renew_groups(&mut self) {
        let security = &self.security;
        let generation = security.generation + 1;
        let mut held: HashMap<Vni, Groups> = HashMap::new();
        let mut members: HashMap<(Vni, &str), Vec<IpAddr>> = HashMap::new();
        for (id, slot) in self.all() {
            if slot.spec.groups.is_empty() {
                continue;
            }
            let groups = held.entry(slot.vni).or_insert_with(|| Groups {
                generation,
                adopts: security.adopts,
                came: security.came.clone(),
                ..Groups::default()
            });
            groups.ports.insert(id, slot.spec.groups.clone());
            for name in &slot.spec.groups {
                let of = members.entry((slot.vni, name)).or_default();
                of.extend(&slot.spec.bridge.ips);
            }
        }
        let rules = security.rules.values().flatten();
        let named: HashMap<GroupId, &str> = rules
            .filter_map(|rule| match &rule.remote {
                Remote::Group(name) => Some((GroupId::of(name), name.as_str())),
                _ => None,
            })
            .collect();
        if !named.is_empty() && !held.is_empty() {
            for record in self.directory.iter() {
                let (Record::Station(vni, ..), Some(Value::Station { ips, groups, .. })) =
                    (&record.key, &record.value)
                else {
                    continue;
                };
                if record.version.node == self.directory.me() {
                    continue;
                }
                for name in groups.iter().filter_map(|id| named.get(id)) {
                    members.entry((*vni, name)).or_default().extend(ips);
                }
            }
        }
        for (vni, groups) in &mut held {
            let group = |rules: &Vec<Rule>| Group {
                rules: rules.clone(),
            };
            let rules = security.rules.iter();
            groups.groups = rules
                .map(|(name, rules)| (name.clone(), group(rules)))
                .collect();
            let mine = members.iter().filter(|((of, _), _)| of == vni);
            groups.members = mine
                .map(|((_, name), ips)| ((*name).to_owned(), ips.iter().copied().collect()))
                .collect();
        }
        let now = self.now;
        let security = &mut self.security;
        security.held = held;
        security.generation = generation;
        security.stale = false;
        security.looked = now;
    }
}
