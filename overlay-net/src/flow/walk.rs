//! What the tables say of a frame, found out by looking: once for all frames
//! that are alike.

use std::sync::Arc;

use super::actions::Action;
use super::fields::{Field, Flat, TAGGED};
use super::meter::Meter;
use super::tables::{Entry, Stats, Tables};
use crate::drops::Reason;
use crate::frame::PortId;

/// Tables that are looked at for one frame, at most.
const MOST_LOOKUPS: usize = 64;

/// Steps of one decision at most.
const MOST_STEPS: usize = 1024;

/// What is to be done with frames that are alike, step by step.
#[derive(Debug, Default)]
pub struct Decision {
    /// In this order.
    pub steps: Box<[Step]>,
    /// Nothing is sent anywhere, and why.
    pub drop: Option<Reason>,
    /// Whom its frames are counted for.
    pub(super) stats: Box<[Arc<Stats>]>,
}

impl Decision {
    /// Whether frames just go through the learning bridge, as most do.
    #[must_use]
    pub fn is_normal(&self) -> bool {
        matches!(*self.steps, [Step::Normal])
    }
}

/// One step of a decision.
#[derive(Clone, Debug)]
pub enum Step {
    /// Out of a port, unless it came in there.
    Output(PortId),
    /// Back.
    InPort,
    /// Through the learning bridge.
    Normal,
    /// As [`Action::Flood`].
    Flood,
    /// As [`Action::All`].
    All,
    /// To the controllers.
    Controller(ToController),
    /// A copy to a port that only watches.
    Mirror(PortId),
    /// Sets bits of a field.
    Set {
        /// Which.
        field: Field,
        /// To what.
        value: u128,
        /// Which bits.
        mask: u128,
    },
    /// One less to live, or it is dropped.
    DecTtl,
    /// Puts a tag in front.
    PushVlan(u16),
    /// Takes a tag away.
    PopVlan,
    /// Through a meter.
    Meter(Arc<Meter>),
    /// Looks up its connection; in the end, it goes on in the table.
    Ct {
        /// Remembers a new one.
        commit: bool,
        /// Of which zone.
        zone: u16,
        /// Where it goes on, with these metadata.
        table: Option<(u8, u64)>,
    },
}

/// What a controller is told with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToController {
    /// Bytes of the frame at most.
    pub max_len: u16,
    /// Whether it matched nothing but what matches everything.
    pub miss: bool,
    /// The table of the entry that says so.
    pub table: u8,
    /// Its cookie.
    pub cookie: u64,
    /// What entries handed on.
    pub metadata: u64,
}

/// What happens on the way, for a trace.
#[derive(Clone, Debug)]
pub enum Event {
    /// A table is looked at, and says this.
    Table(u8, Option<Arc<Entry>>),
    /// Something is done.
    Did(String),
    /// Back to what the entry before says.
    Back(u8),
    /// What was to be done in the end is done.
    Finally,
    /// Why it ends here.
    Stop(&'static str),
}

/// One walk through the tables.
pub struct Walk<'a> {
    tables: &'a Tables,
    /// The frame, as it is now.
    pub flat: Flat,
    metadata: u64,
    /// Nothing was handed on to it.
    fresh: bool,
    steps: Vec<Step>,
    /// What is to be done in the end.
    written: Vec<Action>,
    /// The entries that it went through.
    pub entries: Vec<Arc<Entry>>,
    stats: Vec<Arc<Stats>>,
    lookups: usize,
    stopped: Option<Reason>,
    missed: bool,
    recirculates: bool,
    watch: Option<&'a mut dyn FnMut(Event)>,
}

impl<'a> Walk<'a> {
    /// A walk of a frame.
    #[must_use]
    pub fn new(tables: &'a Tables, flat: Flat) -> Self {
        Self {
            tables,
            flat,
            metadata: flat.get(Field::Metadata) as u64,
            fresh: flat.get(Field::Metadata) == 0,
            steps: Vec::new(),
            written: Vec::new(),
            entries: Vec::new(),
            stats: Vec::new(),
            lookups: 0,
            stopped: None,
            missed: false,
            recirculates: false,
            watch: None,
        }
    }

