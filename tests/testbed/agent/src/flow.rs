//! Flow control: how many bytes a sender may have under way.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may be sent before the other side has consumed any.
pub const WINDOW: usize = 256 * 1024;

/// The bytes one sender may still send.
#[derive(Debug)]
pub struct Credit {
    /// `None` once closed.
    left: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            left: Mutex::new(Some(WINDOW)),
            changed: Condvar::new(),
        }
    }
}

impl Credit {
    /// Waits until at least one byte may be sent, then takes up to `wanted` bytes of credit.
    /// Returns how many were taken, or `None` when the stream was closed or `deadline` passed.
    pub fn take(&self, wanted: usize, deadline: Option<Instant>) -> Option<usize> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match left.as_mut() {
                None => return None,
                Some(0) => {}
                Some(bytes) => {
                    let taken = wanted.min(*bytes);
                    *bytes -= taken;
                    return Some(taken);
                }
            }
            let wait = match deadline {
                None => Duration::from_secs(3600),
                Some(deadline) => deadline.checked_duration_since(Instant::now())?,
            };
            left = self
                .changed
                .wait_timeout(left, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The other side has consumed this many bytes.
    pub fn add(&self, bytes: usize) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = left.as_mut() {
            *left = left.saturating_add(bytes);
        }
        self.changed.notify_all();
    }

    /// Ends the stream: senders that wait return `None`.
    pub fn close(&self) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_waits_for_the_other_side_and_goes_on() {
        let credit = Credit::default();
        assert_eq!(credit.take(WINDOW + 5, None), Some(WINDOW));
        let past = Some(Instant::now());
        assert_eq!(credit.take(1, past), None);
        std::thread::scope(|scope| {
            scope.spawn(|| credit.add(3));
            assert_eq!(credit.take(10, None), Some(3));
        });
    }

    #[test]
    fn closing_ends_the_wait() {
        let credit = Credit::default();
        credit.take(WINDOW, None);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| credit.take(1, None));
            credit.close();
            assert_eq!(waiter.join().unwrap(), None);
        });
    }
}
