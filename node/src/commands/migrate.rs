//! `blanket migrate`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_migration::{Options, Phase, Status};
use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::client::Client;
use blanket_vmm::config::{ByteSize, VmConfig};
use blanket_vmm::migrate::Request;
use indicatif::{ProgressBar, ProgressStyle};

use super::restore::without_own_places;
use super::run::{Start, settle};
use super::{print, print_json};
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// How often one looks how far it is.
const LOOK: Duration = Duration::from_millis(20);
/// How long a monitor may take to end when it has nothing to do any more.
const END: Duration = Duration::from_secs(10);
/// How long a destination asks a source that is dead whether it may run the
/// guest, before it can be told.
const INQUIRY: Duration = Duration::from_secs(40);

#[derive(clap::Args)]
#[command(
    after_help = "The VM runs on meanwhile. Its disks and taps are handed over to the new monitor when \
    it stands still, for milliseconds. Ctrl-C cancels the migration: the VM stays where it is."
)]
pub(crate) struct Args {
    /// The VM.
    name: VmName,

    /// What the VM is called in its new monitor.
    #[arg(long = "as", value_name = "NAME")]
    new: VmName,

    /// Milliseconds that it may stand still.
    #[arg(long, value_name = "MS", default_value_t = Options::default().downtime_ms)]
    downtime: u64,

    /// Most bytes per second [default: no limit].
    #[arg(long, value_name = "BYTES")]
    bandwidth: Option<ByteSize>,

    /// Connections that carry memory, 1 to 16 [default: one per processor].
    #[arg(long, value_name = "N")]
    streams: Option<u32>,

    /// Compare all memory at both ends while the VM stands still: for tests.
    #[arg(long, hide = true)]
    verify: bool,

    /// Print the report as JSON.
    #[arg(long)]
    json: bool,

    /// User that the monitor becomes when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,

    #[command(flatten)]
    vm: VmConfig,
}

pub(crate) fn migrate(home: &Home, args: Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let source = home.existing(&args.name)?;
    let request = Request {
        options: Options {
            streams: args.streams.unwrap_or(0),
            downtime_ms: args.downtime,
            bandwidth: args.bandwidth.map_or(0, |bytes| bytes.0),
            verify: args.verify,
            ..Options::default()
        },
        hand_over: true,
    };
    let own = source.live_client()?.migrate(&request)?;
    let start = || {
        let mut config = own.clone();
        let console = |port| without_own_places(port, args.name.as_str());
        config.serial = config.serial.map(console);
        config.console = config.console.map(console);
        let config = settle(config.overlaid(args.vm), &home.vm(&args.new))?;
        let start = Start {
            config: &config,
            user: args.user.as_deref(),
            home: home_flag,
            attach: false,
            snapshot: None,
            eager: false,
            prepare: None,
            receive: Some(&source.migration_socket()),
        };
        Ok(start.claim_and_start(home, &args.new)?.0)
    };
    let mut shown = Shown::new(!args.json);
    let status = relocate(&source, start, &mut |status| shown.show(status))?;
    shown.end();
    if args.json {
        print_json(&status)?;
    } else {
        print(&report(&args.new, &status))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Moves a VM that has been asked to leave to the receiver that `start` starts:
/// one whose monitor connects to the VM's migration socket, directly or through
/// whatever carries its bytes. Waits until the VM runs there, and removes what
/// is left of it here. `watch` is told how far it is. The first Ctrl-C cancels it.
///
/// # Errors
/// The VM has stayed where it was; or neither end can run it any more, which
/// the error says.
pub(crate) fn relocate(
    source: &VmDir,
    start: impl FnOnce() -> Result<VmDir>,
    watch: &mut dyn FnMut(&Status),
) -> Result<Status> {
    let client = source.live_client()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let signal = signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))
        .context("cannot watch for Ctrl-C")?;
    let receiver = match start() {
        Ok(receiver) => receiver,
        Err(error) => {
            // What went wrong first is what counts.
            let _ = client.cancel_migration();
            return Err(error);
        }
    };
    let status = follow(&client, &interrupted, watch);
    signal_hook::low_level::unregister(signal);
    match status {
        Ok(status) if status.phase == Phase::Moved => {
            leave(source, &client)?;
            Ok(status)
        }
        Ok(status) => {
            remove(&receiver)?;
            let reason = status.error.unwrap_or_default();
            Err(failure(
                format!("'{}' was not migrated: {reason}", source.name),
                "it is where it was: see blanket ps",
            ))
        }
        Err(error) => take_over(source, &receiver, error),
    }
}

