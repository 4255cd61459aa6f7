//! What a vCPU has been doing: its run states (`vcpu.h`).
//!
//! The node's kernel schedules a vCPU as a thread, and accounts for it: how
//! long the thread ran, and how long it waited for a processor. The latter is
//! what the guest sees as stolen time. What is neither, it slept: the vCPU was
//! blocked. All times are nanoseconds of the domain's clock, which stands still
//! during a pause: a pause is in none of them.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::abi::VcpuRunstateInfo;

/// A run state (`RUNSTATE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    /// It runs.
    Running = 0,
    /// It would run, if it had a processor. (The monitor cannot see when that
    /// begins: a vCPU that asks has one.)
    Runnable = 1,
    /// It waits for an event.
    Blocked = 2,
    /// It is down.
    #[default]
    Offline = 3,
}

/// What a thread has had from the node's kernel, in nanoseconds since it began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// It ran.
    ran: u64,
    /// It waited for a processor.
    waited: u64,
}

/// Reads what a thread has had. Any thread of the process may.
pub(crate) struct Meter {
    clock: libc::clockid_t,
    /// None: this node's kernel does not tell (`CONFIG_SCHED_INFO`).
    waits: Option<File>,
}

impl Meter {
    /// Of the calling thread. It opens a file, which vCPUs' filters forbid.
    #[must_use]
    pub(crate) fn of_this_thread() -> Self {
        let mut clock = libc::CLOCK_THREAD_CPUTIME_ID;
        // SAFETY: the thread is the caller, and the place is a local's.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        Self {
            clock,
            waits: File::open("/proc/thread-self/schedstat").ok(),
        }
    }

    fn read(&self) -> Spent {
        Spent {
            ran: self.ran().unwrap_or(0),
            waited: self.waited().unwrap_or(0),
        }
    }

    fn ran(&self) -> Option<u64> {
        let mut time = MaybeUninit::<libc::timespec>::uninit();
        // SAFETY: the call fills the structure if it succeeds.
        let time = unsafe {
            if libc::clock_gettime(self.clock, time.as_mut_ptr()) != 0 {
                return None;
            }
            time.assume_init()
        };
        let seconds = u64::try_from(time.tv_sec).ok()?;
        Some(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).ok()?)
    }

    /// The second of three numbers: time run, time waited, time slices.
    fn waited(&self) -> Option<u64> {
        let mut text = [0; 80];
        let len = self.waits.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..len]).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse().ok()
    }
}

/// A vCPU's run state, and the times that it has spent in each.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RunState {
    state: State,
    /// The system time up to which `times` account for all.
    until: u64,
    times: [u64; 4],
    /// Where the guest wants to read this, in its kernel's address space; 0:
    /// nowhere.
    pub area: u64,
    /// The guest wants updates of the area to be marked
    /// (`VMASST_TYPE_runstate_update_flag`).
    pub marked: bool,
    /// What the vCPU's thread had had by then; None: nothing is known.
    #[serde(skip)]
    spent: Option<Spent>,
}

impl RunState {
    /// A vCPU's life begins, at a system time, in a state.
    pub(crate) fn begin(&mut self, now: u64, state: State) {
        *self = Self {
            state,
            until: now,
            area: self.area,
            marked: self.marked,
            ..Self::default()
        };
    }

    /// The state.
    #[must_use]
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// Accounts for the time since the last such call. It enters `state` now.
    pub(crate) fn enter(&mut self, state: State, now: u64, meter: Option<&Meter>) {
        self.advance(now, meter.map(Meter::read));
        self.state = state;
    }

    fn advance(&mut self, now: u64, spent: Option<Spent>) {
        let before = std::mem::replace(&mut self.spent, spent);
        let passed = now.saturating_sub(self.until);
        self.until = self.until.max(now);
        if self.state == State::Offline {
            self.times[State::Offline as usize] += passed;
            return;
        }
        let (waited, ran) = match (before, spent) {
            (Some(before), Some(spent)) => (
                spent.waited.saturating_sub(before.waited),
                spent.ran.saturating_sub(before.ran),
            ),
            _ => (0, 0),
        };
        // What the thread had while the domain's clock stood still is nobody's.
        let waited = waited.min(passed);
        let ran = ran.min(passed - waited);
        self.times[State::Runnable as usize] += waited;
        self.times[State::Running as usize] += ran;
        self.times[State::Blocked as usize] += passed - waited - ran;
    }

