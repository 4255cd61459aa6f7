//! `blanket console`, and the attaching half of `blanket run --attach`.

use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::machine::{self, Port};
use crate::name::VmName;
use crate::terminal::{End, RawMode, Session};
use crate::vm::Status;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VM.
    name: VmName,

    /// Attach to the paravirtual console hvc0 [default in pv machines].
    #[arg(long, alias = "virtio")]
    hvc: bool,

    /// Attach to the serial port ttyS0 [default in hvm machines].
    #[arg(long, conflicts_with = "hvc")]
    serial: bool,

    /// When the (piped) input has ended: leave after this many seconds
    /// without output [default: stay until the VM ends].
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u64>,
}

pub(crate) fn console(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let Status::Alive { info, .. } = vm.status()? else {
        return Err(vm.not_running());
    };
    let config = info
        .map(|info| info.config)
        .or_else(|| vm.stored_config())
        .unwrap_or_default();
    let port = match (args.hvc, args.serial) {
        (true, _) => Port::hvc(&config),
        (_, true) => Port::serial(&config),
        _ => machine::console(&config),
    };
    let socket = port.socket().ok_or_else(|| {
        failure(
            format!("the {} of '{}' has no socket", port.name, vm.name),
            "start the VM with --serial stdio or --console stdio",
        )
    })?;
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot attach to {}", socket.display()))?;
    attach(&vm, &stream, args.idle.map(Duration::from_secs))
}

/// Attaches to a VM that has just been started, over a connection made before
/// its guest said anything.
pub(super) fn attach_new(vm: &VmDir, console: Option<&UnixStream>) -> Result<ExitCode> {
    match console {
        Some(stream) => attach(vm, stream, None),
        // Its monitor was told to wait; that it is gone already means that
        // somebody else ended it.
        None => Err(vm.not_running()),
    }
}

fn attach(vm: &VmDir, stream: &UnixStream, idle: Option<Duration>) -> Result<ExitCode> {
    let raw = RawMode::enter().context("cannot set up the terminal")?;
    if raw.is_some() {
        eprint!("[attached to {}; Ctrl-] detaches]\r\n", vm.name);
    }
    let session = Session {
        escape: raw.is_some(),
        idle,
    };
    let end = session.run(stream);
    let on_terminal = raw.is_some();
    drop(raw);
    let end = end.with_context(|| format!("the console of '{}'", vm.name))?;
    if on_terminal {
        eprintln!();
        report(vm, end)
    } else {
        Ok(ExitCode::SUCCESS)
    }
}

fn report(vm: &VmDir, end: End) -> Result<ExitCode> {
    let what = match end {
        End::Closed => "the VM closed it",
        End::Detached => "detached",
        End::Silent => "silent",
        End::Signal => "ended by a signal",
    };
    eprintln!("[console of {}: {what}]", vm.name);
    Ok(ExitCode::SUCCESS)
}