    /// Tells `watch` what happens.
    #[must_use]
    pub fn watched(mut self, watch: &'a mut dyn FnMut(Event)) -> Self {
        self.watch = Some(watch);
        self
    }

    fn tell(&mut self, event: impl FnOnce() -> Event) {
        if let Some(watch) = &mut self.watch {
            watch(event());
        }
    }

    /// Walks, beginning in table `start`.
    #[must_use]
    pub fn decide(mut self, start: u8) -> Arc<Decision> {
        self.table(start);
        if !self.recirculates && !self.written.is_empty() && self.stopped.is_none() {
            self.tell(|| Event::Finally);
            self.finally();
        }
        // A decision of one entry that looks at no other is always the same, but
        // for what entries before have handed on.
        if let [only] = &self.entries[..]
            && self.lookups == 1
            && self.fresh
        {
            let only = Arc::clone(only);
            return Arc::clone(only.alone.get_or_init(|| Arc::new(self.decision())));
        }
        Arc::new(self.decision())
    }

    /// Walks, beginning with these actions, as if an entry had them.
    #[must_use]
    pub fn follow(mut self, actions: &[Action]) -> Decision {
        let entry = Arc::new(Entry::of(actions.to_vec()));
        for action in actions {
            if self.stopped.is_none() && !self.recirculates {
                self.act(action, &entry);
            }
        }
        if !self.recirculates && !self.written.is_empty() && self.stopped.is_none() {
            self.finally();
        }
        self.decision()
    }

    fn decision(self) -> Decision {
        let sends = |step: &Step| {
            !matches!(
                step,
                Step::Set { .. } | Step::DecTtl | Step::PushVlan(_) | Step::PopVlan
            ) && !matches!(step, Step::Meter(_) | Step::Ct { table: None, .. })
        };
        let sent = self.steps.iter().any(sends);
        let drop = match self.stopped {
            Some(reason) => Some(reason),
            None if sent => None,
            None if self.missed && self.entries.is_empty() => Some(Reason::FlowMiss),
            None => Some(Reason::Flow),
        };
        // Meters and connections count what is dropped, too; what was too long
        // a way does nothing.
        let steps = if self.stopped.is_some() {
            Box::default()
        } else {
            self.steps.into_boxed_slice()
        };
        Decision {
            steps,
            drop,
            stats: self.stats.into_boxed_slice(),
        }
    }

    fn stop(&mut self, reason: Reason, why: &'static str) {
        self.stopped = Some(reason);
        self.tell(|| Event::Stop(why));
    }

    fn table(&mut self, id: u8) {
        self.lookups += 1;
        if self.lookups > MOST_LOOKUPS {
            self.stop(Reason::FlowLoop, "too many tables: it is dropped");
            return;
        }
        let table = self.tables.table(id);
        let found = table.and_then(|table| table.find(&self.flat)).cloned();
        if let Some(table) = table {
            self.stats.push(Arc::clone(&table.looked_up));
            if found.is_some() {
                self.stats.push(Arc::clone(&table.matched));
            }
        }
        self.tell(|| Event::Table(id, found.clone()));
        let Some(entry) = found else {
            self.missed = true;
            return;
        };
        self.stats.push(Arc::clone(&entry.stats));
        self.entries.push(Arc::clone(&entry));
        for action in &entry.flow.actions {
            if self.stopped.is_some() || self.recirculates {
                return;
            }
            self.act(action, &entry);
        }
    }

