//! What sending takes and what compressing takes, and what follows from that.

use std::time::Duration;

/// Bytes after which it is decided anew.
const WINDOW: u64 = 4 << 20;
/// One of so many batches is a sample.
const SAMPLE: u32 = 16;
/// The same where that has shown that it would not be quicker.
const RARE: u32 = 64;
/// Bytes of samples that tell something.
const TELLING: u64 = 16 << 10;
/// So many windows compressed, and one not.
const TRIAL: u32 = 32;
/// It has to take so much of the time, as the guest and the destination want the
/// processors, too.
const GAIN: f64 = 0.75;

/// Seconds per byte.
pub(super) fn per(time: Duration, bytes: u64) -> f64 {
    time.as_secs_f64() / bytes.max(1) as f64
}

/// What was done, on all streams.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    /// Bytes of memory.
    pub(super) before: u64,
    /// Bytes that were sent of them.
    pub(super) after: u64,
    /// What making those of these took.
    pub(super) work: Duration,
    /// What sending them took.
    pub(super) send: Duration,
}

impl Sums {
    pub(super) fn add(&mut self, more: &Self) {
        self.before += more.before;
        self.after += more.after;
        self.work += more.work;
        self.send += more.send;
    }

    fn halve(&mut self) {
        self.before /= 2;
        self.after /= 2;
        self.work /= 2;
        self.send /= 2;
    }

    pub(super) fn ratio(&self) -> f64 {
        self.after as f64 / self.before.max(1) as f64
    }
}

/// Decides whether memory is compressed.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// It is.
    on: bool,
    /// What sending takes where memory is not compressed: seconds per byte; 0 as
    /// long as it is not known.
    pub(super) link: f64,
    /// That is of late.
    fresh: bool,
    /// Since it was decided last.
    window: Sums,
    /// Of memory that was compressed.
    pub(super) samples: Sums,
    /// They have shown that it would not be quicker.
    useless: bool,
    batches: u32,
    /// Windows in a row that were compressed.
    windows: u32,
}

impl Judge {
    /// Whether the next batch is compressed.
    pub(super) fn plan(&mut self) -> bool {
        if self.on {
            return true;
        }
        let every = if self.useless { RARE } else { SAMPLE };
        self.batches = self.batches.wrapping_add(1);
        self.batches % every == 1
    }

    /// A batch has been sent; `sample`: what of it was compressed.
    pub(super) fn note(&mut self, batch: &Sums, sample: &Sums) {
        self.window.add(batch);
        self.samples.add(sample);
        if self.window.before >= WINDOW {
            self.decide();
        }
    }

    fn decide(&mut self) {
        let window = std::mem::take(&mut self.window);
        if self.on {
            self.windows += 1;
            let takes = per(window.work + window.send, window.before);
            let waits = window.send > window.work;
            // As it is, it was quicker; or it may be by now.
            if takes > self.link || (!waits && self.windows >= TRIAL) {
                self.on = false;
                self.fresh = false;
            }
        } else {
            let now = per(window.send, window.after);
            self.link = match self.fresh {
                false => now,
                true => f64::midpoint(self.link, now),
            };
            self.fresh = true;
            let samples = &self.samples;
            let takes = per(samples.work, samples.before) + samples.ratio() * self.link;
            let tells = samples.before >= TELLING;
            self.on = tells && takes < GAIN * self.link;
            self.useless = tells && !self.on;
            self.windows = 0;
        }
        // What was long ago counts less.
        self.samples.halve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends so many MiB over a link, with memory that can be compressed to a
    /// ratio in some time: how long it takes, in nanoseconds per byte, and how
    /// much of it was compressed.
    fn model(judge: &mut Judge, mib: u64, link: f64, work: f64, ratio: f64) -> (f64, f64) {
        const BATCH: u64 = 256 << 10;
        let (mut time, mut compressed, count) = (0.0, 0, mib * 4);
        for _ in 0..count {
            let is = judge.plan();
            compressed += u64::from(is);
            let after = if is {
                ratio * BATCH as f64
            } else {
                BATCH as f64
            };
            let work = if is { work * BATCH as f64 } else { 0.0 };
            let nanos = |n: f64| Duration::from_nanos(n as u64);
            let batch = Sums {
                before: BATCH,
                after: after as u64,
                work: nanos(work),
                send: nanos(link * after),
            };
            let sample = if is { batch } else { Sums::default() };
            judge.note(&batch, &sample);
            time += work + link * after;
        }
        (
            time / (count * BATCH) as f64,
            compressed as f64 / count as f64,
        )
    }

    #[test]
    fn memory_is_compressed_where_that_is_quicker() {
        let mut judge = Judge::default();
        // 10 ns per byte: 100 MB/s.
        let (time, share) = model(&mut judge, 512, 10.0, 2.0, 0.4);
        assert!(time < 6.5 && share > 0.9, "{time} {share}");
        // The link becomes better: 2 GB/s.
        let (time, share) = model(&mut judge, 1024, 0.5, 2.0, 0.4);
        assert!(time < 0.95 && share < 0.25, "{time} {share}");
        // And worse.
        let (time, share) = model(&mut judge, 512, 20.0, 2.0, 0.4);
        assert!(time < 11.0 && share > 0.9, "{time} {share}");
        // Other memory comes, which cannot be.
        let (time, share) = model(&mut judge, 1024, 10.0, 3.0, 1.0);
        assert!(time < 10.5 && share < 0.1, "{time} {share}");
    }

    #[test]
    fn memory_that_cannot_be_compressed_costs_little() {
        let mut judge = Judge::default();
        let (time, share) = model(&mut judge, 1024, 5.0, 2.0, 1.0);
        assert!(time < 5.1 && share < 0.03, "{time} {share}");
        let mut judge = Judge::default();
        let (time, share) = model(&mut judge, 1024, 1.0, 2.0, 0.3);
        assert!(time < 1.2 && share < 0.1, "{time} {share}");
    }
}
