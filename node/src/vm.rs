//! What is known of a VM from outside: its records, its process, its monitor.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Result;
use blanket_vmm::api::types::VmInfo;
use blanket_vmm::client::Client;
use blanket_vmm::config::VmConfig;
use serde::{Deserialize, Serialize};

use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::machine;
use crate::process::{Process, ProcessId};

/// How long a monitor may take to describe its VM before it is called
/// unresponsive.
const ANSWER: Duration = Duration::from_secs(5);

/// How a monitor ended, as its supervisor saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// It exited with status 0: the guest was powered off.
    pub(crate) clean: bool,
    /// Why, in one line.
    pub(crate) reason: String,
}

impl Exit {
    /// Reads a monitor's end from its status and the log of its errors.
    pub(crate) fn read(status: ExitStatus, log: &Path) -> Self {
        use std::os::unix::process::ExitStatusExt;
        if status.success() {
            return Self {
                clean: true,
                reason: "powered off".into(),
            };
        }
        let reason = match (status.signal(), last_line(log)) {
            (Some(signal), _) => {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("unknown");
                format!("the monitor was ended by signal {signal} ({name})")
            }
            (None, Some(line)) => line.trim_start_matches("blanket-vmm: ").to_owned(),
            (None, None) => format!("the monitor ended with {status}"),
        };
        Self {
            clean: false,
            reason,
        }
    }
}

/// The last line of a log that is not blank.
pub(crate) fn last_line(log: &Path) -> Option<String> {
    let mut file = fs::File::open(log).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(4096))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.trim().to_owned())
}

/// What a VM is doing.
#[derive(Debug)]
pub(crate) enum Status {
    /// The monitor lives.
    Alive {
        process: Process,
        pid: u32,
        /// `None` if it does not answer.
        info: Option<Box<VmInfo>>,
    },
    /// `blanket run` is at work on it.
    Starting,
    /// The monitor is gone.
    Ended(Exit),
}

impl VmDir {
    /// Finds out what the VM is doing.
    pub(crate) fn status(&self) -> Result<Status> {
        if let Some((pid, process)) = self.process()? {
            let info = self.client()?.with_timeout(ANSWER).info();
            // No answer may mean that it ended meanwhile.
            if info.is_ok() || !process.wait(Duration::ZERO)? {
                if info.is_err() && self.is_busy()? {
                    return Ok(Status::Starting);
                }
                return Ok(Status::Alive {
                    process,
                    pid,
                    info: info.ok().map(Box::new),
                });
            }
        }
        if let Some(exit) = self.read::<Exit>(&self.exit())? {
            return Ok(Status::Ended(exit));
        }
        if self.is_busy()? {
            return Ok(Status::Starting);
        }
        Ok(Status::Ended(Exit {
            clean: false,
            reason: "ended without a trace (the node was restarted, or the supervisor killed)"
                .into(),
        }))
    }

    /// The monitor, if it lives.
    pub(crate) fn process(&self) -> Result<Option<(u32, Process)>> {
        let record = self.read::<ProcessId>(&self.record())?;
        Ok(record.and_then(|record| Some((record.pid, record.open()?))))
    }

    /// A client of the VM's monitor.
    pub(crate) fn client(&self) -> Result<Client> {
        Ok(Client::new(self.api_socket())?)
    }

    /// A client of the VM's monitor, if it lives.
    pub(crate) fn live_client(&self) -> Result<Client> {
        match self.process()? {
            Some(_) => self.client(),
            None => Err(self.not_running()),
        }
    }

    /// The error for a command that needs a running VM.
    pub(crate) fn not_running(&self) -> anyhow::Error {
        failure(
            format!("'{}' is not running", self.name),
            format!(
                "see why: blanket ps -a; free the name: blanket rm {}",
                self.name
            ),
        )
    }

    /// The configuration that the VM was started with.
    pub(crate) fn stored_config(&self) -> Option<VmConfig> {
        VmConfig::from_file(&self.config()).ok()
    }
}

/// One line of `blanket ps`, and an element of `blanket ps --json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) name: String,
    /// `created`, `running`, `paused`, `starting`, `unresponsive`, `stopped`
    /// (the guest was powered off) or `failed`.
    pub(crate) state: String,
    /// `hvm` or `pv`.
    pub(crate) machine: Option<String>,
    /// The guest's kernel is not isolated from its users.
    pub(crate) trust_guest_user: bool,
    pub(crate) cpus: Option<u8>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) uptime_ms: Option<u64>,
    pub(crate) pid: Option<u32>,
    /// Why it is stopped or failed.
    pub(crate) reason: Option<String>,
}

