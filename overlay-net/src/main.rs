//! `blanket-switch`: the data plane of a node.

use std::fs::DirBuilder;
use std::io::{ErrorKind, IsTerminal};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use blanket_drivers::jail::seccomp::one_arena;
use blanket_drivers::uplink::{self, Kind, Spec};
use blanket_overlay::api::server;
use blanket_overlay::control::Control;
use blanket_overlay::jail::{self, Class, Seccomp, Wishes};
use blanket_overlay::key;
use blanket_overlay::switch::worker::Worker;
use blanket_overlay::switch::{Remote, Switch, node_of};
use blanket_overlay::tunnel::{self, PrivateKey, public};
use clap::Parser;
use tokio::net::{UnixListener, UnixStream};

/// The switch of a node: guests are its ports, tunnels join it to the switches
/// of other nodes.
///
/// `blanket net` tells it what to do. What it was told it keeps, and is so again
/// when it is started again.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Unix socket of the API (HTTP/1.1 and JSON).
    #[arg(long, value_name = "PATH", default_value = "/run/blanket-switch.sock")]
    socket: PathBuf,

    /// Keep what it is told, and its key, in this directory.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/blanket/switch")]
    state: PathBuf,

    /// Talk to the switches of other nodes at this address of this machine, by UDP.
    #[arg(long, value_name = "ADDRESS:PORT", requires = "interface")]
    listen: Option<SocketAddr>,

    /// The interface that has the address.
    #[arg(long, value_name = "NAME", requires = "listen")]
    interface: Option<String>,

    /// How datagrams reach the interface: udp, af_packet, af_xdp or tap.
    #[arg(long, value_name = "KIND", default_value = "udp", value_parser = kind)]
    uplink: Kind,

    /// Keep looking for frames for so many microseconds after the last one before sleeping: always
    /// at ports where that costs no system call, at others while it pays.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    spin: u64,

    /// Whether its threads have system call filters: with `on`, a call that is not foreseen ends
    /// the switch; with `log`, the kernel logs it.
    #[arg(
        long,
        value_name = "on|log|off",
        default_value = "on",
        hide_possible_values = true
    )]
    seccomp: Seccomp,

    /// Let it make sockets and read keys beneath this directory too, besides /etc (keys), /run,
    /// /tmp, --state and the directory of --socket. May be given several times.
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
}

fn kind(text: &str) -> Result<Kind, String> {
    let kinds = [Kind::Udp, Kind::AfPacket, Kind::AfXdp, Kind::Tap];
    let found = kinds.into_iter().find(|kind| kind.name() == text);
    found.ok_or_else(|| format!("one of {}", kinds.map(Kind::name).join(", ")))
}

fn main() -> ExitCode {
    one_arena();
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blanket-switch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut folder = DirBuilder::new();
    folder.recursive(true).mode(0o700);
    for path in [Some(arguments.state.as_path()), arguments.socket.parent()]
        .into_iter()
        .flatten()
    {
        let made = folder.create(path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_start(|| {
            if let Err(error) = jail::enter(Class::Resolver) {
                eprintln!("blanket-switch: no filter for a thread: {error}");
                std::process::abort();
            }
        })
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(serve(arguments))
}

async fn serve(arguments: &Arguments) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = listen(&arguments.socket).await?;
    let spin = Duration::from_micros(arguments.spin);
    let private = key::load(&arguments.state.join("key"))?;
    let identity = node_of(&public(&private));
    let mut switch = Switch::new(Instant::now(), remote(arguments, private)?);
    confine(arguments)?;
    switch.set_identity(identity.0);
    let (handle, thread) = Worker::start(switch, spin)?;
    let control = Control::restore(handle.clone(), arguments.state.join("switch.json")).await?;
    let router = server::router(control);
    tracing::info!("ready");
    let served = tokio::select! {
        served = axum::serve(listener, router) => served.context("cannot serve the API"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // Requests and controllers may still have handles.
    handle.stop();
    let ended = thread.join();
    if std::fs::remove_file(&arguments.socket).is_err() {
        tracing::debug!("{} was removed already", arguments.socket.display());
    }
    match ended {
        Ok(ended) => ended.context("the worker")?,
        Err(_) => bail!("the worker has panicked"),
    }
    served
}

/// Gives up what is not needed any more.
fn confine(arguments: &Arguments) -> Result<()> {
    if !tunnel::prepare() {
        bail!("the kernel has no random numbers");
    }
    let run = arguments
        .socket
        .parent()
        .filter(|run| *run != Path::new(""));
    let chosen = jail::confine(&Wishes {
        seccomp: arguments.seccomp,
        state: &arguments.state,
        run: run.unwrap_or(Path::new(".")),
        allow: &arguments.allow,
    })?;
    if chosen.landlock.is_none() {
        tracing::info!("this kernel has no Landlock: the file system is its user's");
    }
    Ok(())
}

/// The way to other nodes, if there is to be one.
fn remote(arguments: &Arguments, private: PrivateKey) -> Result<Option<Remote>> {
    let Some((local, interface)) = arguments.listen.zip(arguments.interface.as_deref()) else {
        return Ok(None);
    };
    let uplink = uplink::open(arguments.uplink, &Spec::new(interface, local))?;
    let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let epoch = epoch.context("this machine's clock is before 1970: set it")?;
    Ok(Some(Remote::new(private, epoch, vec![uplink])))
}

/// Listens on `path`, for its owner only, unless another switch does.
async fn listen(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!(
            "another switch listens on {}: stop it first, or name another --socket",
            path.display()
        );
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", path.display()));
        }
        _ => (),
    }
    // What is made from here on is for its owner only, sockets among it.
    // SAFETY: umask only changes what new files are like.
    unsafe { libc::umask(0o077) };
    UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))
}
