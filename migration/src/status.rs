//! What is wanted of a migration, how far it is, and how it went.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::way::Way;

/// Most data streams.
pub const MOST_STREAMS: u32 = 16;

/// When the guest changes hands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// When all its memory is at the destination.
    PreCopy,
    /// At once: its memory follows it.
    PostCopy,
    /// When all its memory is at the destination; or, if it writes faster than
    /// that can be sent, before.
    #[default]
    Hybrid,
}

/// Whether memory is sent as less than it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Where that is quicker.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, in blocks of LZ4 and as changes.
    Lz4,
}

/// What is wanted of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Data streams, 1 to [`MOST_STREAMS`]; 0 for one per processor.
    pub streams: u32,
    /// The guest is stopped when it is expected to stand still for no more than
    /// so many milliseconds.
    pub downtime_ms: u64,
    /// When the guest changes hands. Where memory cannot follow it, it is
    /// [`Mode::PreCopy`].
    pub mode: Mode,
    /// Most bytes per second; 0 for no limit.
    pub bandwidth: u64,
    /// Rounds after which it is given up.
    pub rounds: u32,
    /// Whether a guest that would stay because it writes too fast is slowed down.
    pub auto_converge: bool,
    /// Whether memory is compressed.
    pub compress: Compress,
    /// Most bytes of pages that are remembered as they were sent, so that only
    /// changes of them are sent later; 0 for none.
    pub delta_cache: u64,
    /// Whether the disks' content follows the guest, instead of being there before
    /// it is.
    pub lazy_disks: bool,
    /// Whether both ends compare all memory while the guest stands still, and all
    /// disks that do not follow it: for tests, as it takes its time.
    pub verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streams: 0,
            downtime_ms: 50,
            mode: Mode::default(),
            bandwidth: 0,
            rounds: 30,
            auto_converge: false,
            compress: Compress::default(),
            delta_cache: 64 << 20,
            lazy_disks: false,
            verify: false,
        }
    }
}

impl Options {
    /// How many streams that makes on this machine.
    #[must_use]
    pub fn streams(&self) -> u32 {
        let auto = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let wanted = match self.streams {
            0 => auto(),
            n => n,
        };
        wanted.clamp(1, MOST_STREAMS)
    }
}

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The destination has not come yet.
    #[default]
    Waiting,
    /// The disks' content is sent while the guest runs.
    Disks,
    /// Memory is sent while the guest runs.
    Copying,
    /// The guest stands still and is handed over.
    Switching,
    /// The guest is the destination's, which has not confirmed that it runs.
    Handed,
    /// The guest runs at the destination, and its memory follows, or its disks.
    Following,
    /// The guest runs at the destination, which has all of it.
    Moved,
    /// A replica of its disks is kept up to date.
    Replicating,
    /// It was cancelled or has failed: the guest is here.
    Failed,
    /// Nothing was moved: it is known how much there is and how fast it changes.
    Measured,
}

/// A round over memory and what was written to the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that were looked at.
    pub pages: u64,
    /// Bytes of disks that were looked at.
    #[serde(default)]
    pub disk: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Bytes of memory that were not sent, as it was sent as less.
    #[serde(default)]
    pub saved: u64,
    /// Microseconds that it took.
    pub us: u64,
    /// Pages that the guest wrote meanwhile.
    pub dirty: u64,
    /// Bytes that it wrote to disks meanwhile.
    #[serde(default)]
    pub dirty_disk: u64,
    /// Percent of its time by which it was slowed down.
    #[serde(default)]
    pub throttle: u8,
}

/// Memory that was sent as less than it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Bytes that were compressed.
    pub compressed: u64,
    /// What they became.
    pub compressed_to: u64,
    /// Bytes of pages of which what had changed was sent.
    pub changed: u64,
    /// What that was.
    pub changed_to: u64,
}

impl Packed {
    /// Bytes that were not sent.
    pub(crate) fn saved(&self) -> u64 {
        (self.compressed + self.changed).saturating_sub(self.compressed_to + self.changed_to)
    }
}

/// Memory that follows the guest, or its disks' content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Following {
    /// Bytes that were missing when the guest changed hands.
    pub missing: u64,
    /// Bytes that are missing.
    pub left: u64,
    /// How often a vCPU, a device or the monitor had to wait for some.
    pub faults: u64,
    /// Microseconds from the order to stop the guest until all of it was there.
    pub us: u64,
}

/// How a replica is kept up to date.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Replication {
    /// Points that the replica has got.
    pub points: u64,
    /// Milliseconds since the moment of the last one.
    pub age_ms: u64,
    /// Bytes that were sent for it.
    pub bytes: u64,
    /// Microseconds for which the guest stood still for it.
    pub pause_us: u64,
    /// The most of these so far.
    pub most_pause_us: u64,
    /// Why no point can be made now.
    pub waits: Option<String>,
}

/// A step of the pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub step: String,
    /// Microseconds that it took.
    pub us: u64,
}

