//! `blanket migrate`.

pub(crate) mod folder;
mod forecast;
mod local;
pub(crate) mod receive;
pub(crate) mod remote;
mod report;
mod shared;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_migration::{Compress, MEMORY_LOST, Mode, Options, Phase, Status};
use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::client::Client;
use blanket_vmm::config::{ByteSize, VmConfig};

use super::{print, print_json};
use crate::cluster::names::NodeName;
use crate::cluster::parcel::State;
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::vm::Exit;
use forecast::{Foreseen, forecast};
use report::Report;
pub(crate) use report::Shown;

/// How often one looks how far it is.
const LOOK: Duration = Duration::from_millis(20);
/// How long a monitor may take to end when it has nothing to do any more.
const END: Duration = Duration::from_secs(10);
/// How long a destination asks a source that is dead whether it may run the
/// guest, before it can be told.
const INQUIRY: Duration = Duration::from_secs(40);
/// How long a source may take to hear that all has followed its guest, when the
/// destination has ended.
const SETTLED: Duration = Duration::from_secs(2);
/// How long a destination tries to get at memory that has not followed its guest.
const FOLLOW: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
#[command(
    after_help = "The VM runs on meanwhile, and stands still for milliseconds. Within this node, its disks \
    and taps are handed over. To another node of the cluster, its disks' content is copied, and its \
    kernel; interfaces are made there as they are here, unless --net says otherwise. Ctrl-C cancels \
    the migration: the VM stays where it is."
)]
pub(crate) struct Args {
    /// The VM.
    name: VmName,

    /// The node that it moves to; see blanket node ls. Without it, it moves to a fresh monitor
    /// on this node.
    #[arg(required_unless_present_any = ["new", "dry_run"])]
    node: Option<NodeName>,

    /// What the VM is called in its new monitor [default: the same, on another node].
    #[arg(long = "as", value_name = "NAME")]
    new: Option<VmName>,

    /// When the VM changes hands: once all its memory is there; at once, and its memory follows;
    /// or at once only if it writes memory faster than it can be sent.
    #[arg(long, value_enum, default_value_t)]
    mode: When,

    /// Milliseconds that it may stand still.
    #[arg(long, value_name = "MS", default_value_t = Options::default().downtime_ms)]
    downtime: u64,

    /// Where it would stay because it writes memory faster than that can be sent, slow it down,
    /// step by step, until it does not.
    #[arg(long)]
    auto_converge: bool,

    /// Most bytes per second [default: no limit].
    #[arg(long, value_name = "BYTES")]
    bandwidth: Option<ByteSize>,

    /// Whether memory is compressed: where that is quicker, never, or always.
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    compress: Less,

    /// Most bytes of memory that are remembered as they were sent, so that of pages that are
    /// written again only what has changed is sent [default: 64M].
    #[arg(long, value_name = "BYTES")]
    delta_cache: Option<ByteSize>,

    /// Connections that carry memory, 1 to 16 [default: one per processor].
    #[arg(long, value_name = "N")]
    streams: Option<u32>,

    /// Do not encrypt what goes to the other node: for links that are trusted. Who may receive
    /// it is checked all the same.
    #[arg(long, requires = "node")]
    plain: bool,

    /// Delete the files of the disks here once the VM runs on the other node. (Those that came
    /// with it from a node are deleted anyway, block devices never.)
    #[arg(long, requires = "node")]
    delete_disks: bool,

    /// The disks are files on storage that both nodes have, at the same paths: copy nothing. The
    /// other node's blanketd has to have been started with --shared DIR.
    #[arg(long, requires = "node", conflicts_with_all = ["delete_disks", "discard"])]
    shared_disks: bool,

    /// An image in /var/lib/blanket/bases of the other node with which a disk has much in common:
    /// what is the same there need not be sent. Once for each disk that is written to, in their
    /// order.
    #[arg(long, value_name = "NAME", requires = "node", conflicts_with_all = ["shared_disks", "discard"])]
    base: Vec<String>,

