//! The flows of a network: its entries, and the switch's way through them.

use std::sync::Arc;
use std::time::Duration;

use super::Error;
use crate::api::metrics::FlowFigures;
use crate::flow::text::{self, TextError};
use crate::flow::{CACHE, Connections, Control, Pipeline, Refused, trace};
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

/// See the module.
pub(super) struct Flows {
    control: Control,
    /// None while it is used.
    pub(super) pipeline: Option<Box<Pipeline>>,
}

/// What finds a port by its name.
type Names<'a> = text::Names<'a>;

impl Flows {
    /// One entry: what nothing else says otherwise goes through the bridge.
    pub(super) fn new() -> Self {
        let control = Control::bridging();
        let pipeline = Pipeline::new(control.shared(), Arc::new(Connections::default()), CACHE);
        Self {
            control,
            pipeline: Some(Box::new(pipeline)),
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
        let gone = self
            .control
            .delete(&parsed.map_err(|error| wrong(error, filter))?);
        self.publish(now);
        Ok(gone.len())
    }

    /// All entries, a line each, with what they have done.
    pub(super) fn dump(&mut self, now: Duration) -> Vec<String> {
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.fold(now);
        }
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

    /// Removes what is too old.
    pub(super) fn expire(&mut self, now: Duration) {
        if !self.control.expire(now).is_empty() {
            self.publish(now);
        }
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.tick(now);
        }
    }

    fn publish(&mut self, now: Duration) {
        self.control.publish();
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.tick(now);
        }
    }
}

fn wrong(error: TextError, text: &str) -> Error {
    Error::Flow(FlowError::Text(error, text.to_owned()))
}
