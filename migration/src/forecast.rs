//! What a migration would be like.

use std::time::{Duration, Instant};

use blanket_memory::dirty::PAGE;
use serde::Serialize;

use crate::disk;
use crate::source::{Error, Guest};
use crate::status::{Options, Phase, Progress, Status};

/// For how long it is looked at what the guest writes.
const LOOK: Duration = Duration::from_secs(2);
/// In so many parts, as what is written twice counts once.
const PARTS: u32 = 4;

/// Finds out how much there is to be moved, and how fast the guest writes to it.
/// The guest runs on; nothing is moved.
///
/// # Errors
/// It cannot be noted what the guest writes.
pub fn measure(guest: &mut dyn Guest, progress: &Progress) -> Result<(), Error> {
    let disks = guest.disks();
    let measured = (|| {
        for disk in &*disks {
            disk.watch()?;
        }
        let used = guest.begin().map_err(Error::Guest)?.count() * PAGE as u64;
        let start = Instant::now();
        let (mut memory, mut blocks) = (0, 0);
        for _ in 0..PARTS {
            std::thread::sleep(LOOK / PARTS);
            memory += guest.dirty().map_err(Error::Guest)?.count() * PAGE as u64;
            blocks += disk::bytes(&disk::written(&disks));
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok::<_, Error>((used, ((memory + blocks) as f64 / seconds) as u64))
    })();
    guest.end();
    disks.iter().for_each(|disk| disk.unwatch());
    let (used, rate) = measured?;
    let mut status = progress.lock();
    status.used = used;
    status.dirty_rate = rate;
    status.disks = disks.iter().map(|disk| disk.capacity()).sum();
    status.phase = Phase::Measured;
    Ok(())
}

/// What a migration over a link is expected to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Forecast {
    /// Bytes per second of the link.
    pub bandwidth: u64,
    /// Bytes that would be sent.
    pub bytes: u64,
    /// Milliseconds that it would take.
    pub total_ms: u64,
    /// Milliseconds that the guest would stand still; for states of machines and
    /// switching over, some more.
    pub downtime_ms: u64,
    /// Whether that is what it may.
    pub converges: bool,
}

impl Forecast {
    /// Of what was measured, and `disks` bytes of disks besides, over a link with
    /// so many bytes per second.
    #[must_use]
    pub fn of(measured: &Status, disks: u64, bandwidth: u64, options: &Options) -> Self {
        let speed = bandwidth.max(1) as f64;
        let rate = measured.dirty_rate as f64;
        let target = options.downtime_ms as f64 / 1e3;
        // No more can be dirty than there is.
        let most = (measured.used + disks) as f64;
        let mut left = most;
        let (mut bytes, mut seconds) = (0.0, 0.0);
        for round in 0..options.rounds.max(1) {
            if round > 0 && left / speed <= target {
                break;
            }
            bytes += left;
            seconds += left / speed;
            left = (rate * left / speed).min(most);
        }
        let pause = left / speed;
        Self {
            bandwidth,
            bytes: (bytes + left) as u64,
            total_ms: ((seconds + pause) * 1e3) as u64,
            downtime_ms: (pause * 1e3).ceil() as u64,
            converges: pause <= target,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(used: u64, dirty_rate: u64) -> Status {
        Status {
            used,
            dirty_rate,
            ..Status::default()
        }
    }

    #[test]
    fn an_idle_guest_is_sent_once() {
        let forecast = Forecast::of(&measured(1 << 30, 0), 0, 1 << 30, &Options::default());
        assert_eq!((forecast.total_ms, forecast.downtime_ms), (1000, 0));
        assert!(forecast.converges);
        let disks = Forecast::of(&measured(1 << 30, 0), 1 << 30, 1 << 30, &Options::default());
        assert_eq!(disks.bytes, 2 << 30);
    }

    #[test]
    fn a_guest_that_writes_is_sent_more_than_once_and_one_that_writes_too_fast_diverges() {
        let options = Options::default();
        let at_half = Forecast::of(&measured(1 << 30, 100 << 20), 0, 200 << 20, &options);
        assert!(at_half.converges && at_half.downtime_ms <= options.downtime_ms);
        assert!(
            at_half.bytes > 3 << 29 && at_half.bytes <= 2 << 30,
            "{at_half:?}"
        );
        let above = Forecast::of(&measured(1 << 30, 300 << 20), 0, 200 << 20, &options);
        assert!(!above.converges && above.downtime_ms > 5000, "{above:?}");
    }
}
