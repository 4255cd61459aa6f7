//! All guests of a node are saved to a directory, and brought back from it.
//!
//! ```text
//! DIR/NAME.snapshot   the guest, as `blanket snapshot` writes it
//! DIR/NAME.json       how it is started again
//! ```
//!
//! A guest is in the directory once both files are: the second is written last
//! and removed first. One command at a time works on a directory.

mod back;
mod watch;

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_vmm::api::types::{Action, Machine, VmInfo, VmState};
use blanket_vmm::snapshot::How;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::commands::snapshot::{Save, save};
use crate::failure::describe;
use crate::home::{Home, VmDir};
use crate::vm::Status;

pub(crate) use back::bring_back;
pub(crate) use watch::watch;

/// The longest that a guest of a pv machine may take to suspend itself before
/// it is stopped where it is.
const SUSPEND: Duration = Duration::from_secs(20);

/// The user that monitors of root's become where nobody says which.
const NOBODY: &str = "65534:65534";

/// How a saved guest is started again.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// It was paused, and shall be.
    paused: bool,
    /// User that its monitor becomes, if not the usual one.
    user: Option<String>,
}

/// What became of a guest.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    /// Where it was saved.
    pub(crate) file: Option<PathBuf>,
    /// The file's size.
    pub(crate) bytes: u64,
    /// How long that took.
    pub(crate) took_ms: u64,
    /// Why it was not saved.
    pub(crate) problem: Option<String>,
}

/// The directory, held by one command.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    lock: File,
}

impl Held {
    /// Waits until no other command works on it. Makes it, for its owner only.
    fn make(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).context("the directory's path")?;
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Self::open(&path)
    }

    fn open(path: &Path) -> Result<Self> {
        let context = || format!("cannot use {}", path.display());
        let lock = File::open(path).with_context(context)?;
        flock(&lock, FlockOperation::LockExclusive).with_context(context)?;
        Ok(Self {
            path: path.to_owned(),
            lock,
        })
    }

    fn snapshot(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.snapshot"))
    }

    fn note(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }

    /// The guests in it, by name.
    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let file = entry?.file_name();
            if let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".json")) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Forgets a guest.
    fn remove(&self, name: &str) -> Result<()> {
        for path in [self.note(name), self.snapshot(name)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => (),
            }
        }
        Ok(())
    }
}

/// How long guests that were asked to shut down are waited for.
const GRACE: Duration = Duration::from_secs(60);

/// Saves all guests to the directory `to` and ends them, the smallest first: so
/// most of them are safe if there is no time for all. With a `deadline`, those
/// that cannot be saved before are asked to shut down, and waited for.
pub(crate) fn save_all(home: &Home, to: &Path, deadline: Option<Instant>) -> Result<Vec<Outcome>> {
    let mut guests = Vec::new();
    for vm in home.vms()? {
        if let Status::Alive { info, .. } = vm.status()? {
            guests.push((vm, info));
        }
    }
    if guests.is_empty() {
        return Ok(Vec::new());
    }
    let held = Held::make(to)?;
    guests.sort_by_key(|(_, info)| info.as_ref().map(|info| info.config.memory()));
    let mut outcomes = Vec::new();
    let mut unsaved = Vec::new();
    for (vm, info) in &guests {
        let outcome = outcome_of(&held, vm, info.as_deref(), deadline);
        if outcome.problem.is_some() && deadline.is_some() {
            shut_down(vm);
            unsaved.push(vm);
        }
        outcomes.push(outcome);
    }
    let grace = Instant::now() + GRACE;
    for vm in unsaved {
        if let Some((_, process)) = vm.process()? {
            process.wait(grace.saturating_duration_since(Instant::now()))?;
        }
    }
    // The names in it.
    held.lock
        .sync_all()
        .context("the directory of saved guests")?;
    Ok(outcomes)
}

fn outcome_of(
    held: &Held,
    vm: &VmDir,
    info: Option<&VmInfo>,
    deadline: Option<Instant>,
) -> Outcome {
    let start = Instant::now();
    let saved = info
        .ok_or_else(|| anyhow::anyhow!("its monitor does not answer"))
        .and_then(|info| save_one(held, vm, info, deadline));
    let mut outcome = Outcome {
        name: vm.name.to_string(),
        file: None,
        bytes: 0,
        took_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
        problem: None,
    };
    match saved {
        Ok((file, bytes)) => {
            outcome.file = Some(file);
            outcome.bytes = bytes;
        }
        Err(error) => {
            let text = describe(&error);
            let text = text.strip_prefix("blanket: ").unwrap_or(&text);
            outcome.problem = Some(text.replace("\n  remedy: ", "; remedy: "));
        }
    }
    outcome
}

fn save_one(
    held: &Held,
    vm: &VmDir,
    info: &VmInfo,
    deadline: Option<Instant>,
) -> Result<(PathBuf, u64)> {
    let left = || deadline.map(|end| end.saturating_duration_since(Instant::now()));
    anyhow::ensure!(left() != Some(Duration::ZERO), "the time was over");
    let name = vm.name.as_str();
    let note = Note {
        paused: info.state == VmState::Paused,
        user: user_of(info.pid)?,
    };
    // What is left of an earlier one is of no use any more.
    held.remove(name)?;
    let file = held.snapshot(name);
    let suspends = info.machine == Machine::Pv && info.state == VmState::Running;
    let timeout = left().map_or(SUSPEND, |left| SUSPEND.min(left / 3));
    let mut how = Save {
        file: &file,
        stop: true,
        suspend: suspends.then_some(timeout),
        deadline,
        form: How::default(),
        interrupted: Default::default(),
        at_rest: None,
    };
    let saved = save(vm, &how);
    let saved = saved.or_else(|error| {
        if how.suspend.take().is_none() {
            return Err(error);
        }
        // A guest that does nothing else can be saved where it is.
        eprintln!("{name}: {error:#}; it is saved where it is");
        save(vm, &how)
    })?;
    vm.write_json(&held.note(name), &note)?;
    Ok((file.clone(), saved.bytes))
}

/// The user of a monitor that root has started, unless it is the usual one.
fn user_of(pid: u32) -> Result<Option<String>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let id = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()
    };
    let user = id("Uid:").zip(id("Gid:"));
    let user = user.map(|(user, group)| format!("{user}:{group}"));
    Ok(user.filter(|user| user != NOBODY))
}

/// Asks a guest to shut down. There is nothing more that could be done.
fn shut_down(vm: &VmDir) {
    let Ok(client) = vm.client() else { return };
    if let Ok(info) = client.info()
        && info.state != VmState::Running
    {
        let _ = client.act(Action::Resume);
    }
    if client.act(Action::Shutdown).is_ok() {
        eprintln!("{}: asked to shut down instead", vm.name);
    }
}

#[cfg(test)]
mod tests;
