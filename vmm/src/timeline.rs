//! How long the steps from the process's start to the running guest took.

use std::time::Instant;

use crate::api::types::BootPhase;

/// The steps so far.
#[derive(Clone, Debug)]
pub struct Timeline {
    start: Instant,
    phases: Vec<BootPhase>,
}

impl Timeline {
    /// Begins now: call it first in `main`.
    #[must_use]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            phases: Vec::new(),
        }
    }

    /// Notes that a step is done.
    pub fn mark(&mut self, phase: &str) {
        self.phases.push(BootPhase {
            phase: phase.to_owned(),
            at_us: u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX),
        });
    }

    /// The steps in order of time.
    #[must_use]
    pub fn phases(&self) -> &[BootPhase] {
        &self.phases
    }
}
