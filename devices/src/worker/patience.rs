//! How long a worker looks for events before it sleeps.
//!
//! To sleep and be woken takes longer than many a request, most of all where this
//! machine is a guest itself and its processors stop when they have nothing to do.
//! So a handler can have its worker look for the next event for a while
//! ([`expect`]), as KVM does for a virtual processor that halts (`halt_poll_ns`):
//! longer if that would have been worth it, and not at all if events are rare. The
//! worker looks between other threads' turns: a processor that is wanted is not
//! kept from anybody. Disks do; networks, whose other ends are threads that want
//! the processor themselves, lose by it.

use std::cell::Cell;
use std::time::{Duration, Instant};

use event_manager::{Error, EventManager, MutEventSubscriber};

/// Longest time that is spent looking: KVM's own for a processor.
const MOST: Duration = Duration::from_micros(200);

/// The first time that is tried.
const LEAST: Duration = Duration::from_micros(10);

thread_local! {
    /// Whether a handler expects its next event soon.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
    /// When the first event came since this thread has begun to wait.
    static WOKEN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The handler that calls this, on its worker, is to have another event soon.
pub(crate) fn expect() {
    EXPECTED.with(|expected| expected.set(true));
}

/// An event is about to be served.
pub(super) fn woken() {
    WOKEN.with(|woken| {
        if woken.get().is_none() {
            woken.set(Some(Instant::now()));
        }
    });
}

/// What one worker has learnt of its events.
pub(super) struct Patience {
    window: Duration,
    most: Duration,
}

impl Patience {
    /// Nothing is known yet. Whoever has one processor only keeps it from those
    /// whom it waits for.
    pub(super) fn new() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            window: Duration::ZERO,
            most: if processors > 1 { MOST } else { Duration::ZERO },
        }
    }

    /// Waits for events and serves them.
    ///
    /// # Errors
    /// Those of the manager.
    pub(super) fn run<S: MutEventSubscriber>(
        &mut self,
        manager: &mut EventManager<S>,
    ) -> Result<(), Error> {
        if !EXPECTED.with(|expected| expected.replace(false)) {
            manager.run()?;
            return Ok(());
        }
        WOKEN.with(|woken| woken.set(None));
        let start = Instant::now();
        while start.elapsed() < self.window {
            if manager.run_with_timeout(0)? > 0 {
                return Ok(());
            }
            std::thread::yield_now();
        }
        manager.run()?;
        if let Some(woken) = WOKEN.with(Cell::get) {
            self.slept(woken.saturating_duration_since(start));
        }
        Ok(())
    }

    /// The next event came this long after the last one, and it was not seen.
    fn slept(&mut self, time: Duration) {
        self.window = if time > self.most {
            // Rare events are not looked for.
            Duration::ZERO
        } else {
            (self.window * 2).max(LEAST).min(self.most)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_in_quick_succession_are_looked_for_and_rare_ones_are_not() {
        let mut patience = Patience {
            window: Duration::ZERO,
            most: MOST,
        };
        let soon = Duration::from_micros(50);
        patience.slept(soon);
        assert_eq!(patience.window, LEAST);
        for _ in 0..10 {
            patience.slept(soon);
        }
        assert_eq!(patience.window, MOST);
        patience.slept(Duration::from_millis(1));
        assert_eq!(patience.window, Duration::ZERO);
    }

    #[test]
    fn with_one_processor_nothing_is_looked_for() {
        let mut patience = Patience {
            window: Duration::ZERO,
            most: Duration::ZERO,
        };
        patience.slept(Duration::from_micros(1));
        assert_eq!(patience.window, Duration::ZERO);
    }
}