impl Summary {
    /// The machine and what is special about it, in a word or two.
    pub(crate) fn describe_machine(&self) -> String {
        match &self.machine {
            Some(machine) if machine == "pv" && self.trust_guest_user => {
                format!("{machine}, trusts its users")
            }
            Some(machine) => machine.clone(),
            None => "-".to_owned(),
        }
    }

    /// Sums up one VM.
    pub(crate) fn of(vm: &VmDir, status: &Status) -> Self {
        let stored = match status {
            Status::Alive {
                info: Some(info), ..
            } => Some(info.config.clone()),
            _ => vm.stored_config(),
        };
        let mut summary = Self {
            name: vm.name.to_string(),
            state: "starting".into(),
            machine: stored.as_ref().and_then(machine::name).map(str::to_owned),
            trust_guest_user: stored
                .as_ref()
                .and_then(|config| config.trust_guest_user)
                .unwrap_or(false),
            cpus: stored.as_ref().map(VmConfig::cpus),
            memory_bytes: stored.as_ref().map(VmConfig::memory),
            uptime_ms: None,
            pid: None,
            reason: None,
        };
        match status {
            Status::Alive { pid, info, .. } => {
                summary.pid = Some(*pid);
                summary.state = info
                    .as_ref()
                    .map_or("unresponsive".into(), |info| info.state.to_string());
                if let Some(info) = info {
                    summary.uptime_ms = Some(info.uptime_ms);
                    summary.machine = Some(info.machine.to_string());
                }
            }
            Status::Starting => (),
            Status::Ended(exit) => {
                summary.state = if exit.clean { "stopped" } else { "failed" }.into();
                summary.reason = Some(exit.reason.clone());
            }
        }
        summary
    }
}

/// So many monitors are asked at the same time.
const AT_ONCE: usize = 32;

/// Sums up the VMs of this node, by name; with `all` also those that have ended.
pub(crate) fn summaries(home: &Home, all: bool) -> Result<Vec<Summary>> {
    let one = |vm: &VmDir| match vm.status() {
        Ok(Status::Ended(_)) if !all => Ok(None),
        Ok(status) => Ok(Some(Summary::of(vm, &status))),
        // It was removed while the list was made.
        Err(_) if home.existing(&vm.name).is_err() => Ok(None),
        Err(error) => Err(error),
    };
    let mut summaries = Vec::new();
    for some in home.vms()?.chunks(AT_ONCE) {
        // One that does not answer is waited for once, not after another.
        let found: Vec<_> = std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|vm| scope.spawn(|| one(vm))).collect();
            asked
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .collect()
        });
        for one in found {
            let one = one.map_err(|_| anyhow::anyhow!("a VM could not be summed up"))?;
            summaries.extend(one?);
        }
    }
    Ok(summaries)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::home::Home;

    fn exit_of(script: &str, log: &Path) -> Exit {
        let status = Command::new("sh").args(["-c", script]).status().unwrap();
        Exit::read(status, log)
    }

    #[test]
    fn an_end_is_told_by_status_signal_and_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert!(exit_of("exit 0", &log).clean);
        assert!(exit_of("exit 3", &log).reason.contains("exit status: 3"));
        fs::write(&log, "started\nblanket-vmm: no kernel at x\n\n").unwrap();
        assert_eq!(exit_of("exit 1", &log).reason, "no kernel at x");
        let killed = exit_of("kill -KILL $$", &log);
        assert!(killed.reason.contains("SIGKILL") && !killed.clean);
    }

    #[test]
    fn a_vm_goes_from_starting_to_ended_and_a_dead_pid_is_not_alive() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::locate(Some(dir.path())).unwrap();
        let (vm, lock) = home.claim(&"web".parse().unwrap()).unwrap();
        assert!(matches!(vm.status().unwrap(), Status::Starting));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let record = ProcessId::of(child.id()).unwrap();
        vm.write_json(&vm.record(), &record).unwrap();
        drop(lock);
        // Alive, but nothing answers at the socket.
        let status = vm.status().unwrap();
        assert_eq!(Summary::of(&vm, &status).state, "unresponsive");
        child.kill().unwrap();
        child.wait().unwrap();
        let status = vm.status().unwrap();
        assert_eq!(Summary::of(&vm, &status).state, "failed");
        let exit = Exit {
            clean: true,
            reason: "powered off".into(),
        };
        vm.write_json(&vm.exit(), &exit).unwrap();
        assert_eq!(Summary::of(&vm, &vm.status().unwrap()).state, "stopped");
    }
}
