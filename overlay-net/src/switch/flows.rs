//! The flows of a network: its entries, and the switch's way through them.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::api::metrics::FlowFigures;
use crate::flow::openflow::{Event, Hub};
use crate::flow::text::{self, TextError};
use crate::flow::{
    Action, CACHE, Connections, Control, Entry, Filter, Flow, Gone, Pipeline, Refused, trace,
};
use crate::frame::Vni;

/// Entries that are gone, or not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// It is no entry.
    #[error("column {}: {}\n{}", .0.column, .0.what, .0.shown(.1))]
    Text(TextError, String),
    /// It cannot be.
    #[error("{0}")]
    Refused(Refused),
}

/// What a network does when it should have a controller and has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailMode {
    /// Its frames go through the bridge, whatever flows say.
    #[default]
    Standalone,
    /// What flows say holds; it begins without any.
    Secure,
}

/// How long a network waits for a controller before it goes on without.
const PATIENCE: Duration = Duration::from_secs(15);

/// What is known of a network's controllers.
#[derive(Clone, Copy, Debug, Default)]
struct Controlled {
    /// None: there should be none.
    mode: Option<FailMode>,
    count: usize,
    /// When there was one.
    since: Duration,
    /// It goes on without.
    open: bool,
}

/// See the module.
pub(super) struct Flows {
    control: Control,
    /// None while it is used.
    pub(super) pipeline: Option<Box<Pipeline>>,
    /// Tells controllers.
    pub(super) hub: Hub,
    controlled: Controlled,
}

/// What finds a port by its name.
type Names<'a> = text::Names<'a>;

impl Default for Flows {
    /// One entry: what nothing else says otherwise goes through the bridge.
    fn default() -> Self {
        let control = Control::bridging();
        let pipeline = Pipeline::new(control.shared(), Arc::new(Connections::default()), CACHE);
        Self {
            control,
            pipeline: Some(Box::new(pipeline)),
            hub: Hub::default(),
            controlled: Controlled::default(),
        }
    }
}

/// The entry that is there from the beginning.
fn bridging() -> Flow {
    Flow {
        actions: vec![Action::Normal],
        ..Flow::default()
    }
}

impl Flows {
    /// The tables; what is changed in them is to be [published](Self::publish).
    pub(super) fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    /// Adds what the pipeline has counted to the entries.
    pub(super) fn fold(&mut self, now: Duration) {
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.fold(now);
        }
    }

    /// Whether the bridge has all frames, whatever entries say.
    pub(super) fn is_open(&self) -> bool {
        self.controlled.open
    }

    /// See [`FailMode`].
    pub(super) fn set_fail_mode(&mut self, now: Duration, mode: Option<FailMode>) {
        let before = self.controlled.mode;
        self.controlled = Controlled {
            mode,
            count: self.controlled.count,
            since: now,
            open: false,
        };
        if mode == Some(FailMode::Secure) && before != mode {
            let flow = bridging();
            let filter = Filter {
                table: Some(flow.table),
                strict: Some(flow.priority),
                ..Filter::default()
            };
            let entries = self.control.select(&filter);
            if entries.iter().all(|entry| entry.flow == flow) {
                self.remove(now, &filter);
            }
        }
    }

    /// So many of the controllers that there should be are there.
    pub(super) fn set_controllers(&mut self, now: Duration, count: usize) {
        if count > 0 && self.controlled.open {
            tracing::info!("a network has a controller again, which has it from now on");
        }
        self.controlled = Controlled {
            count,
            since: now,
            open: self.controlled.open && count == 0,
            ..self.controlled
        };
    }

    /// Removes all entries and meters but the one that is there from the
    /// beginning.
    pub(super) fn reset(&mut self, now: Duration) {
        self.remove(now, &Filter::default());
        self.control.delete_meter(None);
        if self.controlled.mode != Some(FailMode::Secure) {
            // It needs no meter, and there is room for it.
            let _ = self.control.add(bridging(), now);
        }
        self.publish(now);
    }

    /// Removes entries, and tells controllers that want to know.
    fn remove(&mut self, now: Duration, filter: &Filter) -> usize {
        let gone = self.control.delete(filter);
        for entry in &gone {
            self.tell_of(Arc::clone(entry), Gone::Deleted, now);
        }
        self.publish(now);
        gone.len()
    }

    fn tell_of(&self, entry: Arc<Entry>, why: Gone, at: Duration) {
        if entry.flow.flags.send_removed {
            // Who has no room for it has been told too much already.
            let _ = self.hub.send(&Event::Removed { entry, why, at });
        }
    }

    /// Adds an entry, in place of one with the same match and priority.
    pub(super) fn add(
        &mut self,
        now: Duration,
        entry: &str,
        names: Names<'_>,
    ) -> Result<(), Error> {
        let flow = text::parse_flow(entry, names).map_err(|error| wrong(error, entry))?;
        let added = self.control.add(flow, now);
        added.map_err(|refused| Error::Flow(FlowError::Refused(refused)))?;
        self.publish(now);
        Ok(())
    }

    /// Removes the entries that `filter` means; how many there were.
    pub(super) fn delete(
        &mut self,
        now: Duration,
        filter: &str,
        strict: bool,
        names: Names<'_>,
    ) -> Result<usize, Error> {
        let parsed = text::parse_filter(filter, strict, names);
        let filter = parsed.map_err(|error| wrong(error, filter))?;
        Ok(self.remove(now, &filter))
    }

    /// All entries, a line each, with what they have done.
    pub(super) fn dump(&mut self, now: Duration) -> Vec<String> {
        self.fold(now);
        let entries = self.control.select(&Default::default());
        entries.iter().map(|entry| text::dump(entry, now)).collect()
    }

    /// How many there are, and how often they had to be looked up.
    pub(super) fn figures(&mut self, now: Duration) -> FlowFigures {
        let (hits, misses) = self.pipeline.as_mut().map_or((0, 0), |pipeline| {
            pipeline.fold(now);
            pipeline.cached()
        });
        FlowFigures {
            entries: self.control.tables().len(),
            hits,
            misses,
        }
    }

    /// Which entries a packet would hit.
    pub(super) fn trace(&self, vni: Vni, packet: &str, names: Names<'_>) -> Result<String, Error> {
        let parsed = text::parse_packet(packet, names);
        let (mut key, state) = parsed.map_err(|error| wrong(error, packet))?;
        key.vni = vni;
        Ok(trace(self.control.tables(), &key, state).to_string())
    }

    /// Removes what is too old, and stops waiting for a controller that does not
    /// come.
    pub(super) fn expire(&mut self, now: Duration) {
        let gone = self.control.expire(now);
        if !gone.is_empty() {
            for (entry, why) in gone {
                self.tell_of(entry, why, now);
            }
            self.publish(now);
        }
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.tick(now);
        }
        let controlled = &mut self.controlled;
        if controlled.mode == Some(FailMode::Standalone)
            && controlled.count == 0
            && !controlled.open
            && now.saturating_sub(controlled.since) >= PATIENCE
        {
            controlled.open = true;
            tracing::warn!("a network has no controller: its frames go through the bridge");
        }
    }

    /// What was changed holds from now on.
    pub(super) fn publish(&mut self, now: Duration) {
        self.control.publish();
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.tick(now);
        }
    }
}

fn wrong(error: TextError, text: &str) -> Error {
    Error::Flow(FlowError::Text(error, text.to_owned()))
}
