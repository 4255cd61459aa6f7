//! The front end of vhost-user (QEMU's `docs/interop/vhost-user.rst`): an
//! interface whose rings another process serves, the *backend*, which maps
//! their memory.
//!
//! An [`Opened`] connection is made before the monitor gives up its
//! privileges, and tells which features there are. Then a thread of its own
//! keeps it ([`VhostUser`]): it tells the backend of the rings, and connects
//! again when the backend has gone: at once, and then less and less often, down
//! to once a second, for as long as it takes. What a backend has taken from the
//! rings and not handed back, it may keep in memory that the front end hands to
//! its successor. Nobody else ever waits for
//! a backend, but for the one who stops it, and he not for long.
//!
//! The backend is an adversary. Its answers have a length and a time-out; what
//! it writes into rings whose driver is the monitor is checked there
//! ([`crate::net`]). What it writes into the guest's own memory is between the
//! two of them.

mod keeper;
mod session;
mod watchdog;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::thread::JoinHandle;

use blanket_memory::GuestRam as Memory;
use blanket_memory::shared_log::SharedLog;
use rustix::event::EventfdFlags;
use vm_memory::GuestAddress;

use crate::worker::{self, ThreadSetup};
pub(crate) use keeper::Command;
use keeper::Keeper;
use session::{PATIENCE, Session};
pub(crate) use session::{Ring, Setup};
use watchdog::Watchdog;

/// System calls of the threads that keep a connection, besides `socket`, of
/// which they need Unix sockets only.
pub const SYSCALLS: &[libc::c_long] = &[
    libc::SYS_connect,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    // Memory for rings of the monitor's own.
    libc::SYS_ftruncate,
    libc::SYS_memfd_create,
    libc::SYS_sysinfo,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
];

/// What goes wrong with a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens, or not for this user.
    #[error(
        "cannot connect to the vhost-user backend {}: {source}; start the backend first, and let \
         the monitor's user (--user) write to its socket", path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It broke the protocol, or did not answer in time.
    #[error("the vhost-user backend does not answer as it should: {0}")]
    Protocol(#[from] vhost::Error),
    /// It lacks what every backend has had for years.
    #[error("the vhost-user backend has no {0}; use a newer one")]
    Old(&'static str),
    /// It has fewer queues.
    #[error("the vhost-user backend has {most} pairs of queues, not {pairs}; ask for fewer")]
    Pairs {
        /// Asked for.
        pairs: u16,
        /// What it has.
        most: u64,
    },
    /// It lacks features that are in use.
    #[error(
        "the vhost-user backend lacks features that are in use: {0:#x}; use one like the first"
    )]
    Features(u64),
    /// It says that it stopped where no ring has a place.
    #[error("the vhost-user backend stopped at entry {0}, which no ring has")]
    Base(u32),
    /// Memory that other processes cannot map.
    #[error("the memory at {:#x} cannot be shared with a vhost-user backend; use --shared-memory", .0.0)]
    Private(GuestAddress),
    /// The rings cannot be described.
    #[error("the rings for the vhost-user backend: {0}")]
    Rings(io::Error),
    /// Threads or descriptors cannot be had.
    #[error("no resources for the vhost-user backend: {0}")]
    Resource(io::Error),
}

/// The rings that a backend serves: what it has to be told each time that it
/// begins.
pub(crate) trait Rings: Send {
    /// The rings, for a backend that begins.
    ///
    /// # Errors
    /// There are none now: the link stays down.
    fn begin(&mut self) -> io::Result<Setup>;

    /// The backend serves the rings from now on, or has gone.
    fn link(&mut self, up: bool);
}

/// A connection to a backend that has been made and not put to use.
pub struct Opened {
    path: PathBuf,
    pairs: u16,
    session: Session,
    handle: Handle,
    commands: Receiver<Command>,
}

impl Opened {
    /// Connects to the backend that listens at `path`, for `pairs` pairs of
    /// queues. No thread is left behind.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn connect(path: &Path, pairs: u16) -> Result<Self, Error> {
        let watchdog = Watchdog::spawn(Box::new(|| Ok(()))).map_err(Error::Resource)?;
        let session = Session::open(path, pairs, &watchdog)?;
        let (commands, queue) = std::sync::mpsc::channel();
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = rustix::event::eventfd(0, flags).map_err(io::Error::from);
        let wake = Arc::new(wake.map_err(Error::Resource)?);
        Ok(Self {
            path: path.to_owned(),
            pairs,
            session,
            handle: Handle { commands, wake },
            commands: queue,
        })
    }

    /// What has the backend note what it writes; nothing if it cannot.
    #[must_use]
    pub fn logger(&self) -> Option<Logger> {
        self.session.logs.then(|| Logger(self.handle.clone()))
    }

    /// The backend's socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Starts the threads that keep the connection. `setup` confines each.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn keep(self, setup: impl Fn() -> ThreadSetup) -> io::Result<VhostUser> {
        let state = Arc::new(State::default());
        let features = self.session.features;
        let wake = Arc::clone(&self.handle.wake);
        let watchdog = Watchdog::spawn(setup())?;
        let keeper = Keeper::new(
            (self.path.clone(), self.pairs),
            self.session,
            (self.commands, wake),
            watchdog,
            Arc::clone(&state),
        );
        let thread = worker::spawn("vhost-user", setup(), move || keeper.run())?;
        Ok(VhostUser {
            path: self.path,
            pairs: self.pairs,
            features,
            handle: self.handle,
            state,
            thread: Some(thread),
        })
    }
}

