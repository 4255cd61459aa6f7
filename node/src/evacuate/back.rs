//! Saved guests go on.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_vmm::api::types::Action;
use blanket_vmm::config::VmConfig;

use super::{Held, Note};
use crate::commands::print;
use crate::commands::restore::Restore;
use crate::failure::describe;
use crate::home::Home;
use crate::name::VmName;
use crate::vm::Status;

/// Starts all guests in the directory `from` and prints their names. Those that
/// run are removed from it; those that cannot be started are told, and stay. A
/// directory that is not there has none.
pub(crate) fn bring_back(home: &Home, from: &Path, home_flag: Option<&Path>) -> Result<ExitCode> {
    if !from.exists() {
        return Ok(ExitCode::SUCCESS);
    }
    let held = Held::open(&std::path::absolute(from)?)?;
    let mut code = ExitCode::SUCCESS;
    for name in held.names()? {
        let back = one(home, &held, &name, home_flag).with_context(|| format!("'{name}'"));
        match back {
            Ok(()) => print(&format!("{name}\n"))?,
            Err(error) => {
                eprintln!("{}", describe(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn one(home: &Home, held: &Held, name: &str, home_flag: Option<&Path>) -> Result<()> {
    let path = held.note(name);
    let note = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let note: Note =
        serde_json::from_slice(&note).with_context(|| format!("{} is damaged", path.display()))?;
    let parsed: VmName = name.parse().map_err(anyhow::Error::msg)?;
    // On the node that saved it, the VM that has ended has its name.
    if let Ok(vm) = home.existing(&parsed)
        && let Status::Ended(_) = vm.status()?
    {
        let _lock = vm.lock()?;
        vm.remove()?;
    }
    let restore = Restore {
        file: &held.snapshot(name),
        name: Some(parsed.clone()),
        changed_disks: false,
        // Its file goes then.
        eager: true,
        opening: Default::default(),
        user: note.user.as_deref(),
        over: VmConfig::default(),
    };
    restore.start(home, home_flag)?;
    if note.paused {
        home.vm(&parsed).client()?.act(Action::Pause)?;
    }
    held.remove(name)
}
