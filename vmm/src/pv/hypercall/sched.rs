//! Scheduling: what the shim leaves of it.

use std::time::Duration;

use super::{Answer, Hypercall, Result};
use crate::machine::lock;
use crate::pv::abi::{Errno, PAGE_SIZE};
use crate::pv::events::MAX_POLLED;
use crate::pv::runstate::State;
use crate::vcpu::Event;

const YIELD: u64 = 0;
const BLOCK: u64 = 1;
const SHUTDOWN: u64 = 2;
const POLL: u64 = 3;
const REMOTE_SHUTDOWN: u64 = 4;
/// Reason of a shutdown (`SHUTDOWN_suspend`).
const SUSPEND: u32 = 2;
const WATCHDOG: u64 = 6;
/// A vCPU that polls looks up at least so often: its guest asks again.
const POLL_MOST: Duration = Duration::from_millis(1);

impl Hypercall<'_> {
    pub(super) fn sched_op(&self) -> Result<Answer> {
        let [command, argument, ..] = self.arguments;
        match command {
            YIELD | BLOCK => Ok(Answer::Value(0)),
            SHUTDOWN => match self.space().get(argument)? {
                SUSPEND => self.suspend(),
                reason => self.shutdown(reason),
            },
            POLL => self.poll(argument),
            WATCHDOG | REMOTE_SHUTDOWN => Err(Errno::NoSys),
            _ => Err(Errno::NoSys),
        }
    }

    fn shutdown(&self, reason: u32) -> Result<Answer> {
        Ok(Answer::Event(match reason {
            0 => Event::PowerOff,
            1 => Event::Reset,
            3 => Event::Failed("the guest's kernel has crashed; its console says why".to_owned()),
            4 => Event::Failed("the guest's watchdog has expired".to_owned()),
            _ => return Err(Errno::Inval),
        }))
    }

    /// Rests until the machine goes on, here or elsewhere; the frame of
    /// `start_info` is where it is told then what is new. The result is written
    /// then too.
    fn suspend(&self) -> Result<Answer> {
        let frame = self.arguments[2];
        // Linux has the first vCPU do it, and Xen's tools look at that one.
        if self.index != 0 || frame >= self.domain.memory / PAGE_SIZE {
            return Err(Errno::Inval);
        }
        *lock(&self.domain.suspended) = Some(frame);
        Ok(Answer::Event(Event::Suspended))
    }

    /// Waits for one of some event channels, up to a time (0: any).
    fn poll(&self, argument: u64) -> Result<Answer> {
        let space = self.space();
        let list: u64 = space.get(argument)?;
        let count: u32 = space.get(argument.wrapping_add(8))?;
        let until: u64 = space.get(argument.wrapping_add(16))?;
        if count as usize > MAX_POLLED {
            return Err(Errno::Inval);
        }
        let ports = (0..u64::from(count))
            .map(|i| space.get(list.wrapping_add(i * 4)))
            .collect::<Result<Vec<u32>>>()?;
        let events = &self.domain.events;
        if !events.poll(self.index, &ports)? {
            let left = match until {
                0 => POLL_MOST,
                until => Duration::from_nanos(until.saturating_sub(self.domain.time.now())),
            };
            self.domain.enter(self.index, State::Blocked);
            self.domain.cpus[self.index].sleep(left.min(POLL_MOST));
            self.domain.enter(self.index, State::Running);
        }
        events.end_poll(self.index);
        Ok(Answer::Value(0))
    }
}
