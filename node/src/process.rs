//! Processes told apart without mistakes: a pid alone may have been reused.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// What names one process for good: its pid, when it started, and in which
/// boot of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    /// Clock ticks between the node's boot and the process's start.
    start_ticks: u64,
    /// The kernel's random id of this boot.
    boot: String,
}

impl ProcessId {
    /// The process that has this pid now.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = start_ticks(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))?;
        Ok(Self {
            pid,
            start_ticks,
            boot: boot_id()?,
        })
    }

    /// Opens the process, if it still lives.
    pub(crate) fn open(&self) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The descriptor was opened by pid: whether it is the right process
        // is looked at afterwards, when the pid can no longer be reused
        // behind it.
        if Self::of(self.pid).ok()? != *self {
            return None;
        }
        let process = Process(pidfd);
        (!process.wait(Duration::ZERO).ok()?).then_some(process)
    }
}

/// A process held by a pidfd.
#[derive(Debug)]
pub(crate) struct Process(OwnedFd);

impl Process {
    /// Waits for its end; false when the time is over first.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(n) => Ok(n > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends it without asking. Fine if it is gone already.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Field 22 of /proc/PID/stat. The second field, the command, may itself
/// contain blanks and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let after_command = stat.rsplit_once(')')?.1;
    after_command.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_alive_until_it_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let process = id.open().unwrap();
        assert!(!process.wait(Duration::from_millis(1)).unwrap());
        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        // Ended, though not yet reaped: dead all the same.
        assert!(id.open().is_none());
        child.wait().unwrap();
        assert!(id.open().is_none());
        process.kill().unwrap();
    }

    #[test]
    fn a_reused_pid_and_another_boot_are_told_apart() {
        let mine = ProcessId::of(std::process::id()).unwrap();
        assert!(mine.open().is_some());
        let earlier = ProcessId {
            start_ticks: mine.start_ticks - 1,
            ..mine.clone()
        };
        assert!(earlier.open().is_none());
        let other_boot = ProcessId {
            boot: "00000000-0000-0000-0000-000000000000".into(),
            ..mine
        };
        assert!(other_boot.open().is_none());
    }

    #[test]
    fn the_start_is_found_behind_a_hostile_command_name() {
        let tail = (3..=52)
            .map(|n| n.to_string())
            .collect::<Vec<_>>()
            .join(" ");
        assert_eq!(start_ticks(&format!("7 (a) b) (c) {tail}")), Some(22));
        assert_eq!(start_ticks("7 (a) R 1"), None);
        assert_eq!(start_ticks(""), None);
    }
}
