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
        self.mark_at(phase, Instant::now());
    }

    /// Notes that a step was done at some moment, on another thread.
    pub fn mark_at(&mut self, phase: &str, moment: Instant) {
        let since = moment.saturating_duration_since(self.start);
        let at_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        let place = self.phases.partition_point(|other| other.at_us <= at_us);
        let phase = phase.to_owned();
        self.phases.insert(place, BootPhase { phase, at_us });
    }

    /// The steps in order of time.
    #[must_use]
    pub fn phases(&self) -> &[BootPhase] {
        &self.phases
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn steps_of_other_threads_are_in_their_places() {
        let mut timeline = Timeline::start();
        let moment = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        timeline.mark("second");
        timeline.mark_at("first", moment);
        timeline.mark("third");
        let phases: Vec<_> = timeline.phases().iter().map(|it| &*it.phase).collect();
        assert_eq!(phases, ["first", "second", "third"]);
    }
}