    /// Have the VM change hands before its disks' content, which follows it: what it reads there
    /// is fetched when it needs that, and all else besides. Until all is there, it needs both
    /// nodes: if this one fails, what is missing of its disks gives errors.
    #[arg(long, requires = "node", conflicts_with_all = ["shared_disks", "discard", "dry_run"])]
    lazy_disks: bool,

    /// Only tell what it would be like: how much would be sent, how long it would take, and how
    /// long the VM would stand still. Another node is asked whether it has a place for it.
    #[arg(long)]
    dry_run: bool,

    /// Move nothing, but have the other node remove what it has kept of the VM's disks since a
    /// migration that was cancelled or has failed.
    #[arg(long, requires = "node", conflicts_with = "dry_run")]
    discard: bool,

    /// Compare all memory and disks (but those that follow) at both ends while the VM stands still: for tests.
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

/// See [`Mode`].
#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum When {
    PreCopy,
    PostCopy,
    #[default]
    Hybrid,
}

/// See [`Compress`].
#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Less {
    #[default]
    Auto,
    Off,
    Lz4,
}

impl Args {
    fn options(&self) -> Options {
        Options {
            streams: self.streams.unwrap_or(0),
            downtime_ms: self.downtime,
            mode: match self.mode {
                When::PreCopy => Mode::PreCopy,
                When::PostCopy => Mode::PostCopy,
                When::Hybrid => Mode::Hybrid,
            },
            bandwidth: self.bandwidth.map_or(0, |bytes| bytes.0),
            auto_converge: self.auto_converge,
            compress: match self.compress {
                Less::Auto => Compress::Auto,
                Less::Off => Compress::Off,
                Less::Lz4 => Compress::Lz4,
            },
            delta_cache: match self.delta_cache {
                Some(bytes) => bytes.0,
                None => Options::default().delta_cache,
            },
            verify: self.verify,
            lazy_disks: self.lazy_disks,
            ..Options::default()
        }
    }
}

pub(crate) fn migrate(home: &Home, args: Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let source = home.existing(&args.name)?;
    let json = args.json;
    let mut shown = Shown::new(!json);
    let outcome = match args.node.clone() {
        Some(node) => remote::migrate(home, &source, node, args, &mut shown)?,
        None => local::migrate(home, &source, args, home_flag, &mut shown)?,
    };
    shown.end();
    match outcome {
        Outcome::Moved(report) if json => print_json(&report)?,
        Outcome::Moved(report) => print(&report.text())?,
        Outcome::Foreseen(foreseen) if json => print_json(&foreseen)?,
        Outcome::Foreseen(foreseen) => print(&foreseen.text())?,
        Outcome::Discarded => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// What became of a wish to migrate.
enum Outcome {
    Moved(Box<Report>),
    Foreseen(Foreseen),
    /// Nothing is kept of it any more on the other node.
    Discarded,
}

/// The monitor that is to get a guest, wherever it is.
trait Receiver {
    /// Starts it: it connects to the guest's monitor.
    ///
    /// # Errors
    /// It cannot be started, and nothing is left of it.
    fn start(&mut self) -> Result<()>;

    /// The guest runs there.
    ///
    /// # Errors
    /// It does not, as far as one can tell there.
    fn moved(&mut self) -> Result<()>;

    /// The guest stays where it was: nothing is left.
    ///
    /// # Errors
    /// Something could not be removed.
    fn stayed(&mut self) -> Result<()>;

    /// The guest's monitor is dead. The receiver runs it if it was ready: nobody
    /// else can. If it was not, nothing is left.
    ///
    /// # Errors
    /// It cannot be asked.
    fn take_over(&mut self) -> Result<State>;

    /// Whether its monitor has ended, after the guest ran there; false if that is
    /// not known.
    fn has_ended(&mut self) -> bool;

    /// What the VM is called there, for people.
    fn called(&self) -> String;
}

/// Moves a VM that has been asked to leave to a receiver. Waits until it runs
/// there, and removes what is left of it here. `watch` is told how far it is. The
/// first Ctrl-C cancels it.
///
/// # Errors
/// The VM has stayed where it was; or neither end can run it any more, which
/// the error says.
fn relocate(
    source: &VmDir,
    receiver: &mut dyn Receiver,
    watch: &mut dyn FnMut(&Status),
) -> Result<Status> {
    let client = source.live_client()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let signal = signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))
        .context("cannot watch for Ctrl-C")?;
    if let Err(error) = receiver.start() {
        // What went wrong first is what counts.
        let _ = client.cancel_migration();
        return Err(error);
    }
    let status = follow(&client, receiver, &interrupted, watch);
    signal_hook::low_level::unregister(signal);
    match status {
        Ok(status) if status.phase == Phase::Moved => {
            let there = receiver.moved();
            leave(source, &client)?;
            there.map(|()| status)
        }
        Ok(status) if status.phase == Phase::Following => {
            // It says there why, if it can.
            let _ = receiver.moved();
            if receiver.has_ended() {
                // What is left here is of no use to anybody.
                end_useless(source)?;
            }
            Err(failure(
                format!(
                    "'{}' was handed over, and has not got all that was to follow it: {}",
                    source.name,
                    status.error.unwrap_or_default()
                ),
                format!(
                    "it cannot run here any more (blanket rm {}), its disks here are as it left them; see what became of {} (blanket ps -a)",
                    source.name,
                    receiver.called()
                ),
            ))
        }
        Ok(status) => {
            let removed = receiver.stayed();
            let reason = status.error.unwrap_or_default();
            let kept = match status.disks_sent {
                0 => "",
                _ => "; what has come of its disks is kept there for the next time",
            };
            let stays = failure(
                format!("'{}' was not migrated: {reason}", source.name),
                format!("it is where it was: see blanket ps{kept}"),
            );
            Err(match removed {
                Ok(()) => stays,
                Err(error) => stays.context(format!(
                    "and {} is not removed: {error:#}",
                    receiver.called()
                )),
            })
        }
        Err(error) => take_over(source, receiver, error),
    }
}

