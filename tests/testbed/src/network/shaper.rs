//! What a link does to the frames of one direction.

use std::collections::VecDeque;
use std::time::Duration;

/// Bytes that wait at most for a link with limited bandwidth. Further frames are dropped, as
/// the queue of a router does.
const QUEUE: u64 = 256 * 1024;

/// How much later than others a frame arrives that later ones are to overtake.
const LATE: Duration = Duration::from_millis(4);

/// The properties of a link, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Time from one end to the other.
    pub latency: Duration,
    /// Bits per second; unlimited if `None`.
    pub bandwidth: Option<u64>,
    /// The part of the frames that is lost, from 0 to 1.
    pub loss: f64,
    /// The part of the frames that arrive four milliseconds later, from 0 to 1: what is sent
    /// meanwhile overtakes them.
    pub reorder: f64,
    /// Whether the ends reach each other at all.
    pub up: bool,
}

impl Default for Link {
    /// A perfect link.
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            bandwidth: None,
            loss: 0.0,
            reorder: 0.0,
            up: true,
        }
    }
}

/// What became of the frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that were handed on.
    pub passed: u64,
    /// Frames that were lost at random, in a partition, or because a queue was full.
    pub dropped: u64,
    /// Of those that were handed on, the ones that arrived late.
    pub late: u64,
}

/// One direction of a link. Time is given by the caller, as the time since some fixed start.
#[derive(Debug)]
pub(super) struct Shaper {
    random: fastrand::Rng,
    /// Decides who is late.
    dice: fastrand::Rng,
    /// Frames under way and when they arrive, in order.
    under_way: VecDeque<(Duration, Vec<u8>)>,
    /// The same of those that are late.
    late: VecDeque<(Duration, Vec<u8>)>,
    /// When the last frame has been put on the wire.
    idle_from: Duration,
    pub(super) counters: Counters,
    /// What users have been told of them.
    pub(super) told: Counters,
}

impl Shaper {
    /// A shaper whose losses are decided by `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            dice: fastrand::Rng::with_seed(!seed),
            under_way: VecDeque::new(),
            late: VecDeque::new(),
            idle_from: Duration::ZERO,
            counters: Counters::default(),
            told: Counters::default(),
        }
    }

    /// A frame enters the link.
    pub(super) fn push(&mut self, now: Duration, frame: &[u8], link: &Link) {
        // Drawn for every frame, so that what is lost does not depend on anything else.
        let lost = self.random.f64() < link.loss;
        let late = self.dice.f64() < link.reorder;
        let start = self.idle_from.max(now);
        let full = link
            .bandwidth
            .is_some_and(|bandwidth| start - now > sending_time(QUEUE, bandwidth));
        if lost || full || !link.up {
            self.counters.dropped += 1;
            return;
        }
        let sent = match link.bandwidth {
            Some(bandwidth) => start + sending_time(frame.len() as u64, bandwidth),
            None => now,
        };
        self.idle_from = sent;
        let (queue, due) = if late {
            (&mut self.late, sent + link.latency + LATE)
        } else {
            (&mut self.under_way, sent + link.latency)
        };
        // A frame does not overtake another when the latency has become shorter.
        let earliest = queue.back().map_or(Duration::ZERO, |(due, _)| *due);
        queue.push_back((due.max(earliest), frame.to_vec()));
    }

    /// The next frame that has arrived by now.
    pub(super) fn pop(&mut self, now: Duration) -> Option<Vec<u8>> {
        let next = self.next_due()?;
        if next > now {
            return None;
        }
        self.counters.passed += 1;
        let is_next = |(due, _): &(Duration, Vec<u8>)| *due == next;
        let queue = if self.under_way.front().is_some_and(is_next) {
            &mut self.under_way
        } else {
            self.counters.late += 1;
            &mut self.late
        };
        queue.pop_front().map(|(_, frame)| frame)
    }

    /// When the next frame arrives.
    pub(super) fn next_due(&self) -> Option<Duration> {
        let queues = [&self.under_way, &self.late].into_iter();
        queues
            .filter_map(|queue| queue.front().map(|(due, _)| *due))
            .min()
    }
}

