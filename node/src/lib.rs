//! The programs `blanket`, the command line, and `blanketd`, the daemon of each
//! node. What is public besides is what nodes read that others have sent.

pub mod cluster;
mod commands;
mod daemon;
mod evacuate;
mod failure;
mod home;
mod machine;
mod name;
mod ports;
mod process;
mod switch;
mod table;
mod terminal;
mod up;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{
    ca, clone, console, doctor, evacuate as evacuation, info, life, logs, migrate, net,
    node as nodes, provider, ps, replicate, restore, run, set, snapshot, stop, store, supervise,
    up as node, uplink,
};

/// Virtual machines on this node.
#[derive(Parser)]
#[command(
    name = "blanket",
    version,
    after_help = "`blanket doctor` tells what this machine can do, and what to do about the rest."
)]
struct Cli {
    /// Keep VMs in this directory instead of the system's or user's own.
    #[arg(long, global = true, value_name = "DIR", env = "BLANKET_HOME")]
    home: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a node of this machine: what Blanket needs of it, now and at each boot.
    Up(node::Args),
    /// Undo what `blanket up` has done.
    Down(node::DownArgs),
    /// Start a new VM.
    Run(Box<run::Args>),
    /// List VMs.
    Ps(ps::Args),
    /// Attach this terminal to a VM's serial port. Ctrl-] detaches.
    Console(console::Args),
    /// Shut VMs down: power button, then power off, then kill.
    Stop(stop::Args),
    /// Remove VMs that are stopped, with their logs (never their disks).
    Rm(stop::RmArgs),
    /// Show all about a VM.
    Info(info::Args),
    /// Show what a VM wrote to its serial port.
    Logs(logs::Args),
    /// Ask guests to use less memory or fewer vCPUs, or all again (pv machines).
    Set(set::Args),
    /// Stop VMs' vCPUs where they are.
    Pause(life::Args),
    /// Have guests suspend themselves (pv machines).
    Suspend(life::SuspendArgs),
    /// Let paused and suspended VMs run on.
    Resume(life::Args),
    /// Save a VM to a file: its memory and all else but its disks.
    Snapshot(snapshot::Args),
    /// Start a VM that goes on where a snapshot was made.
    Restore(Box<restore::Args>),
    /// Start VMs that go on where a VM or snapshot is, with disks and addresses of their own.
    Clone(clone::Args),
    /// Move a running VM to another node, or to a fresh monitor here, without its guest taking
    /// notice.
    Migrate(Box<migrate::Args>),
    /// Keep a replica of a running VM's disks on another node up to date.
    Replicate(replicate::Args),
    /// Start a VM from its replica on this node, at its last point.
    Promote(Box<replicate::PromoteArgs>),
    /// List the replicas on this node.
    Replicas(replicate::ListArgs),
    /// Save all guests to a directory and end them, now or when the provider is about to take this
    /// machine away. `blanket restore --evacuated` brings them back.
    Evacuate(evacuation::Args),
    /// Start VMs again from their kernels, as the reset button does.
    Reset(life::Args),
    /// Press a SysRq key of a guest's kernel (pv machines).
    Sysrq(life::SysRqArgs),
    /// Tell what this machine can do.
    Doctor(doctor::Args),
    /// Tell which ways to other nodes there are, and what each carries.
    Uplink(uplink::Args),
    /// Tell which volumes there are, what they can do, and how each is served.
    Store(store::Args),
    /// Tell who provides this machine, and what they say about it.
    Provider(provider::Args),
    /// Networks that span nodes, and the ports of this node's switch.
    #[command(subcommand)]
    Net(Box<net::Args>),
    /// The nodes of the cluster that this one is in.
    #[command(subcommand)]
    Node(nodes::Args),
    /// The CA of a cluster of nodes.
    #[command(subcommand)]
    Ca(ca::Args),
    #[command(hide = true)]
    Supervise(supervise::Args),
    #[command(hide = true)]
    Receive(migrate::receive::Args),
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    use blanket_vmm::api::types::Action;
    // These need no home.
    match &cli.command {
        Command::Doctor(args) => return doctor::doctor(args),
        Command::Provider(args) => return provider::provider(args),
        _ => {}
    }
    let home = home::Home::locate(cli.home.as_deref())?;
    match cli.command {
        Command::Up(args) => node::up(&home, &args),
        Command::Down(args) => node::down(&home, &args),
        Command::Evacuate(args) => evacuation::evacuate(&home, &args),
        Command::Run(args) => run::run(&home, *args, cli.home.as_deref()),
        Command::Ps(args) => ps::ps(&home, &args),
        Command::Console(args) => console::console(&home, &args),
        Command::Stop(args) => stop::stop(&home, &args),
        Command::Rm(args) => stop::rm(&home, &args),
        Command::Info(args) => info::info(&home, &args),
        Command::Logs(args) => logs::logs(&home, &args),
        Command::Set(args) => set::set(&home, &args),
        Command::Pause(args) => life::act(&home, &args, Action::Pause),
        Command::Suspend(args) => life::suspend(&home, &args),
        Command::Resume(args) => life::act(&home, &args, Action::Resume),
        Command::Sysrq(args) => life::sysrq(&home, &args),
        Command::Snapshot(args) => snapshot::snapshot(&home, &args),
        Command::Restore(args) => restore::restore(&home, *args, cli.home.as_deref()),
        Command::Clone(args) => clone::clone(&home, &args, cli.home.as_deref()),
        Command::Migrate(args) => migrate::migrate(&home, *args, cli.home.as_deref()),
        Command::Replicate(args) => replicate::replicate(&home, &args),
        Command::Promote(args) => replicate::promote(&home, *args, cli.home.as_deref()),
        Command::Replicas(args) => replicate::replicas(&home, &args),
        Command::Reset(args) => life::act(&home, &args, Action::Reset),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Uplink(args) => uplink::uplink(&home, &args),
        Command::Provider(args) => provider::provider(&args),
        Command::Store(args) => store::store(&home, &args),
        Command::Net(args) => net::net(&home, &args),
        Command::Node(args) => nodes::node(&home, &args),
        Command::Ca(args) => ca::ca(&home, &args),
        Command::Supervise(args) => supervise::supervise(&home, &args),
        Command::Receive(args) => migrate::receive::receive(&home, &args),
    }
}

/// The program `blanket`.
#[must_use]
pub fn blanket() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", failure::describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// The program `blanketd`.
#[must_use]
pub fn blanketd() -> ExitCode {
    match daemon::run(&daemon::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = failure::describe(&error);
            eprintln!("blanketd: {}", text.trim_start_matches("blanket: "));
            ExitCode::FAILURE
        }
    }
}

/// Whether our output's reader left, as `head` does: not an error of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        daemon::Args::command().debug_assert();
    }
}
