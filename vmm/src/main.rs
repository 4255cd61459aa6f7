//! `blanket-vmm`: one process, one VM.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use blanket_drivers::jail::seccomp::one_arena;
use blanket_migration::{Destination, wire};
use blanket_vmm::api::server;
use blanket_vmm::api::types::Action;
use blanket_vmm::config::VmConfig;
use blanket_vmm::jail::privileges::{self, User};
use blanket_vmm::jail::{Class, seccomp};
use blanket_vmm::log;
use blanket_vmm::machine::{Ahead, Given};
use blanket_vmm::migrate::Offered;
use blanket_vmm::monitor::{Ending, Loading, Monitor, Wishes};
use blanket_vmm::snapshot::pager::WorkingSet;
use blanket_vmm::snapshot::{Opening, Snapshot};
use blanket_vmm::timeline::Timeline;
use clap::Parser;
use tokio::net::UnixListener;
use tokio::sync::mpsc::unbounded_channel;

/// Runs one VM.
///
/// With a kernel (from flags or from a file) the VM starts at once; without
/// one, the process waits for its configuration on the API socket.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Configuration file (TOML); flags prevail over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Unix socket of the API (HTTP/1.1 and JSON).
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// The VM's name, for people.
    #[arg(long, value_name = "NAME", default_value = "vm")]
    id: String,

    /// Go on with the guest of this snapshot. Its configuration is the
    /// snapshot's, unless --config names a file; flags prevail over both.
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,

    /// Read all of the snapshot's memory before the guest goes on.
    #[arg(long, requires = "restore")]
    eager: bool,

    #[command(flatten)]
    opening: Opening,

    /// Unix socket where another monitor comes for this one's guest.
    #[arg(long, value_name = "PATH")]
    migration_socket: Option<PathBuf>,

    /// Receive a running guest from the monitor whose migration socket this is.
    /// Its configuration is that one's, unless --config names a file; flags
    /// prevail over both.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["restore", "no_boot"])]
    receive: Option<PathBuf>,

    /// The disks are on storage that both nodes have: they are the other
    /// monitor's until the guest comes.
    #[arg(long, requires = "receive")]
    shared_disks: bool,

    /// Build the VM but leave its start to the API.
    #[arg(long, requires = "api_socket")]
    no_boot: bool,

    /// What a monitor started by root becomes: UID[:GID] [default: 65534:65534].
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<User>,

    #[command(flatten)]
    vm: VmConfig,
}

