//! `blanket stop` and `blanket rm`.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use blanket_migration::Phase;
use blanket_vmm::api::types::{Action, VmState};

use super::for_each;
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::ports;
use crate::process::Process;
use crate::vm::Status;

/// How long a monitor may take to power its VM off: disks are flushed.
const POWEROFF: Duration = Duration::from_secs(10);

/// How long the supervisor may take to note the end of its monitor.
const NOTING: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,

    /// Seconds that a guest has to shut itself down.
    #[arg(long, short, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,

    /// Power off at once, without asking the guest.
    #[arg(long, short)]
    force: bool,
}

#[derive(clap::Args)]
pub(crate) struct RmArgs {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,

    /// Power running ones off first.
    #[arg(long, short)]
    force: bool,
}

pub(crate) fn stop(home: &Home, args: &Args) -> Result<ExitCode> {
    // All buttons first, so that the guests shut down side by side.
    if !args.force {
        for name in &args.names {
            if let Ok(vm) = home.existing(name) {
                press_power_button(&vm);
            }
        }
    }
    let grace = Duration::from_secs(if args.force { 0 } else { args.timeout });
    let deadline = Instant::now() + grace;
    Ok(for_each(home, &args.names, |vm| match vm.status()? {
        Status::Alive { process, .. } => {
            is_of_no_use(vm)?;
            has_its_disks(vm)?;
            bring_down(vm, &process, deadline)
        }
        Status::Starting => Err(failure(
            format!("'{}' is being started", vm.name),
            "wait until it runs, then stop it",
        )),
        Status::Ended(_) => Ok(()),
    }))
}

/// Asks the guest to shut down. Whatever fails, stronger means follow.
fn press_power_button(vm: &VmDir) {
    let Ok(Status::Alive {
        info: Some(info), ..
    }) = vm.status()
    else {
        return;
    };
    if let Ok(client) = vm.client() {
        if matches!(info.state, VmState::Paused | VmState::Suspended) {
            let _ = client.act(Action::Resume);
        }
        let _ = client.act(Action::Shutdown);
    }
}

/// Refuses to end a monitor with memory that a guest in another one still needs.
fn is_of_no_use(vm: &VmDir) -> Result<()> {
    let client = vm.client()?.with_timeout(POWEROFF);
    // One that does not answer serves nobody.
    let Ok(status) = client.migration() else {
        return Ok(());
    };
    let handed = matches!(status.phase, Phase::Handed | Phase::Following);
    let is_source = || {
        let info = client.info();
        info.is_ok_and(|info| info.state == VmState::Stopped)
    };
    match status.left_behind() {
        Some(left) if handed && status.error.is_none() && is_source() => Err(failure(
            format!(
                "'{}' runs in another monitor, and {} MiB of what follows it are still on their way there",
                vm.name,
                left.div_ceil(1 << 20)
            ),
            "wait: this monitor ends by itself when all of it is there; or stop the VM there",
        )),
        _ => Ok(()),
    }
}

/// Refuses to end a VM whose disks are still on their way to it.
fn has_its_disks(vm: &VmDir) -> Result<()> {
    let client = vm.client()?.with_timeout(POWEROFF);
    let Ok(status) = client.migration() else {
        return Ok(());
    };
    match status.following_disks {
        Some(following) if status.phase == Phase::Following => Err(failure(
            format!(
                "{} MiB of the disks of '{}' are still on their way from where it was",
                following.left.div_ceil(1 << 20),
                vm.name,
            ),
            "wait until all of it is there; or shut the guest down from inside: its monitor ends when it has its disks",
        )),
        _ => Ok(()),
    }
}

/// Waits for the guest until `deadline`, then powers it off, then kills.
fn bring_down(vm: &VmDir, process: &Process, deadline: Instant) -> Result<()> {
    is_of_no_use(vm)?;
    let progress = |text: &str| {
        if std::io::stderr().is_terminal() {
            eprintln!("{}: {text}", vm.name);
        }
    };
    let grace = deadline.saturating_duration_since(Instant::now());
    if !grace.is_zero() {
        progress("waiting for the guest to shut down");
    }
    if !process.wait(grace)? {
        if grace.is_zero() {
            progress("powering off");
        } else {
            eprintln!(
                "{}: the guest did not shut down within {} s; powering off",
                vm.name,
                grace.as_secs_f32().round()
            );
        }
        // An unresponsive monitor is killed below.
        let asked = vm.client()?.with_timeout(POWEROFF).act(Action::Poweroff);
        if asked.is_err() || !process.wait(POWEROFF)? {
            progress("killing the monitor");
            process.kill()?;
            process.wait(POWEROFF)?;
        }
    }
    // `ps -a` should tell the reason as soon as this command is done.
    let noted = Instant::now() + NOTING;
    while !vm.exit().exists() && Instant::now() < noted {
        std::thread::sleep(Duration::from_millis(5));
    }
    progress("stopped");
    Ok(())
}

pub(crate) fn rm(home: &Home, args: &RmArgs) -> Result<ExitCode> {
    Ok(for_each(home, &args.names, |vm| {
        // Held to the end: nobody starts or removes it meanwhile.
        let _lock = vm.lock()?;
        if let Some((_, process)) = vm.process()? {
            if !args.force {
                return Err(failure(
                    format!("'{}' is running", vm.name),
                    format!(
                        "stop it first: blanket stop {0}, or blanket rm --force {0}",
                        vm.name
                    ),
                ));
            }
            bring_down(vm, &process, Instant::now())?;
        }
        // What is left of them where nothing was there at its end to remove them.
        ports::unplug_all(home, vm);
        vm.remove()
    }))
}
