//! Meters: limits of how much may pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a meter does with what is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Excess {
    /// Drops it.
    Drop,
    /// Makes its drop precedence worse, by so many steps (RFC 2597).
    Remark(u8),
}

/// A meter's band: what is done above a rate. Of several that are exceeded, the
/// one with the highest rate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Band {
    /// 1000 bits, or packets, per second; not 0.
    pub rate: u32,
    /// 1000 bits, or packets, that may come at once above that.
    pub burst: u32,
    /// What is done with more.
    pub excess: Excess,
}

/// A meter's limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeterSpec {
    /// Packets count, not bits.
    pub packets: bool,
    /// Its bands.
    pub bands: Vec<Band>,
}

/// Bands of a meter at most.
pub const BANDS: usize = 8;

/// What a meter says of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metered {
    /// It is within the limits.
    Pass,
    /// It is too much.
    Drop,
    /// It may pass, marked.
    Remark(u8),
}

/// A band's state: a token bucket, as the time at which it is full again
/// (GCRA), so that one atomic word is enough for all workers.
#[derive(Debug, Default)]
struct Bucket {
    /// Nanoseconds since the start.
    full_at: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// A meter, shared by all workers without a lock.
#[derive(Debug)]
pub struct Meter {
    spec: MeterSpec,
    buckets: Box<[Bucket]>,
    packets: AtomicU64,
    bytes: AtomicU64,
    /// When it was made.
    pub since: Duration,
}

/// What has been metered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeterStats {
    /// Packets that came.
    pub packets: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// Packets and bytes that were too much, for each band.
    pub bands: Vec<(u64, u64)>,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Band {
    /// Nanoseconds that `cost` bits or packets use up.
    fn time(&self, packets: bool, cost: u64) -> u64 {
        let unit: u128 = if packets { 1 } else { 1000 };
        let rate = u128::from(self.rate.max(1)) * unit;
        u64::try_from(u128::from(cost) * 1_000_000_000 / rate).unwrap_or(u64::MAX)
    }

    /// Bits or packets that may come at once: as much as is said, else what
    /// comes in 1/10 second; a large frame or a packet at least.
    fn depth(&self, packets: bool) -> u64 {
        let (unit, least) = if packets { (1, 1) } else { (1000, 65_550 * 8) };
        let burst = if self.burst == 0 {
            u64::from(self.rate) * unit / 10
        } else {
            u64::from(self.burst) * unit
        };
        burst.max(least)
    }
}

impl Meter {
    /// A meter with full buckets.
    #[must_use]
    pub fn new(mut spec: MeterSpec, now: Duration) -> Self {
        spec.bands.truncate(BANDS);
        Self {
            buckets: spec.bands.iter().map(|_| Bucket::default()).collect(),
            spec,
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            since: now,
        }
    }

    /// Its limits.
    #[must_use]
    pub fn spec(&self) -> &MeterSpec {
        &self.spec
    }

    /// Takes a frame of `len` bytes, which stands for `packets`, through.
    pub fn take(&self, now: Duration, packets: u32, len: usize) -> Metered {
        let (now, len) = (nanos(now), len as u64);
        self.packets.fetch_add(packets.into(), Ordering::Relaxed);
        self.bytes.fetch_add(len, Ordering::Relaxed);
        let cost = if self.spec.packets {
            u64::from(packets)
        } else {
            len.saturating_mul(8)
        };
        let mut worst: Option<(usize, &Band)> = None;
        for (index, band) in self.spec.bands.iter().enumerate() {
            let takes = band.time(self.spec.packets, cost);
            let depth = band.time(self.spec.packets, band.depth(self.spec.packets));
            if !self.buckets[index].take(now, takes, depth)
                && worst.is_none_or(|(_, other)| band.rate > other.rate)
            {
                worst = Some((index, band));
            }
        }
        let Some((index, band)) = worst else {
            return Metered::Pass;
        };
        let bucket = &self.buckets[index];
        bucket.packets.fetch_add(packets.into(), Ordering::Relaxed);
        bucket.bytes.fetch_add(len, Ordering::Relaxed);
        match band.excess {
            Excess::Drop => Metered::Drop,
            Excess::Remark(steps) => Metered::Remark(steps),
        }
    }