/// Waits until it is decided who has the guest.
fn follow(
    client: &Client,
    interrupted: &AtomicBool,
    watch: &mut dyn FnMut(&Status),
) -> Result<Status> {
    loop {
        let status = if interrupted.swap(false, Ordering::Relaxed) {
            client.cancel_migration()?
        } else {
            client.migration()?
        };
        watch(&status);
        match status.phase {
            Phase::Moved | Phase::Failed => return Ok(status),
            Phase::Handed if status.error.is_some() => {
                return Err(anyhow::anyhow!(status.error.unwrap_or_default()));
            }
            _ => std::thread::sleep(LOOK),
        }
    }
}

/// Removes what is left of a VM whose guest has moved.
fn leave(source: &VmDir, client: &Client) -> Result<()> {
    let process = source.process()?;
    // It ends by itself, too.
    let _ = client.act(Action::Poweroff);
    if let Some((_, process)) = process
        && !process.wait(END)?
    {
        process.kill()?;
        process.wait(END)?;
    }
    remove(source)
}

/// Ends a VM's monitor if need be, and removes what there is of it.
fn remove(vm: &VmDir) -> Result<()> {
    if let Some((_, process)) = vm.process()?
        && !process.wait(Duration::from_secs(5))?
    {
        process.kill()?;
        process.wait(END)?;
    }
    // Its supervisor notes how it ended, and is done then.
    let deadline = Instant::now() + END;
    while !vm.exit().exists() && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    let _lock = vm.lock()?;
    vm.remove()
}

/// The source does not answer. If it is dead, and the receiver was ready, the
/// guest is the receiver's: nobody else can run it.
fn take_over(source: &VmDir, receiver: &VmDir, error: anyhow::Error) -> Result<Status> {
    // A process that dies lets its sockets go before it is gone.
    if let Some((_, process)) = source.process()?
        && !process.wait(END)?
    {
        return Err(error.context(format!(
            "it is not known whether '{}' has been migrated: see blanket ps",
            source.name
        )));
    }
    let client = receiver.client()?;
    let deadline = Instant::now() + INQUIRY;
    while Instant::now() < deadline && receiver.process()?.is_some() {
        match client.info() {
            Ok(info) if info.state == VmState::Running => {
                return Ok(Status {
                    phase: Phase::Moved,
                    ..Status::default()
                });
            }
            // It refuses as long as it still asks the source.
            Ok(info) if info.state == VmState::Paused => drop(client.act(Action::Resume)),
            _ => {}
        }
        std::thread::sleep(LOOK);
    }
    if receiver.process()?.is_some() {
        return Err(error.context(format!(
            "the monitor of '{}' ended while it was migrated, and '{}' does not run it: see blanket ps",
            source.name, receiver.name
        )));
    }
    remove(receiver)?;
    Err(failure(
        format!(
            "the monitor of '{}' ended while it was migrated, before the new one had all of it: {error:#}",
            source.name
        ),
        format!(
            "its guest is gone with it: remove it (blanket rm {}) and start it anew",
            source.name
        ),
    ))
}

/// The progress on the terminal.
struct Shown {
    bar: Option<ProgressBar>,
}

impl Shown {
    fn new(wanted: bool) -> Self {
        // Hidden where the output is no terminal.
        let bar = wanted.then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}");
            ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        Self { bar }
    }

    fn show(&mut self, status: &Status) {
        if let Some(bar) = &self.bar {
            bar.set_message(line(status));
            bar.tick();
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn line(status: &Status) -> String {
    let phase = match status.phase {
        Phase::Waiting => "waiting for the new monitor",
        Phase::Copying => "copying memory",
        Phase::Switching | Phase::Handed => "switching over",
        Phase::Moved => "moved",
        Phase::Failed => "not moved",
    };
    format!(
        "{phase}: round {}, {:.0} MiB sent, {:.0} MiB to go; the guest writes {:.0} MiB/s, it would stand still for {:.1} ms",
        status.rounds.len() + 1,
        mib(status.bytes),
        mib(status.left),
        mib(status.dirty_rate),
        status.expected_downtime_us as f64 / 1000.0,
    )
}

fn report(name: &VmName, status: &Status) -> String {
    let ms = |us: u64| us as f64 / 1000.0;
    let mut text = format!(
        "'{name}' runs: {:.0} MiB in {} rounds and {:.1} ms, of which it stood still {:.1} ms:\n",
        mib(status.bytes),
        status.rounds.len(),
        ms(status.total_us),
        ms(status.downtime_us),
    );
    for step in &status.pause {
        text += &format!("  {:<16}{:>8.2} ms\n", step.step, ms(step.us));
    }
    text
}