fn sending_time(bytes: u64, bits_per_second: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 8 * 1_000_000_000 / u128::from(bits_per_second.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn drain(shaper: &mut Shaper, now: Duration) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| shaper.pop(now)).collect()
    }

    #[test]
    fn a_perfect_link_hands_on_at_once_and_in_order() {
        let mut shaper = Shaper::new(1);
        for n in 0..100u8 {
            shaper.push(MS, &[n], &Link::default());
        }
        let expected: Vec<_> = (0..100u8).map(|n| vec![n]).collect();
        assert_eq!(drain(&mut shaper, MS), expected);
        assert_eq!(
            shaper.counters,
            Counters {
                passed: 100,
                ..Counters::default()
            }
        );
    }

    #[test]
    fn frames_arrive_after_the_latency_and_not_before() {
        let mut shaper = Shaper::new(1);
        let link = Link {
            latency: 50 * MS,
            ..Link::default()
        };
        shaper.push(10 * MS, b"x", &link);
        assert_eq!(shaper.next_due(), Some(60 * MS));
        assert_eq!(shaper.pop(59 * MS), None);
        assert_eq!(shaper.pop(60 * MS), Some(b"x".to_vec()));
        assert_eq!(shaper.next_due(), None);
    }

    #[test]
    fn a_shorter_latency_does_not_reorder() {
        let mut shaper = Shaper::new(1);
        shaper.push(
            MS,
            b"slow",
            &Link {
                latency: 50 * MS,
                ..Link::default()
            },
        );
        shaper.push(2 * MS, b"fast", &Link::default());
        assert_eq!(drain(&mut shaper, 50 * MS), Vec::<Vec<u8>>::new());
        assert_eq!(
            drain(&mut shaper, 51 * MS),
            [b"slow".to_vec(), b"fast".to_vec()]
        );
    }

    #[test]
    fn bandwidth_spaces_frames_out_and_a_full_queue_drops() {
        let mut shaper = Shaper::new(1);
        // 1000 bytes take one millisecond.
        let link = Link {
            bandwidth: Some(8_000_000),
            ..Link::default()
        };
        for _ in 0..1000 {
            shaper.push(Duration::ZERO, &[0; 1000], &link);
        }
        let queued = QUEUE / 1000;
        assert!(shaper.counters.dropped >= 1000 - queued - 2);
        for second in 1..=10 {
            assert_eq!(drain(&mut shaper, second * 10 * MS).len(), 10);
        }
        // Once the queue is empty the link takes frames again.
        drain(&mut shaper, 1000 * MS);
        shaper.push(1000 * MS, &[0; 1000], &link);
        assert_eq!(shaper.next_due(), Some(1001 * MS));
    }

    #[test]
    fn losses_have_the_given_ratio_and_repeat_with_the_seed() {
        let link = Link {
            loss: 0.2,
            ..Link::default()
        };
        let run = |seed| {
            let mut shaper = Shaper::new(seed);
            for n in 0..10_000u32 {
                shaper.push(MS, &n.to_le_bytes(), &link);
            }
            drain(&mut shaper, MS)
        };
        let passed = run(7).len();
        assert!((7800..8200).contains(&passed), "{passed} of 10000 passed");
        assert!(run(7) == run(7));
        assert!(run(7) != run(8));
    }

    #[test]
    fn some_frames_are_overtaken_and_none_is_lost_or_doubled() {
        let link = Link {
            latency: MS,
            reorder: 0.1,
            ..Link::default()
        };
        let mut shaper = Shaper::new(3);
        let mut came = Vec::new();
        for n in 0..1000u32 {
            let now = n * MS;
            shaper.push(now, &n.to_le_bytes(), &link);
            came.extend(drain(&mut shaper, now));
        }
        came.extend(drain(&mut shaper, 2000 * MS));
        let behind = came.windows(2).filter(|pair| {
            let [one, two] = [&pair[0], &pair[1]].map(|n| [n[0], n[1]]);
            u16::from_le_bytes(two) < u16::from_le_bytes(one)
        });
        let (behind, late) = (behind.count() as u64, shaper.counters.late);
        assert!((50..150).contains(&late), "{late}");
        // Two in a row that are late are in order.
        assert!(behind > late / 2 && behind <= late, "{behind} of {late}");
        came.sort();
        came.dedup();
        assert_eq!(came.len(), 1000);
        assert_eq!(shaper.counters.dropped, 0);
    }

    #[test]
    fn nothing_passes_a_partition_but_what_is_under_way_arrives() {
        let mut shaper = Shaper::new(1);
        let link = Link {
            latency: 5 * MS,
            ..Link::default()
        };
        shaper.push(MS, b"before", &link);
        shaper.push(2 * MS, b"during", &Link { up: false, ..link });
        assert_eq!(drain(&mut shaper, 100 * MS), [b"before".to_vec()]);
        assert_eq!(
            shaper.counters,
            Counters {
                passed: 1,
                dropped: 1,
                late: 0
            }
        );
    }
}