fn main() -> ExitCode {
    let timeline = Timeline::start();
    one_arena();
    let arguments = Arguments::parse();
    log::init();
    match run(arguments, timeline) {
        Ok(Ending::PowerOff | Ending::Reboot | Ending::Moved) => ExitCode::SUCCESS,
        Ok(Ending::Failed(message)) => {
            eprintln!("blanket-vmm: {message}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("blanket-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments, timeline: Timeline) -> anyhow::Result<Ending> {
    privileges::no_new_privileges().context("cannot give up privileges")?;
    seccomp::report_refusals()
        .and_then(|()| seccomp::confine(Class::Setup))
        .context("cannot install the system call filter")?;
    // Under that filter, and while all that follows is read and opened.
    let ahead = Ahead::begin().context("cannot start a thread")?;
    let mut snapshot = match &arguments.restore {
        Some(path) => {
            let opened = Snapshot::open_with(path, &arguments.opening.access()?);
            Some(opened.with_context(|| format!("the snapshot {}", path.display()))?)
        }
        None => None,
    };
    let loading = match (&arguments.restore, &snapshot) {
        (Some(path), Some(Snapshot::File(reader))) if !arguments.eager => {
            Loading::Lazy(WorkingSet::open(path, reader))
        }
        _ => Loading::Eager,
    };
    let mut guest = arguments.receive.as_deref().map(meet).transpose()?;
    let theirs = match (&snapshot, &guest) {
        (Some(snapshot), _) => Some(&snapshot.head().config),
        (_, Some(guest)) => Some(&guest.offered.config),
        _ => None,
    };
    let config = match (&arguments.config, theirs) {
        (Some(path), _) => VmConfig::from_file(path)?.overlaid(arguments.vm),
        (None, Some(config)) => config.clone().overlaid(arguments.vm),
        (None, None) => arguments.vm,
    };
    anyhow::ensure!(
        config.kernel.is_some() || arguments.api_socket.is_some(),
        "nothing to run: name a kernel with --kernel FILE, or a socket for the API with --api-socket PATH"
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let (mut monitor, wishes) =
        Monitor::new(arguments.id, arguments.user.unwrap_or_default(), timeline);
    monitor.set_ahead(ahead);
    runtime.block_on(async {
        // Bound first: who connects early waits for its answer, not for a file.
        let listener = arguments.api_socket.as_deref().map(listen).transpose()?;
        let _socket = arguments.api_socket.map(SocketFile);
        let exit = arguments.migration_socket.as_deref().map(listen);
        if let Some(exit) = exit.transpose()? {
            monitor.set_exit(exit.into_std()?);
        }
        let _exit = arguments.migration_socket.map(SocketFile);
        monitor.timeline().mark("API ready");
        if let Some(guest) = guest.take() {
            receive(&mut monitor, config, guest, arguments.shared_disks)?;
        } else if config.kernel.is_some() {
            let given = match &snapshot {
                Some(_) => Given::guest(),
                None => Given::default(),
            };
            monitor.create_with(config, given)?;
            match &mut snapshot {
                Some(snapshot) => {
                    monitor.restore(snapshot, loading)?;
                    if !arguments.no_boot {
                        monitor.act(Action::Resume)?;
                        monitor.timeline().mark("vCPUs resumed");
                    }
                }
                None if arguments.no_boot => {}
                None => monitor.boot()?,
            }
        }
        serve(monitor, wishes, listener).await
    })
}

/// A guest whose source has been met.
struct Guest {
    source: Destination,
    offered: Offered,
    given: Given,
}

fn meet(path: &Path) -> anyhow::Result<Guest> {
    let context = || format!("the migration socket {}", path.display());
    let (source, descriptors) = Destination::meet(path).with_context(context)?;
    let offered: Offered = wire::decode(source.machine()).with_context(context)?;
    let given = offered.given(descriptors).with_context(context)?;
    Ok(Guest {
        source,
        offered,
        given,
    })
}

/// Builds a machine for the guest, whose source hears of it if there is none.
fn receive(
    monitor: &mut Monitor,
    config: VmConfig,
    guest: Guest,
    shared: bool,
) -> anyhow::Result<()> {
    if shared && guest.offered.copies {
        const WHY: &str = "the disks are shared, and not to be copied";
        guest.source.refuse(WHY);
        anyhow::bail!(WHY);
    }
    let given = guest.given.with_shared_disks(shared);
    let given = given.with_late_disks(guest.offered.copies && guest.source.is_lazy());
    match monitor.create_with(config, given) {
        Ok(()) => Ok(monitor.arrive(guest.source, &guest.offered)?),
        Err(error) => {
            guest.source.refuse(&error.to_string());
            Err(error.into())
        }
    }
}

/// Removes the API socket's file at the end. (A monitor that was root may not
/// any more; `blanket` then does.)
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds the API socket, for this user only. A socket that nobody listens on
/// any more is replaced.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!(
            "API socket {}: another process listens on it; stop that one or name another path",
            path.display()
        );
    }
    let context = || format!("API socket {}", path.display());
    if path.exists() {
        std::fs::remove_file(path).with_context(context)?;
    }
    let listener = UnixListener::bind(path).with_context(context)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(context)?;
    Ok(listener)
}

/// Serves requests, the guest's events and signals until the VM ends.
async fn serve(
    monitor: Monitor,
    mut wishes: Wishes,
    listener: Option<UnixListener>,
) -> anyhow::Result<Ending> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let monitor = Arc::new(Mutex::new(monitor));
    let (endings, mut ended) = unbounded_channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = listener.map(|listener| {
        let router = server::router(monitor.clone(), endings.clone());
        tokio::spawn(
            axum::serve(listener, router)
                .with_graceful_shutdown(async {
                    // A dropped sender stops the server as well.
                    let _ = stopped.await;
                })
                .into_future(),
        )
    });
    let lock = || monitor.lock().unwrap_or_else(PoisonError::into_inner);
    let ending = loop {
        tokio::select! {
            Some(event) = wishes.events.recv() => {
                if let Some(ending) = lock().handle(event) {
                    break ending;
                }
            }
            Some(order) = wishes.orders.recv() => {
                if let Some(ending) = lock().carry_out(order) {
                    break ending;
                }
            }
            Some(ending) = ended.recv() => break ending,
            _ = terminate.recv() => {
                if let Some(ending) = lock().terminate() {
                    break ending;
                }
            }
            _ = interrupt.recv() => {
                if let Some(ending) = lock().terminate() {
                    break ending;
                }
            }
        }
    };
    // What has not come of its disks is nowhere once the source is gone.
    while ending != Ending::Moved && lock().awaits_disks() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let _ = stop.send(());
    if let Some(server) = server {
        // Answers on their way go out; a client that does not read them does
        // not keep the process.
        let _ = tokio::time::timeout(Duration::from_millis(500), server).await;
    }
    if ending == Ending::Moved {
        // Disks and taps are another monitor's: nothing may touch them any more,
        // as taking things down would.
        std::process::exit(0);
    }
    Ok(ending)
}