/// What a connection's thread lets others see.
#[derive(Debug, Default)]
struct State {
    connected: AtomicBool,
    /// How often there was a connection.
    connections: AtomicU64,
}

/// Asks a connection's thread for something.
#[derive(Clone)]
pub(crate) struct Handle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    fn ask(&self, command: Command) {
        // Without the thread there is no backend, and nothing to ask for.
        if self.commands.send(command).is_ok()
            && let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes())
        {
            tracing::error!(%error, "the thread of a vhost-user backend cannot be woken");
        }
    }

    /// For tests that look at what is asked for.
    #[cfg(test)]
    pub(crate) fn without_thread() -> (Self, std::sync::mpsc::Receiver<Command>) {
        let (commands, asked) = std::sync::mpsc::channel();
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let wake = Arc::new(wake);
        (Self { commands, wake }, asked)
    }

    /// Gives the backend up, which breaks the rules: whoever listens at its
    /// socket next gets another chance.
    pub(crate) fn give_up(&self) {
        self.ask(Command::GiveUp);
    }
}

/// Has a backend note what it writes to guest memory: for a guest that is copied
/// while it runs.
#[derive(Clone)]
pub struct Logger(Handle);

impl Logger {
    /// Begins, for memory below `end`.
    ///
    /// # Errors
    /// The backend cannot, and is given up; or it is not there.
    pub fn start(&self, end: u64) -> Result<Arc<SharedLog>, Error> {
        self.ask(Some(end))?.ok_or(Error::Old("log"))
    }

    /// Ends it.
    pub fn stop(&self) {
        if let Err(error) = self.ask(None) {
            tracing::warn!(%error, "a vhost-user backend goes on to note what it writes");
        }
    }

    fn ask(&self, end: Option<u64>) -> Result<Option<Arc<SharedLog>>, Error> {
        let (reply, answer) = sync_channel(1);
        self.0.ask(Command::Log(end, reply));
        let silent = |_| Error::Resource(io::ErrorKind::TimedOut.into());
        answer.recv_timeout(4 * PATIENCE).map_err(silent)?
    }
}

/// A backend and the thread that keeps the connection to it.
pub struct VhostUser {
    path: PathBuf,
    pairs: u16,
    features: u64,
    handle: Handle,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl VhostUser {
    /// The backend's socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Pairs of queues that it serves.
    pub(crate) fn pairs(&self) -> u16 {
        self.pairs
    }

    /// The features that the backend offered at first.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// For those who find the backend at fault.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Has the backend serve `rings` whenever there is one, until
    /// [`VhostUser::stop`].
    pub(crate) fn start(&self, rings: Box<dyn Rings>) {
        self.handle.ask(Command::Start(rings));
    }

    /// Uses the first `pairs` pairs of queues only.
    pub(crate) fn enable(&self, pairs: u16) {
        self.handle.ask(Command::Enable(pairs));
    }

    /// Stops the backend. Where each ring stopped, by the backend's account;
    /// `None` if there is no backend (any more), as the one that does not
    /// answer is given up.
    ///
    /// # Errors
    /// The thread is gone.
    pub(crate) fn stop(&self) -> io::Result<Option<Vec<u16>>> {
        let (reply, answer) = sync_channel(1);
        self.handle.ask(Command::Stop(reply));
        // The thread may have to wait for an answer before it comes to this.
        answer
            .recv_timeout(4 * PATIENCE)
            .map_err(|_| io::Error::other("the vhost-user backend cannot be stopped"))
    }

    /// Its counters, as (name, value).
    pub(crate) fn metrics(&self) -> [(&'static str, u64); 2] {
        let connected = self.state.connected.load(Ordering::Relaxed);
        let connections = self.state.connections.load(Ordering::Relaxed);
        [
            ("vhost_user_connected", connected.into()),
            ("vhost_user_connections", connections),
        ]
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.handle.ask(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
