//! Changing the tables, while workers look into them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::actions::{self, Action, ActionError, LAST_TABLE};
use super::matches::Match;
use super::meter::{BANDS, Meter, MeterSpec};
use super::tables::{Entry, Flow, Stats, Tables};
use crate::frame::PortId;

/// Entries in all tables at most.
pub const MOST_ENTRIES: usize = 1 << 18;

/// Meters at most.
pub const MOST_METERS: usize = 4096;

/// The tables that workers look at now: swapped whole.
#[derive(Debug, Default)]
pub struct Shared {
    current: Mutex<Arc<Tables>>,
    generation: AtomicU64,
}

impl Shared {
    /// The generation of the current tables: workers compare it with theirs,
    /// which takes no lock.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The current tables.
    #[must_use]
    pub fn tables(&self) -> Arc<Tables> {
        let current = self.current.lock();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, tables: Arc<Tables>) {
        let generation = tables.generation();
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = tables;
        self.generation.store(generation, Ordering::Release);
    }
}

/// Why a change is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// There is no such table.
    #[error("there is no table {0}, but 0 to {LAST_TABLE}")]
    Table(u8),
    /// An action that it cannot have.
    #[error(transparent)]
    Action(#[from] ActionError),
    /// A meter that does not exist.
    #[error("there is no meter {0}: add it first")]
    NoMeter(u32),
    /// A meter that exists already.
    #[error("meter {0} is there already: modify it, or delete it first")]
    Meter(u32),
    /// A meter's number, rate or bands make no sense.
    #[error("a meter has a number that is not 0, and 1 to {BANDS} bands of a rate that is not 0")]
    MeterSpec,
    /// There are too many meters.
    #[error("there are {MOST_METERS} meters: delete some first")]
    Meters,
    /// An entry that overlaps is there, which is not wanted.
    #[error("it overlaps an entry of the same priority")]
    Overlap,
    /// There are too many entries.
    #[error("there are {MOST_ENTRIES} entries: delete some first")]
    Full,
}

/// Why an entry went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// No frame for its idle timeout.
    Idle,
    /// Its hard timeout is over.
    Hard,
    /// Deleted.
    Deleted,
    /// Its meter was deleted.
    Meter,
}

/// Which entries are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only in this table.
    pub table: Option<u8>,
    /// Only those within this match; with `strict`, those with exactly it.
    pub matches: Match,
    /// Only those with exactly `matches` and this priority.
    pub strict: Option<u16>,
    /// Only those whose cookies have these bits, of this mask.
    pub cookie: (u64, u64),
    /// Only those that send to this port.
    pub out_port: Option<PortId>,
}

impl Filter {
    /// Whether an entry is meant.
    #[must_use]
    pub fn takes(&self, flow: &Flow) -> bool {
        let (cookie, mask) = self.cookie;
        let same = match self.strict {
            Some(priority) => flow.priority == priority && flow.matches == self.matches,
            None => self.matches.covers(&flow.matches),
        };
        same && self.table.is_none_or(|table| table == flow.table)
            && (flow.cookie ^ cookie) & mask == 0
            && self
                .out_port
                .is_none_or(|port| sends_to(&flow.actions, port))
    }
}

fn sends_to(actions: &[Action], port: PortId) -> bool {
    actions.iter().any(|action| match action {
        Action::Output(to) => *to == port,
        Action::WriteActions(written) => sends_to(written, port),
        _ => false,
    })
}

fn meters_of(actions: &[Action]) -> impl Iterator<Item = u32> + '_ {
    actions.iter().filter_map(|action| match action {
        Action::Meter(id) => Some(*id),
        _ => None,
    })
}

