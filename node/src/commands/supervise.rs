//! `blanket supervise`, which `blanket run` leaves behind: it starts one
//! monitor, waits for its end, notes how it ended and tidies up. The monitor
//! does not need it to live on.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::home::Home;
use crate::name::VmName;
use crate::ports;
use crate::process::ProcessId;
use crate::vm::Exit;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The claimed VM.
    name: VmName,
    /// The monitor's program.
    #[arg(long)]
    monitor: PathBuf,
    /// The monitor's arguments.
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub(crate) fn supervise(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    // Out of the terminal's session: its Ctrl-C and hang-up are not for VMs.
    rustix::process::setsid().context("cannot leave the terminal's session")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(vm.monitor_log())
        .with_context(|| format!("cannot write {}", vm.monitor_log().display()))?;
    let mut monitor = Command::new(&args.monitor)
        .args(&args.arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", args.monitor.display()))?;
    let recorded = ProcessId::of(monitor.id())
        .context("cannot identify the monitor")
        .and_then(|id| vm.write_json(&vm.record(), &id));
    if let Err(error) = recorded {
        // Nobody could find it: better none than one unseen.
        monitor.kill()?;
        monitor.wait()?;
        return Err(error);
    }
    let status = monitor.wait().context("cannot wait for the monitor")?;
    ports::unplug_all(home, &vm);
    vm.write_json(&vm.exit(), &Exit::read(status, &vm.monitor_log()))?;
    vm.remove_run()?;
    Ok(ExitCode::SUCCESS)
}
