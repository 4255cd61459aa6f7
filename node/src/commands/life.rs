//! `blanket pause`, `suspend`, `resume`, `reset` and `sysrq`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use blanket_vmm::api::types::{Action, VmState};

use super::for_each;
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
}

pub(crate) fn act(home: &Home, args: &Args, action: Action) -> Result<ExitCode> {
    Ok(for_each(home, &args.names, |vm| {
        vm.live_client()?.act(action)?;
        Ok(())
    }))
}

#[derive(clap::Args)]
pub(crate) struct SuspendArgs {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,

    /// Seconds that each guest has to suspend itself.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

pub(crate) fn suspend(home: &Home, args: &SuspendArgs) -> Result<ExitCode> {
    let timeout = Duration::from_secs(args.timeout);
    Ok(for_each(home, &args.names, |vm| suspend_one(vm, timeout)))
}

/// Asks the guest and waits until it is at rest.
pub(super) fn suspend_one(vm: &VmDir, timeout: Duration) -> Result<()> {
    let client = vm.live_client()?;
    client.act(Action::Suspend)?;
    let deadline = Instant::now() + timeout;
    while Instant::now() < deadline {
        if client.info()?.state == VmState::Suspended {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(failure(
        format!(
            "the guest of '{}' did not suspend itself within {} s; it still may",
            vm.name,
            timeout.as_secs()
        ),
        format!(
            "see why: blanket logs {}; or stop it where it is: blanket pause {}",
            vm.name, vm.name
        ),
    ))
}

#[derive(clap::Args)]
pub(crate) struct SysRqArgs {
    /// The VM.
    name: VmName,

    /// The key: a letter or digit, like `t` for all tasks.
    key: char,
}

pub(crate) fn sysrq(home: &Home, args: &SysRqArgs) -> Result<ExitCode> {
    let client = home.existing(&args.name)?.live_client()?;
    client.press_sysrq(args.key)?;
    Ok(ExitCode::SUCCESS)
}