    /// What the guest is told. `halted`: a vCPU that runs has nothing to do.
    #[must_use]
    pub(crate) fn info(&self, halted: bool) -> VcpuRunstateInfo {
        let state = match self.state {
            State::Running if halted => State::Blocked,
            state => state,
        };
        VcpuRunstateInfo {
            state: state as u32,
            state_entry_time: self.until,
            time: self.times,
            ..Default::default()
        }
    }

    /// The times, as metrics.
    #[must_use]
    pub(crate) fn times(&self) -> [(&'static str, u64); 4] {
        let [running, runnable, blocked, offline] = self.times;
        [
            ("running_ns", running),
            ("stolen_ns", runnable),
            ("blocked_ns", blocked),
            ("offline_ns", offline),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spent(ran: u64, waited: u64) -> Option<Spent> {
        Some(Spent { ran, waited })
    }

    fn state() -> impl Strategy<Value = State> {
        prop::sample::select(vec![
            State::Running,
            State::Runnable,
            State::Blocked,
            State::Offline,
        ])
    }

    #[test]
    fn waits_are_stolen_time_and_sleep_is_not() {
        let mut run = RunState::default();
        run.begin(1000, State::Running);
        run.advance(1000, spent(50, 7));
        run.advance(1100, spent(80, 17));
        assert_eq!(run.info(false).time, [30, 10, 60, 0]);
        assert_eq!(run.info(false).state_entry_time, 1100);
        assert_eq!((run.info(false).state, run.info(true).state), (0, 2));
        run.state = State::Offline;
        run.advance(1200, spent(80, 17));
        run.state = State::Running;
        run.advance(1210, spent(90, 17));
        assert_eq!(run.info(true).time, [40, 10, 60, 100]);
    }

    #[test]
    fn what_a_thread_had_before_or_during_a_pause_is_not_its_guests() {
        let mut run = RunState::default();
        run.begin(0, State::Running);
        // An older thread's, as after a reset.
        run.advance(100, spent(1_000_000, 1_000_000));
        assert_eq!(run.info(false).time, [0, 0, 100, 0]);
        // The clock stood still meanwhile.
        run.advance(100, spent(2_000_000, 3_000_000));
        assert_eq!(run.info(false).time, [0, 0, 100, 0]);
        run.advance(150, spent(2_000_020, 3_000_010));
        assert_eq!(run.info(false).time, [20, 10, 120, 0]);
    }

    #[test]
    fn a_saved_account_goes_on_without_the_other_threads_past() {
        let mut run = RunState::default();
        run.begin(0, State::Running);
        run.advance(10, spent(5, 5));
        run.advance(20, spent(10, 10));
        let text = serde_json::to_string(&run).unwrap();
        let mut run: RunState = serde_json::from_str(&text).unwrap();
        run.advance(30, spent(10_000, 10_000));
        assert_eq!(run.info(false).time, [5, 5, 20, 0]);
    }

    #[test]
    fn the_nodes_kernel_tells_how_long_a_thread_ran() {
        let meter = Meter::of_this_thread();
        let before = meter.read();
        while meter.read().ran < before.ran + 1_000_000 {
            std::hint::black_box(before);
        }
        // Another thread may ask, too; sleep is neither.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let after = std::thread::scope(|scope| scope.spawn(|| meter.read()).join().unwrap());
        assert!(after.ran - before.ran < 20_000_000);
        assert!(meter.waits.is_some(), "no schedstat");
        assert!(after.waited >= before.waited);
    }

    proptest! {
        #[test]
        fn the_times_are_the_vcpus_whole_life_and_none_goes_back(
            start in 0u64..1 << 40,
            steps in prop::collection::vec(
                (0u64..1 << 32, prop::option::of((0u64..1 << 33, 0u64..1 << 33)), state()), 0..50),
        ) {
            let mut run = RunState::default();
            run.begin(start, State::Running);
            let mut now = start;
            for (passed, had, state) in steps {
                let before = run.info(false).time;
                now += passed;
                run.advance(now, had.map(|(ran, waited)| Spent { ran, waited }));
                run.state = state;
                let info = run.info(false);
                prop_assert_eq!(info.time.iter().sum::<u64>(), now - start);
                prop_assert_eq!(info.state_entry_time, now);
                prop_assert!(info.time.iter().zip(before).all(|(after, before)| *after >= before));
            }
        }
    }
}
