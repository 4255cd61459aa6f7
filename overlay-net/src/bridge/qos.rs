//! Rates and shares.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A rate, in units (frames or bytes) per second, and how many may come at
/// once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Units per second.
    pub per_second: u64,
    /// Units at once; at least as many as one frame has, or none gets through.
    pub burst: u64,
}

const NANOS: u128 = 1_000_000_000;

/// A token bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: Rate,
    /// Tokens times [`NANOS`].
    tokens: u128,
    last: Duration,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self {
            rate,
            tokens: u128::from(rate.burst) * NANOS,
            last: Duration::ZERO,
        }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.last);
        self.last = self.last.max(now);
        let more = passed
            .as_nanos()
            .saturating_mul(self.rate.per_second.into());
        let full = u128::from(self.rate.burst) * NANOS;
        self.tokens = self.tokens.saturating_add(more).min(full);
    }

    /// Takes `units`, if there are as many.
    pub fn take(&mut self, now: Duration, units: u64) -> bool {
        self.fill(now);
        let need = u128::from(units) * NANOS;
        let enough = self.tokens >= need;
        if enough {
            self.tokens -= need;
        }
        enough
    }

    /// How long until `units` can be taken; `None`: never.
    pub fn wait(&mut self, now: Duration, units: u64) -> Option<Duration> {
        self.fill(now);
        let missing = (u128::from(units) * NANOS).saturating_sub(self.tokens);
        if missing == 0 {
            return Some(Duration::ZERO);
        }
        if units > self.rate.burst {
            return None;
        }
        let nanos = missing.checked_div(self.rate.per_second.into())? + 1;
        Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
    }
}

/// Deficit round robin (Shreedhar and Varghese): shares of a worker's or an
/// uplink's time by weight, in bytes. It only decides whose turn it is.
#[derive(Clone, Debug)]
pub struct Drr<T> {
    quantum: u64,
    active: VecDeque<Turn<T>>,
}

#[derive(Clone, Debug)]
struct Turn<T> {
    who: T,
    weight: u64,
    deficit: u64,
    fresh: bool,
}

impl<T: Copy + PartialEq> Drr<T> {
    /// `quantum` bytes per turn and weight: at least the largest frame.
    #[must_use]
    pub fn new(quantum: u64) -> Self {
        Self {
            quantum: quantum.max(1),
            active: VecDeque::new(),
        }
    }

    /// `who` has something to send, with this weight (0 counts as 1).
    pub fn activate(&mut self, who: T, weight: u32) {
        if self.active.iter().all(|turn| turn.who != who) {
            self.active.push_back(Turn {
                who,
                weight: u64::from(weight.max(1)),
                deficit: 0,
                fresh: true,
            });
        }
    }

    /// Whose turn it is. `next` tells how many bytes `T`'s next frame has;
    /// `None`: it has nothing more to send, and loses its turn.
    pub fn next(&mut self, mut next: impl FnMut(T) -> Option<u64>) -> Option<T> {
        loop {
            let turn = self.active.front_mut()?;
            if turn.fresh {
                turn.fresh = false;
                turn.deficit += self.quantum.saturating_mul(turn.weight);
            }
            let Some(bytes) = next(turn.who) else {
                self.active.pop_front();
                continue;
            };
            if bytes <= turn.deficit {
                turn.deficit -= bytes;
                return Some(turn.who);
            }
            turn.fresh = true;
            self.active.rotate_left(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_through_its_burst_and_then_its_rate() {
        let mut bucket = Bucket::new(Rate {
            per_second: 1000,
            burst: 10,
        });
        let at = Duration::from_millis;
        assert_eq!((0..20).filter(|_| bucket.take(at(0), 1)).count(), 10);
        assert_eq!(bucket.wait(at(0), 11), None);
        let wait = bucket.wait(at(0), 1).expect("soon");
        assert!(wait <= at(1) + Duration::from_nanos(1), "{wait:?}");
        let sent = (1..=100).filter(|ms| bucket.take(at(*ms), 1)).count();
        assert_eq!(sent, 100);
        // Time that goes back gives nothing.
        assert!(!bucket.take(at(1), 10));
    }

    #[test]
    fn turns_are_by_weight_whatever_the_sizes() {
        let mut drr = Drr::new(1500);
        let sizes = [(1_u32, 1_u32, 64_u64), (2, 3, 1500), (3, 1, 1500)];
        for (who, weight, _) in sizes {
            drr.activate(who, weight);
            drr.activate(who, weight);
        }
        let mut bytes = [0_u64; 4];
        for _ in 0..100_000 {
            let who = drr
                .next(|who| Some(sizes[who as usize - 1].2))
                .expect("all have frames");
            bytes[who as usize] += sizes[who as usize - 1].2;
        }
        let share = |who: usize| bytes[who] as f64 / bytes[1] as f64;
        assert!((share(2) - 3.0).abs() < 0.05, "{bytes:?}");
        assert!((share(3) - 1.0).abs() < 0.05, "{bytes:?}");
        assert_eq!(drr.next(|_| None), None);
    }
}
