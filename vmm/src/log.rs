//! The monitor's log, on standard error.
//!
//! A guest can provoke a line with every access. So that none can fill the
//! node's disk, lines come from a budget that refills slowly; what was left
//! out is counted.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u64 = 200;
/// After that, one line in this time.
const REFILL: Duration = Duration::from_secs(10);

/// How many lines may still be written.
#[derive(Debug)]
struct Budget {
    left: u64,
    refilled: Instant,
    left_out: u64,
}

impl Budget {
    /// Takes a line from the budget: whether there was one, and how many lines
    /// have been left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        while self.left < BURST && now.duration_since(self.refilled) >= REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == BURST {
            self.refilled = now;
        }
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Standard error, within the budget.
#[derive(Clone, Copy, Debug)]
pub struct Limited(&'static Mutex<Budget>);

impl Write for Limited {
    /// tracing writes one event, a whole line, at a time.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let taken = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(Instant::now());
        let mut stderr = io::stderr().lock();
        if let Some(left_out) = taken {
            if left_out > 0 {
                writeln!(stderr, "({left_out} lines left out)")?;
            }
            stderr.write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends this process's log to standard error.
pub fn init() {
    let budget = Box::leak(Box::new(Mutex::new(Budget {
        left: BURST,
        refilled: Instant::now(),
        left_out: 0,
    })));
    let writer = Limited(budget);
    tracing_subscriber::fmt()
        .with_writer(move || writer)
        .with_ansi(false)
        .with_target(false)
        .compact()
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_burst_and_a_trickle_and_counted() {
        let start = Instant::now();
        let mut budget = Budget {
            left: BURST,
            refilled: start,
            left_out: 0,
        };
        let written = (0..10_000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(written as u64, BURST);
        assert_eq!(budget.take(start + REFILL), Some(10_000 - BURST));
        assert_eq!(budget.take(start + REFILL), None);
        let later = start + REFILL * 10_000;
        let written = (0..10_000).filter(|_| budget.take(later).is_some()).count();
        assert_eq!(written as u64, BURST);
    }
}