/// How far a migration is, or how it went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is.
    pub phase: Phase,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Data streams.
    pub streams: u32,
    /// How they get to the other end, once they are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<Way>,
    /// Bytes of the disks that move along.
    #[serde(default)]
    pub disks: u64,
    /// Bytes of disks that have been sent, with those that were written anew.
    #[serde(default)]
    pub disks_sent: u64,
    /// Bytes of disks that the destination had already.
    #[serde(default)]
    pub disks_same: u64,
    /// Bytes of memory that are other than zeros, where nothing but that was
    /// measured.
    #[serde(default)]
    pub used: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Bytes that are left of this round, zeros included.
    pub left: u64,
    /// Bytes per second that are sent.
    pub rate: u64,
    /// Bytes per second of memory that get across with these.
    #[serde(default)]
    pub memory_rate: u64,
    /// Bytes per second that the guest writes anew, to memory and disks.
    pub dirty_rate: u64,
    /// The guest was paused before, and is paused where it has come.
    #[serde(default)]
    pub paused: bool,
    /// In which way KVM tells what the guest writes: `ring` or `log`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_by: Option<String>,
    /// Percent of the time of the guest's processors that is taken from them, so
    /// that it writes less; in the end, what it took.
    #[serde(default)]
    pub throttle: u8,
    /// Microseconds that the guest would stand still if it were stopped now.
    pub expected_downtime_us: u64,
    /// The rounds that are over.
    pub rounds: Vec<Round>,
    /// Microseconds from the destination's arrival on.
    pub total_us: u64,
    /// Microseconds that the guest stood still: from the order to stop to the
    /// destination's word that it runs.
    pub downtime_us: u64,
    /// What they were spent on.
    pub pause: Vec<Step>,
    /// What was sent as less than it is.
    #[serde(default)]
    pub packed: Packed,
    /// The memory that follows the guest, if some does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub following: Option<Following>,
    /// The disks' content that follows the guest, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub following_disks: Option<Following>,
    /// The replica, where one is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<Replication>,
    /// Why no memory follows, where that was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unable: Option<String>,
    /// Frames that came to the guest's old place, and were sent on.
    pub forwarded: u64,
}

impl Status {
    /// Bytes of memory and disks that have not followed the guest, if they do.
    #[must_use]
    pub fn left_behind(&self) -> Option<u64> {
        let all = self.following.iter().chain(&self.following_disks);
        all.map(|following| following.left)
            .reduce(|sum, left| sum + left)
    }
}

/// What the engine and those who watch it share.
#[derive(Debug, Default)]
pub struct Progress {
    status: Mutex<Status>,
    cancelled: AtomicBool,
    /// The moment of the last point.
    point: Mutex<Option<Instant>>,
    /// Bytes sent.
    bytes: AtomicU64,
    /// Bytes of this round that were looked at.
    seen: AtomicU64,
}

impl Progress {
    /// How far it is.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = self.lock().clone();
        status.bytes = self.bytes.load(Ordering::Relaxed);
        let seen = self.seen.load(Ordering::Relaxed);
        status.left = status.left.saturating_sub(seen);
        let point = *self.point.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(replication), Some(point)) = (&mut status.replication, point) {
            replication.age_ms = micros(point.elapsed()) / 1000;
        }
        status
    }

    /// Asks for its end. It has none left once the guest is handed over.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The replica has the point of this moment.
    pub(crate) fn point(&self, moment: Instant) {
        *self.point.lock().unwrap_or_else(PoisonError::into_inner) = Some(moment);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin_round(&self, bytes: u64) {
        self.seen.store(0, Ordering::Relaxed);
        self.lock().left = bytes;
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn saw(&self, bytes: u64) {
        self.seen.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It is over without success.
    pub fn fail(&self, error: String) {
        let mut status = self.lock();
        status.phase = Phase::Failed;
        status.error = Some(error);
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The steps of the pause, as they come.
pub(crate) struct Pause {
    start: Instant,
    last: Instant,
    steps: Vec<Step>,
}

impl Pause {
    pub(crate) fn begin() -> Self {
        let start = Instant::now();
        Self {
            start,
            last: start,
            steps: Vec::new(),
        }
    }

    /// A step is done; `other` microseconds of it are another step's.
    pub(crate) fn mark(&mut self, step: &str, other: u64) {
        let now = Instant::now();
        self.steps.push(Step {
            step: step.to_owned(),
            us: micros(now - self.last).saturating_sub(other),
        });
        self.last = now;
    }

    /// A step that the other end has timed.
    pub(crate) fn add(&mut self, step: &str, us: u64) {
        self.steps.push(Step {
            step: step.to_owned(),
            us,
        });
    }

    pub(crate) fn began(&self) -> Instant {
        self.start
    }

    pub(crate) fn end(&mut self, status: &mut Status) {
        status.downtime_us = micros(self.last - self.start);
        status.pause = std::mem::take(&mut self.steps);
    }
}

/// Keeps all streams together to a number of bytes per second.
pub(crate) struct Pace {
    /// Bytes per second; 0 for no limit.
    limit: u64,
    /// When the next byte may go.
    next: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            limit,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may go.
    pub(crate) fn wait(&self, bytes: usize) {
        let turn = self.take(bytes);
        std::thread::sleep(turn.saturating_duration_since(Instant::now()));
    }

    /// Has others wait for `bytes`, which may go at the time that it returns; or
    /// at once, if they are few and urgent.
    pub(crate) fn take(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        if self.limit == 0 {
            return now;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / self.limit as f64);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = (*next).max(now);
        *next = turn + takes;
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_for_all_streams_together() {
        let pace = Pace::new(1_000_000);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5).for_each(|_| pace.wait(10_000)));
            }
        });
        // 200 KB, of which the last 10 KB need not be waited for.
        assert!(start.elapsed() >= Duration::from_millis(185));
    }

    #[test]
    fn streams_are_bounded() {
        let streams = |streams| {
            let options = Options {
                streams,
                ..Options::default()
            };
            options.streams()
        };
        assert_eq!(
            (streams(1), streams(5), streams(1000)),
            (1, 5, MOST_STREAMS)
        );
        assert!(streams(0) >= 1);
    }
}