    fn act(&mut self, action: &Action, entry: &Arc<Entry>) {
        if self.watch.is_some() && !matches!(action, Action::Goto(_) | Action::Resubmit(_)) {
            let text = super::text::action(action);
            self.tell(|| Event::Did(text));
        }
        match action {
            Action::Goto(table) => self.table(*table),
            Action::Resubmit(table) => {
                self.table(*table);
                self.tell(|| Event::Back(entry.flow.table));
            }
            Action::ClearActions => self.written.clear(),
            Action::WriteActions(actions) => {
                for action in actions {
                    self.written.retain(|other| !replaces(action, other));
                    self.written.push(action.clone());
                }
            }
            Action::WriteMetadata { value, mask } => {
                self.metadata = (self.metadata & !mask) | (value & mask);
                self.flat
                    .set(Field::Metadata, self.metadata.into(), u128::MAX);
            }
            Action::Meter(id) => match self.tables.meters().get(id) {
                Some(meter) => self.push(Step::Meter(Arc::clone(meter))),
                None => self.stop(Reason::Meter, "there is no such meter: it is dropped"),
            },
            other => self.primitive(other, entry),
        }
    }

    fn push(&mut self, step: Step) {
        if self.steps.len() >= MOST_STEPS {
            self.stop(Reason::FlowLoop, "too many actions: it is dropped");
        } else {
            self.steps.push(step);
        }
    }

    fn primitive(&mut self, action: &Action, entry: &Entry) {
        let step = match *action {
            Action::Output(port) => Step::Output(port),
            Action::InPort => Step::InPort,
            Action::Normal => Step::Normal,
            Action::Flood => Step::Flood,
            Action::All => Step::All,
            Action::Mirror(port) => Step::Mirror(port),
            Action::Controller { max_len } => Step::Controller(ToController {
                max_len,
                miss: entry.flow.priority == 0 && entry.flow.matches.mask().is_zero(),
                table: entry.flow.table,
                cookie: entry.flow.cookie,
                metadata: self.metadata,
            }),
            Action::Set { field, value, mask } => {
                self.flat.set(field, value, mask);
                if field == Field::Metadata {
                    self.metadata = self.flat.get(field) as u64;
                    return;
                }
                if matches!(field, Field::VlanVid | Field::VlanPcp) {
                    let tagged = TAGGED.into();
                    self.flat.set(Field::VlanTci, tagged, tagged);
                }
                Step::Set { field, value, mask }
            }
            Action::DecTtl => {
                let ttl = self.flat.get(Field::Ttl).saturating_sub(1);
                self.flat.set(Field::Ttl, ttl, u128::MAX);
                Step::DecTtl
            }
            Action::PushVlan(tpid) => {
                self.flat.push_tag();
                Step::PushVlan(tpid)
            }
            Action::PopVlan => {
                self.flat.pop_tag();
                Step::PopVlan
            }
            Action::Ct {
                commit,
                zone,
                table,
            } => {
                self.recirculates = table.is_some();
                Step::Ct {
                    commit,
                    zone,
                    table: table.map(|table| (table, self.metadata)),
                }
            }
            _ => return,
        };
        self.push(step);
    }

    /// Does what is to be done in the end, in OpenFlow's order (1.3.5, 5.10).
    fn finally(&mut self) {
        let Some(entry) = self.entries.last().cloned() else {
            return;
        };
        let mut written = std::mem::take(&mut self.written);
        if !written.iter().any(is_output) {
            return;
        }
        written.sort_by_key(|action| match action {
            Action::PopVlan => 0,
            Action::PushVlan(_) => 1,
            Action::DecTtl => 2,
            Action::Set { .. } => 3,
            _ => 4,
        });
        for action in &written {
            self.act(action, &entry);
        }
    }
}

fn is_output(action: &Action) -> bool {
    matches!(
        action,
        Action::Output(_)
            | Action::InPort
            | Action::Normal
            | Action::Flood
            | Action::All
            | Action::Controller { .. }
    )
}

/// Whether `new` is written in place of `old`: there is one of each kind.
fn replaces(new: &Action, old: &Action) -> bool {
    match (new, old) {
        (
            Action::Set { field, mask, .. },
            Action::Set {
                field: other,
                mask: old,
                ..
            },
        ) => field == other && mask & old == *old,
        (Action::Mirror(new), Action::Mirror(old)) => new == old,
        _ if is_output(new) => is_output(old),
        _ => std::mem::discriminant(new) == std::mem::discriminant(old),
    }
}