/// Waits until it is decided who has the guest.
fn follow(
    client: &Client,
    receiver: &mut dyn Receiver,
    interrupted: &AtomicBool,
    watch: &mut dyn FnMut(&Status),
) -> Result<Status> {
    let mut ended = None;
    loop {
        let status = if interrupted.swap(false, Ordering::Relaxed) {
            client.cancel_migration()?
        } else {
            client.migration()?
        };
        watch(&status);
        match status.phase {
            Phase::Moved | Phase::Failed => return Ok(status),
            Phase::Following if status.error.is_some() => return Ok(status),
            Phase::Following if receiver.has_ended() => {
                // It may have got all of it before.
                let since = *ended.get_or_insert_with(Instant::now);
                if since.elapsed() > SETTLED {
                    let error = format!(
                        "its new monitor has ended while {} MiB were on their way",
                        status.left_behind().unwrap_or_default().div_ceil(1 << 20)
                    );
                    return Ok(Status {
                        error: Some(error),
                        ..status
                    });
                }
                std::thread::sleep(LOOK);
            }
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

/// Ends the monitor of a guest that was handed over, and is gone.
fn end_useless(source: &VmDir) -> Result<()> {
    if let Some((_, process)) = source.process()? {
        process.kill()?;
        process.wait(END)?;
    }
    noted_end(source);
    Ok(())
}

/// Ends a VM's monitor if need be, and removes what there is of it.
fn remove(vm: &VmDir) -> Result<()> {
    if let Some((_, process)) = vm.process()?
        && !process.wait(Duration::from_secs(5))?
    {
        process.kill()?;
        process.wait(END)?;
    }
    noted_end(vm);
    let _lock = vm.lock()?;
    vm.remove()
}

/// Waits until the supervisor of a monitor that has ended has noted how, and is
/// done.
fn noted_end(vm: &VmDir) {
    let deadline = Instant::now() + END;
    while !vm.exit().exists() && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
}

/// The source does not answer. If it is dead, and the receiver was ready, the
/// guest is the receiver's.
fn take_over(source: &VmDir, receiver: &mut dyn Receiver, error: anyhow::Error) -> Result<Status> {
    // A process that dies lets its sockets go before it is gone.
    if let Some((_, process)) = source.process()?
        && !process.wait(END)?
    {
        return Err(error.context(format!(
            "it is not known whether '{}' has been migrated: see blanket ps; if {} waits there, paused, and the monitor here says that it has handed the guest over, resume it there",
            source.name,
            receiver.called()
        )));
    }
    match receiver.take_over()? {
        State::Runs => Ok(Status {
            phase: Phase::Moved,
            ..Status::default()
        }),
        State::Undecided => Err(error.context(format!(
            "the monitor of '{}' ended while it was migrated, and {} does not run it: see blanket ps",
            source.name,
            receiver.called()
        ))),
        State::Lost => Err(failure(
            format!(
                "the monitor of '{}' ended when the VM was {} already, and not all its memory: {error:#}",
                source.name,
                receiver.called()
            ),
            format!(
                "its memory is lost, its disks are there, as it left them: start it there anew (blanket ps -a says more), and remove it here (blanket rm {})",
                source.name
            ),
        )),
        State::Ended => Err(failure(
            format!(
                "'{}' was migrated and ran as {}, and has ended since: {error:#}",
                source.name,
                receiver.called()
            ),
            format!("remove it here (blanket rm {})", source.name),
        )),
        State::Gone => Err(failure(
            format!(
                "the monitor of '{}' ended while it was migrated, before the new one had all of it: {error:#}",
                source.name
            ),
            format!(
                "its guest is gone with it: remove it (blanket rm {}) and start it anew",
                source.name
            ),
        )),
    }
}

/// Has a receiver on this node run the guest of a source that is dead, if it was
/// ready.
fn resume_orphan(receiver: &VmDir) -> Result<State> {
    let client = receiver.client()?;
    let begin = Instant::now();
    let mut patience = INQUIRY;
    let mut ran = false;
    while begin.elapsed() < patience && receiver.process()?.is_some() {
        match client.info() {
            Ok(info) if has_arrived(&client, info.state) => return Ok(State::Runs),
            Ok(info) if info.state == VmState::Running => {
                ran = true;
                patience = FOLLOW;
            }
            // It had been paused, and stays so: nobody else has it.
            Ok(info) if info.state == VmState::Paused && is_at_rest(&client) => {
                return Ok(State::Runs);
            }
            Ok(info) if info.state == VmState::Paused && is_followed(&client) => {
                patience = FOLLOW;
            }
            // It refuses as long as it still asks the source.
            Ok(info) if info.state == VmState::Paused => drop(client.act(Action::Resume)),
            _ => {}
        }
        std::thread::sleep(LOOK);
    }
    if receiver.process()?.is_some() {
        return Ok(State::Undecided);
    }
    has_ended(receiver, ran)
}

/// Whether a guest is a receiver's, with all its memory: it runs, or was paused and
/// is so there. One that is paused otherwise does not know yet.
fn has_arrived(client: &Client, state: VmState) -> bool {
    match state {
        VmState::Running => !is_followed(client),
        VmState::Paused => client
            .migration()
            .is_ok_and(|status| status.paused && status.phase == Phase::Moved),
        _ => false,
    }
}

/// Whether a receiver has all of a guest that had been paused, and has given up
/// asking whether it is its own.
fn is_at_rest(client: &Client) -> bool {
    let status = client.migration();
    status.is_ok_and(|status| status.paused && status.phase == Phase::Failed)
}

/// Whether memory still follows the guest. A monitor that does not answer may
/// wait for some.
fn is_followed(client: &Client) -> bool {
    let status = client.migration();
    status.map_or(true, |status| status.phase == Phase::Following)
}

/// What it means that a receiver on this node has ended, whose guest `ran` or
/// not. Nothing is left of one whose guest never ran.
fn has_ended(receiver: &VmDir, ran: bool) -> Result<State> {
    noted_end(receiver);
    let exit = receiver.read::<Exit>(&receiver.exit())?;
    if exit.is_some_and(|exit| exit.reason.contains(MEMORY_LOST)) {
        return Ok(State::Lost);
    }
    if ran {
        return Ok(State::Ended);
    }
    remove(receiver)?;
    Ok(State::Gone)
}