/// The tables' owner: changes them and hands them to the workers.
#[derive(Debug)]
pub struct Control {
    tables: Tables,
    shared: Arc<Shared>,
    next: u64,
    changed: bool,
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

impl Control {
    /// Without entries: all frames are dropped.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tables: Tables::default(),
            shared: Arc::default(),
            next: 0,
            changed: false,
        }
    }

    /// With one entry: what nothing else says otherwise goes through the
    /// learning bridge.
    #[must_use]
    pub fn bridging() -> Self {
        let mut control = Self::new();
        control.put(
            Flow {
                actions: vec![Action::Normal],
                ..Flow::default()
            },
            Duration::ZERO,
            Arc::default(),
        );
        control.publish();
        control
    }

    /// The tables, with changes that workers do not know yet.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What workers take the tables from.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Hands the tables to the workers, if anything has changed.
    pub fn publish(&mut self) {
        if self.changed {
            self.tables.advance();
            self.shared.publish(Arc::new(self.tables.clone()));
            self.changed = false;
        }
    }

    fn put(&mut self, flow: Flow, created: Duration, stats: Arc<Stats>) {
        let entry = Entry {
            flow,
            created,
            stats,
            id: self.next,
            alone: OnceLock::new(),
        };
        self.next += 1;
        self.tables.insert(Arc::new(entry));
        self.changed = true;
    }

    fn check(&self, actions: &[Action], matches: &Match, table: u8) -> Result<(), Refused> {
        if table > LAST_TABLE {
            return Err(Refused::Table(table));
        }
        actions::check(actions, matches, table)?;
        match meters_of(actions).find(|id| !self.tables.meters().contains_key(id)) {
            Some(id) => Err(Refused::NoMeter(id)),
            None => Ok(()),
        }
    }

    /// Adds an entry, in place of one with the same match and priority.
    ///
    /// # Errors
    ///
    /// See [`Refused`]; nothing is changed then.
    pub fn add(&mut self, flow: Flow, now: Duration) -> Result<(), Refused> {
        self.check(&flow.actions, &flow.matches, flow.table)?;
        let table = self.tables.table(flow.table);
        let old = table.and_then(|table| table.exactly(&flow.matches, flow.priority));
        if flow.flags.check_overlap
            && let Some(table) = table
            && table.iter().any(|other| {
                other.flow.priority == flow.priority && other.flow.matches.overlaps(&flow.matches)
            })
        {
            return Err(Refused::Overlap);
        }
        if old.is_none() && self.tables.len() >= MOST_ENTRIES {
            return Err(Refused::Full);
        }
        let mut stats = Arc::default();
        if let Some(old) = old.cloned() {
            if !flow.flags.reset_counts {
                stats = Arc::clone(&old.stats);
            }
            self.tables.remove(&old);
        }
        self.put(flow, now, stats);
        Ok(())
    }

    /// Gives those entries that are meant other actions; how many there were.
    ///
    /// # Errors
    ///
    /// See [`Refused`]: one of them cannot have these actions; nothing is
    /// changed then.
    pub fn modify(
        &mut self,
        filter: &Filter,
        actions: &[Action],
        reset_counts: bool,
    ) -> Result<usize, Refused> {
        let meant = self.select(filter);
        for entry in &meant {
            self.check(actions, &entry.flow.matches, entry.flow.table)?;
        }
        for entry in &meant {
            self.tables.remove(entry);
            let flow = Flow {
                actions: actions.to_vec(),
                ..entry.flow.clone()
            };
            let stats = if reset_counts {
                Arc::default()
            } else {
                Arc::clone(&entry.stats)
            };
            // It keeps its age among others.
            self.tables.insert(Arc::new(Entry {
                flow,
                created: entry.created,
                stats,
                id: entry.id,
                alone: OnceLock::new(),
            }));
            self.changed = true;
        }
        Ok(meant.len())
    }

    /// Deletes those entries that are meant.
    pub fn delete(&mut self, filter: &Filter) -> Vec<Arc<Entry>> {
        let meant = self.select(filter);
        for entry in &meant {
            self.tables.remove(entry);
            self.changed = true;
        }
        meant
    }

    /// The entries that are meant, in the order of [`Tables::entries`].
    #[must_use]
    pub fn select(&self, filter: &Filter) -> Vec<Arc<Entry>> {
        if let (Some(priority), Some(table)) = (filter.strict, filter.table) {
            let table = self.tables.table(table);
            let found = table.and_then(|table| table.exactly(&filter.matches, priority));
            let found = found.filter(|entry| filter.takes(&entry.flow));
            return found.cloned().into_iter().collect();
        }
        let all = self.tables.entries().into_iter();
        all.filter(|entry| filter.takes(&entry.flow))
            .cloned()
            .collect()
    }

    /// Removes entries whose time is over. Workers' counts must have been added
    /// ([`super::Pipeline::tick`]) not long before: once a second is enough for
    /// both.
    pub fn expire(&mut self, now: Duration) -> Vec<(Arc<Entry>, Gone)> {
        let seconds = |timeout: u16| Duration::from_secs(timeout.into());
        let mut over = Vec::new();
        for entry in self.tables.tables().flat_map(|(_, table)| table.iter()) {
            let flow = &entry.flow;
            let used = entry.stats.used().max(entry.created);
            if flow.hard_timeout != 0 && now >= entry.created + seconds(flow.hard_timeout) {
                over.push((Arc::clone(entry), Gone::Hard));
            } else if flow.idle_timeout != 0 && now >= used + seconds(flow.idle_timeout) {
                over.push((Arc::clone(entry), Gone::Idle));
            }
        }
        for (entry, _) in &over {
            self.tables.remove(entry);
            self.changed = true;
        }
        over
    }

    /// Adds a meter, or gives it other limits.
    ///
    /// # Errors
    ///
    /// See [`Refused`].
    pub fn meter(
        &mut self,
        id: u32,
        spec: MeterSpec,
        modify: bool,
        now: Duration,
    ) -> Result<(), Refused> {
        let sound = spec.bands.iter().all(|band| band.rate != 0);
        if id == 0 || spec.bands.is_empty() || spec.bands.len() > BANDS || !sound {
            return Err(Refused::MeterSpec);
        }
        match (self.tables.meters().contains_key(&id), modify) {
            (true, false) => return Err(Refused::Meter(id)),
            (false, true) => return Err(Refused::NoMeter(id)),
            _ => {}
        }
        if !modify && self.tables.meters().len() >= MOST_METERS {
            return Err(Refused::Meters);
        }
        let meter = Arc::new(Meter::new(spec, now));
        self.tables.meters_mut().insert(id, meter);
        if modify {
            self.renew(id);
        }
        self.changed = true;
        Ok(())
    }

    /// Entries remember what they decided, with the meters in it: those with
    /// meter `id` forget it.
    fn renew(&mut self, id: u32) {
        let with = |entry: &Arc<Entry>| meters_of(&entry.flow.actions).any(|used| used == id);
        let all = self.tables.entries().into_iter();
        let using: Vec<_> = all.filter(|entry| with(entry)).cloned().collect();
        for entry in using {
            self.tables.remove(&entry);
            self.tables.insert(Arc::new(Entry {
                flow: entry.flow.clone(),
                created: entry.created,
                stats: Arc::clone(&entry.stats),
                id: entry.id,
                alone: OnceLock::new(),
            }));
        }
    }

    /// Deletes a meter (none: all), with the entries that use it.
    pub fn delete_meter(&mut self, id: Option<u32>) -> Vec<Arc<Entry>> {
        let meant = |meter: u32| id.is_none_or(|id| id == meter);
        let all = self.tables.entries().into_iter();
        let using: Vec<_> = all
            .filter(|entry| meters_of(&entry.flow.actions).any(meant))
            .cloned()
            .collect();
        for entry in &using {
            self.tables.remove(entry);
        }
        self.tables.meters_mut().retain(|meter, _| !meant(*meter));
        self.changed = true;
        using
    }

    /// Meters, by number.
    #[must_use]
    pub fn meters(&self) -> &BTreeMap<u32, Arc<Meter>> {
        self.tables.meters()
    }
}
