//! Slowing down a guest that writes faster than can be sent, in steps, until it
//! does not.

use crate::source::Guest;
use crate::status::Progress;

/// How much it is slowed down at first: percent of the time of its processors.
const FIRST: u8 = 20;
/// How much more each time.
const STEP: u8 = 10;
/// Some has to be left: a guest that stands still is not moved live.
const MOST: u8 = 99;

/// The step after this one.
fn next(percent: u8) -> u8 {
    match percent {
        0 => FIRST,
        more => more.saturating_add(STEP).min(MOST),
    }
}

/// Slows the guest down by a step.
pub(crate) fn tighten(guest: &mut dyn Guest, progress: &Progress) {
    let now = progress.lock().throttle;
    let percent = next(now);
    if percent == now {
        return;
    }
    match guest.throttle(percent) {
        Ok(()) => progress.lock().throttle = percent,
        Err(error) => tracing::warn!(error, "the guest is not slowed down"),
    }
}

/// Has it run as before: however a migration ends.
pub(crate) fn release(guest: &mut dyn Guest, progress: &Progress) {
    let slowed = progress.lock().throttle > 0;
    if slowed && let Err(error) = guest.throttle(0) {
        tracing::warn!(error, "the guest is slowed down still");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_slowed_down_in_steps_but_never_stopped() {
        let mut steps = vec![0];
        while steps.len() < 12 {
            steps.push(next(steps[steps.len() - 1]));
        }
        assert_eq!(steps, [0, 20, 30, 40, 50, 60, 70, 80, 90, 99, 99, 99]);
    }
}