    /// What has been metered.
    #[must_use]
    pub fn stats(&self) -> MeterStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MeterStats {
            packets: read(&self.packets),
            bytes: read(&self.bytes),
            bands: self
                .buckets
                .iter()
                .map(|bucket| (read(&bucket.packets), read(&bucket.bytes)))
                .collect(),
        }
    }
}

impl Bucket {
    /// Takes tokens for `takes` nanoseconds of a bucket of `depth`; false if
    /// there are not enough, and then none are taken.
    fn take(&self, now: u64, takes: u64, depth: u64) -> bool {
        let next = |full_at: u64| {
            let full_at = full_at.max(now).saturating_add(takes);
            // A frame larger than the bucket passes when it is full.
            let depth = depth.max(takes);
            (full_at - now <= depth).then_some(full_at)
        };
        self.full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next)
            .is_ok()
    }
}

/// The drop precedence of a DSCP made worse by `steps`: only of assured
/// forwarding (RFC 2597), whose precedences are 1 to 3.
#[must_use]
pub fn remarked(dscp: u8, steps: u8) -> u8 {
    let (class, precedence) = (dscp >> 3, (dscp >> 1) & 3);
    if !(1..=4).contains(&class) || precedence == 0 || dscp & 1 != 0 {
        return dscp;
    }
    class << 3 | precedence.saturating_add(steps).min(3) << 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(packets: bool, rate: u32, burst: u32) -> Meter {
        let bands = vec![Band {
            rate,
            burst,
            excess: Excess::Drop,
        }];
        Meter::new(MeterSpec { packets, bands }, Duration::ZERO)
    }

    #[test]
    fn a_meter_lets_its_burst_and_then_its_rate_through() {
        let meter = meter(true, 100, 10);
        let mut passed = 0;
        for ms in 0..1000 {
            let now = Duration::from_millis(ms);
            passed += u32::from(meter.take(now, 1, 64) == Metered::Pass);
        }
        assert!((108..=110).contains(&passed), "{passed}");
        let stats = meter.stats();
        assert_eq!((stats.packets, stats.bytes), (1000, 64_000));
        assert_eq!(stats.bands[0].0, 1000 - u64::from(passed));
    }

    #[test]
    fn bits_are_counted_and_large_frames_pass_a_full_bucket() {
        let meter = meter(false, 8_000, 1);
        let mut passed = 0;
        for ms in 0..2000 {
            let now = Duration::from_millis(ms);
            passed += u64::from(meter.take(now, 1, 2000) == Metered::Pass) * 2000;
        }
        // A megabyte per second, and a large frame to begin with.
        assert!((2_000_000..2_070_000).contains(&passed), "{passed}");
    }

    #[test]
    fn the_exceeded_band_with_the_highest_rate_counts() {
        let band = |rate, excess| Band {
            rate,
            burst: 1,
            excess,
        };
        let bands = vec![band(10, Excess::Remark(1)), band(20, Excess::Drop)];
        let meter = Meter::new(
            MeterSpec {
                packets: true,
                bands,
            },
            Duration::ZERO,
        );
        assert_eq!(meter.take(Duration::ZERO, 1, 64), Metered::Pass);
        assert_eq!(meter.take(Duration::ZERO, 1, 64), Metered::Drop);
        let later = Duration::from_millis(60);
        assert_eq!(meter.take(later, 1, 64), Metered::Remark(1));
    }

    #[test]
    fn only_assured_forwarding_is_remarked() {
        assert_eq!(remarked(10, 1), 12, "AF11 to AF12");
        assert_eq!(remarked(34, 9), 38, "AF41 to AF43");
        assert_eq!(
            (remarked(46, 1), remarked(0, 1), remarked(8, 1)),
            (46, 0, 8)
        );
    }
}
