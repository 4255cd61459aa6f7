//! How many answers the guest is told about at a time.
//!
//! A notification costs a guest more than many a request, and it comes just
//! when the guest prepares the next one. A guest that has several requests in
//! the ring does better if their answers come together; one that waits for
//! each wants it at once. So now and then answers wait for a moment: if another
//! request comes, that is tried with more of them; if none, they were all.

/// Notifications from one trial to the next.
const TRIAL: u32 = 32;

/// Bytes of data that are not kept waiting for more: moving them took longer
/// than what can be saved.
const MAX_BYTES: usize = 128 << 10;

/// The pace of one ring.
#[derive(Debug)]
pub(super) struct Pace {
    /// Answers that the guest had at once lately.
    batch: u32,
    most: u32,
    /// Notifications until more are tried.
    until_trial: u32,
    /// Of the answers that are waiting.
    bytes: usize,
    in_vain: bool,
}

impl Pace {
    /// The pace of a ring with `entries` requests.
    pub(super) fn new(entries: u32) -> Self {
        Self {
            batch: 1,
            most: entries,
            until_trial: 0,
            bytes: 0,
            in_vain: false,
        }
    }

    fn wanted(&self) -> u32 {
        match self.until_trial {
            0 => self.most.min(self.batch * 2),
            _ => self.batch,
        }
    }

    /// Whether `answers` are worth waiting for another request.
    pub(super) fn holds(&self, answers: u32) -> bool {
        (1..self.wanted()).contains(&answers) && self.bytes < MAX_BYTES
    }

    /// A request moves so many bytes.
    pub(super) fn moves(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// No other request came.
    pub(super) fn waited_in_vain(&mut self) {
        self.in_vain = true;
    }

    /// The guest is shown `answers`.
    pub(super) fn publishes(&mut self, answers: u32) {
        if answers == 0 {
            return;
        }
        self.bytes = 0;
        if std::mem::take(&mut self.in_vain) {
            // Not all the way down: the guest's processor may have been away.
            self.batch = answers.max(self.batch / 2);
            self.until_trial = TRIAL;
        } else if self.until_trial > 0 {
            self.until_trial -= 1;
        } else if answers >= self.wanted() {
            self.batch = self.wanted();
        } else {
            // It was not about waiting.
            self.until_trial = TRIAL;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves a guest that has up to `depth` requests in the ring, `times`
    /// times: the largest batch, and how often the guest waited in vain.
    fn serve(pace: &mut Pace, depth: u32, bytes: usize, times: usize) -> (u32, usize) {
        let (mut largest, mut waits) = (0, 0);
        for _ in 0..times {
            let mut answers = 1;
            pace.moves(bytes);
            while pace.holds(answers) {
                if answers == depth {
                    pace.waited_in_vain();
                    waits += 1;
                    break;
                }
                answers += 1;
                pace.moves(bytes);
            }
            pace.publishes(answers);
            largest = largest.max(answers);
        }
        (largest, waits)
    }

    #[test]
    fn answers_come_together_to_a_guest_with_many_requests() {
        for depth in [2, 5, 8, 31, 32] {
            let mut pace = Pace::new(32);
            serve(&mut pace, depth, 4096, 10);
            assert_eq!(pace.batch, depth);
            let (largest, waits) = serve(&mut pace, depth, 4096, 3300);
            assert_eq!(largest, depth);
            assert!(waits <= 100, "{waits}");
        }
    }

    #[test]
    fn a_guest_with_one_request_waits_in_vain_once_in_a_while() {
        let mut pace = Pace::new(32);
        let (largest, waits) = serve(&mut pace, 1, 512, 3300);
        assert_eq!((largest, waits), (1, 100));
    }

    #[test]
    fn a_guest_that_changes_its_ways_is_followed() {
        let mut pace = Pace::new(256);
        serve(&mut pace, 32, 512, 100);
        let (_, waits) = serve(&mut pace, 1, 512, 33);
        assert_eq!((pace.batch, waits), (1, 5));
        serve(&mut pace, 100, 512, 40);
        assert_eq!(pace.batch, 100);
    }

    #[test]
    fn long_requests_do_not_wait() {
        let mut pace = Pace::new(32);
        let (largest, waits) = serve(&mut pace, 8, 1 << 20, 1000);
        assert_eq!((largest, waits), (1, 0));
        let (largest, _) = serve(&mut pace, 8, 64 << 10, 1000);
        assert_eq!(largest, 2);
    }
}
