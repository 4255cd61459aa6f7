//! Slowing a guest down: its vCPUs sleep a share of the time in which they would
//! run.
//!
//! A vCPU that has used its processor for some time sleeps for so long that it
//! had the share of both that it may have; one that is idle loses nothing. It
//! looks when it leaves the guest, so somebody has to [kick](Brake::kick) it now
//! and then. Who stops the vCPU does not wait for the end of its sleep.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Control, RUNNING, wait_for_kick};

/// The longest sleep: what a guest does not take for a hang.
const LONGEST: Duration = Duration::from_secs(1);
/// Shorter ones are saved up.
const SHORTEST: Duration = Duration::from_micros(500);

/// What slows a vCPU down.
#[derive(Clone)]
pub struct Brake(Arc<Control>);

impl Brake {
    pub(super) fn new(control: &Arc<Control>) -> Self {
        Self(Arc::clone(control))
    }

    /// Has the vCPU sleep so many percent of the time in which it would run, at
    /// most 99; 0 lets it run.
    pub fn set(&self, percent: u8) {
        self.0.slowed.store(percent.min(99), Ordering::Relaxed);
        self.kick();
    }

    /// Has the vCPU look whether it is to sleep.
    pub fn kick(&self) {
        self.0.kick();
    }
}

/// The vCPU's side.
#[derive(Default)]
pub(super) struct Shoe {
    /// Processor time that its thread had had when it was looked at last.
    had: Option<Duration>,
    /// How long it is to sleep.
    owes: Duration,
}

impl Shoe {
    /// Sleeps if that is due.
    pub(super) fn rest(&mut self, control: &Control) {
        let percent = control.slowed.load(Ordering::Relaxed);
        if percent == 0 {
            *self = Self::default();
            return;
        }
        let has = processor_time();
        let Some(had) = self.had.replace(has) else {
            return;
        };
        self.owes += sleep_for(has.saturating_sub(had), percent);
        if self.owes < SHORTEST {
            return;
        }
        let end = Instant::now() + std::mem::take(&mut self.owes).min(LONGEST);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let goes_on = control.wanted.load(Ordering::Acquire) == RUNNING
                && control.slowed.load(Ordering::Relaxed) != 0;
            if left.is_zero() || !goes_on {
                break;
            }
            wait_for_kick(left);
        }
        // Sleeping does not count.
        self.had = Some(processor_time());
    }
}

/// How long a vCPU sleeps that has run for so long, to sleep `percent` of both.
fn sleep_for(ran: Duration, percent: u8) -> Duration {
    let percent = u32::from(percent.min(99));
    (ran * percent) / (100 - percent)
}

/// What the calling thread has had of a processor, the guest's part included.
fn processor_time() -> Duration {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the call fills the structure, which is plain data anyway.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, time.as_mut_ptr());
        time.assume_init()
    };
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_sleeps_its_share() {
        let ms = Duration::from_millis;
        for (percent, slept) in [(0, 0), (20, 2), (50, 8), (80, 32), (99, 792), (255, 792)] {
            assert_eq!(sleep_for(ms(8), percent), ms(slept), "{percent}");
        }
    }

    /// Uses the processor for a second, looking as often as one that is kicked:
    /// how long it slept.
    fn slept(control: &Control, work: Duration) -> Duration {
        let mut shoe = Shoe::default();
        let began = Instant::now();
        let had = processor_time();
        while processor_time() - had < work {
            let slice = processor_time();
            while processor_time() - slice < Duration::from_millis(2) {
                std::hint::spin_loop();
            }
            shoe.rest(control);
        }
        began.elapsed() - work
    }

    #[test]
    fn a_thread_with_a_brake_sleeps_and_one_that_is_to_stop_does_not() {
        let control = Arc::new(Control::default());
        let brake = Brake::new(&control);
        control.want(RUNNING);
        let work = Duration::from_millis(60);
        brake.set(80);
        assert!(slept(&control, work) >= Duration::from_millis(200));
        control.want(super::super::PAUSED);
        assert!(slept(&control, work) < Duration::from_millis(150));
        control.want(RUNNING);
        brake.set(0);
        assert!(slept(&control, work) < Duration::from_millis(150));
    }

    #[test]
    fn a_kick_ends_the_sleep_of_a_vcpu_that_is_to_stop() {
        super::super::signal::install_handler().unwrap();
        let control = Arc::new(Control::default());
        control.want(RUNNING);
        let thread = {
            let control = Arc::clone(&control);
            std::thread::spawn(move || {
                super::super::signal::block().unwrap();
                let _here = control.enter_thread();
                let mut shoe = Shoe {
                    had: Some(Duration::ZERO),
                    owes: LONGEST,
                };
                let began = Instant::now();
                shoe.rest(&control);
                began.elapsed()
            })
        };
        Brake::new(&control).set(99);
        // It may not have been set before it looked.
        std::thread::sleep(Duration::from_millis(50));
        control.want(super::super::PAUSED);
        control.kick();
        assert!(thread.join().unwrap() < Duration::from_millis(900));
        // Nobody is there any more.
        control.kick();
    }
}
