//! Where a serial port or a console leads on the node: a Unix socket, the
//! monitor's own terminal, a log file, or several of them.
//!
//! A [`CharPort`] has one owner, the handler of the device in front of it,
//! which keeps to this order on each event: [`CharPort::process`] (if the event
//! is the port's), then reading and writing as it likes, then
//! [`CharPort::sync`].
//!
//! Output never blocks. A listener that does not keep up loses the oldest
//! bytes, unless the device looks at [`CharPort::room`] and waits. Input stays
//! with its sender until the device reads it.

mod client;
mod log;
mod outbox;
mod socket;
mod stdio;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

use client::Client;
use log::Log;
pub use outbox::Outbox;
use socket::Listener;
use stdio::Stdio;

/// Bytes that wait for a slow listener at most.
pub const BUFFER: usize = 64 << 10;
/// Bytes of past output that a new client is shown.
pub const SCROLLBACK: usize = 4 << 10;
/// Size in bytes at which a log file is started anew.
pub const LOG_LIMIT: u64 = 16 << 20;

/// How long [`CharPort::halt`] waits for listeners to take the last output.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// System calls of the thread that serves a port (and of the one that halts
/// it, which also restores the terminal and removes the socket).
pub const SYSCALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_write,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_fcntl,
    libc::SYS_ftruncate,
    libc::SYS_ioctl,
    libc::SYS_poll,
    libc::SYS_unlink,
];

/// The only ioctls among [`SYSCALLS`]: non-blocking sockets, terminal modes.
pub const IOCTLS: &[libc::Ioctl] = &[libc::FIONBIO, libc::TCSETS];

/// Events with this or a greater `data` are the port's, not its device's.
const FIRST_TOKEN: u32 = 100;
const LISTENER: u32 = FIRST_TOKEN;
const CLIENT: u32 = FIRST_TOKEN + 1;
const STDIN: u32 = FIRST_TOKEN + 2;
const STDOUT: u32 = FIRST_TOKEN + 3;

/// Where a port should lead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// The process's own standard input and output.
    pub stdio: bool,
    /// A Unix socket to listen on, for this user only; one client at a time.
    pub socket: Option<PathBuf>,
    /// A file that receives all output.
    pub log: Option<PathBuf>,
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path of the socket is too long for the kernel.
    #[error("socket {0}: the path has more than 107 bytes; use a shorter one")]
    PathTooLong(PathBuf),
    /// There is something else at the socket's path.
    #[error("socket {0}: a file is in the way that is no socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// A living process listens there.
    #[error("socket {0} is in use by a running process; stop that one or choose another path")]
    InUse(PathBuf),
    /// The kernel refused the socket.
    #[error("socket {path}: {source}; check that its folder is there and may be written to")]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused the log file.
    #[error("log {path}: {source}; check that its folder is there and may be written to")]
    Log {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard input or output cannot be used.
    #[error("standard input and output: {0}; use a socket instead")]
    Stdio(io::Error),
}

/// What a port counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Bytes from the guest.
    pub output: AtomicU64,
    /// Bytes to the guest.
    pub input: AtomicU64,
    /// Bytes of output that nobody got.
    pub dropped: AtomicU64,
}

impl Metrics {
    /// The counters now, as (name, value).
    #[must_use]
    pub fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.output.load(Ordering::Relaxed)),
            ("input_bytes", self.input.load(Ordering::Relaxed)),
            ("dropped_bytes", self.dropped.load(Ordering::Relaxed)),
        ]
    }

    /// Counts `n` bytes that nobody got.
    pub fn drop_bytes(&self, n: usize) {
        self.dropped.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// What epoll looks for at a descriptor now; `None` if it is not registered.
#[derive(Debug, Default)]
struct Watch(Option<EventSet>);

impl Watch {
    /// Makes epoll look for `wanted` at `fd`.
    fn set(
        &mut self,
        ops: &mut EventOps,
        fd: &impl std::os::fd::AsRawFd,
        token: u32,
        wanted: Option<EventSet>,
    ) -> io::Result<()> {
        if wanted == self.0 {
            return Ok(());
        }
        let events = Events::with_data(fd, token, wanted.unwrap_or(EventSet::empty()));
        match (self.0, wanted) {
            (None, Some(_)) => ops.add(events),
            (Some(_), Some(_)) => ops.modify(events),
            (_, None) => ops.remove(events),
        }
        .map_err(io::Error::other)?;
        self.0 = wanted;
        Ok(())
    }
}

/// The node's side of a character device.
#[derive(Debug)]
pub struct CharPort {
    listener: Option<Listener>,
    client: Option<Client>,
    stdio: Option<Stdio>,
    log: Option<Log>,
    scrollback: Outbox,
    wanted: bool,
    metrics: Arc<Metrics>,
}

impl CharPort {
    /// Opens everything in `spec`. A terminal is in raw mode until the port is
    /// halted or the process exits.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind then.
    pub fn open(spec: &Spec) -> Result<Self, Error> {
        Ok(Self {
            log: spec.log.as_deref().map(Log::open).transpose()?,
            listener: spec.socket.as_deref().map(Listener::open).transpose()?,
            stdio: spec.stdio.then(Stdio::open).transpose()?,
            client: None,
            scrollback: Outbox::new(SCROLLBACK),
            wanted: true,
            metrics: Arc::default(),
        })
    }

    /// The port's counters.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Columns and rows of the terminal, if it is one.
    #[must_use]
    pub fn size(&self) -> Option<(u16, u16)> {
        self.stdio.as_ref().and_then(Stdio::size)
    }

    /// Registers the port's descriptors: part of its owner's `init`.
    pub fn init(&mut self, ops: &mut EventOps) {
        if let Some(listener) = &mut self.listener {
            listener.watch = Watch::default();
        }
        if let Some(client) = &mut self.client {
            client.watch = Watch::default();
        }
        if let Some(stdio) = &mut self.stdio {
            stdio.unwatched();
        }
        // Whoever waits already is there before the guest's first byte.
        self.accept(ops);
        self.sync(ops);
    }

    /// Whether an event is one of the port's.
    #[must_use]
    pub fn owns(events: &Events) -> bool {
        events.data() >= FIRST_TOKEN
    }

    /// Takes note of an event of the port's.
    pub fn process(&mut self, events: &Events, ops: &mut EventOps) {
        let set = events.event_set();
        let gone = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
        match (events.data(), &mut self.client, &mut self.stdio) {
            (LISTENER, _, _) => self.accept(ops),
            (CLIENT, Some(client), _) if gone => client.hang_up(),
            (CLIENT, Some(client), _) => client.flush(),
            (STDIN, _, Some(stdio)) if gone && !set.contains(EventSet::IN) => stdio.end_input(),
            (STDOUT, _, Some(stdio)) => stdio.flush(),
            _ => {}
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.listener else {
            return;
        };
        while let Some(stream) = listener.accept() {
            match &mut self.client {
                Some(client) if !client.is_gone() => socket::refuse(&stream),
                old => {
                    if let Some(old) = old {
                        old.unwatch(ops);
                    }
                    let mut client = Client::new(stream);
                    client.write(&self.scrollback.to_vec());
                    *old = Some(client);
                }
            }
        }
    }

    /// Has epoll look for what matters now: the end of each turn.
    pub fn sync(&mut self, ops: &mut EventOps) {
        if let Some(listener) = &mut self.listener
            && let Err(error) =
                listener
                    .watch
                    .set(ops, &listener.socket, LISTENER, Some(EventSet::IN))
        {
            tracing::error!(%error, "a console socket cannot be watched");
        }
        if let Some(client) = &mut self.client {
            client.sync(ops, self.wanted);
            if client.is_done() {
                client.unwatch(ops);
                self.client = None;
            }
        }
        if let Some(stdio) = &mut self.stdio {
            stdio.sync(ops, self.wanted);
        }
    }

    /// Whether the device can take input. Without, senders wait.
    pub fn want_input(&mut self, wanted: bool) {
        self.wanted = wanted;
    }

    /// Reads what somebody has sent; 0 if there is nothing for now.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut n = self.client.as_mut().map_or(0, |c| c.read(buffer));
        if n == 0 {
            n = self.stdio.as_mut().map_or(0, |s| s.read(buffer));
        }
        self.metrics.input.fetch_add(n as u64, Ordering::Relaxed);
        n
    }

    /// Bytes that [`CharPort::write`] takes without a listener losing any. Once
    /// it is 0, an event of the port's tells that there is room again.
    #[must_use]
    pub fn room(&self) -> usize {
        let client = self.client.as_ref().map_or(BUFFER, Client::room);
        let stdio = self.stdio.as_ref().map_or(BUFFER, Stdio::room);
        client.min(stdio)
    }

    /// Passes output on to everyone who listens.
    pub fn write(&mut self, data: &[u8]) {
        // Counted before anyone can have seen it.
        self.metrics
            .output
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        let mut heard = false;
        let mut dropped = 0;
        if let Some(log) = &mut self.log {
            heard |= log.write(data);
        }
        if let Some(client) = self.client.as_mut().filter(|c| !c.is_gone()) {
            dropped += client.write(data);
            heard = true;
        }
        if let Some(stdio) = &mut self.stdio {
            dropped += stdio.write(data);
            heard = true;
        }
        let forgotten = self.scrollback.push(data);
        if !heard {
            dropped += forgotten;
        }
        self.metrics.drop_bytes(dropped);
    }

    /// Ends the port: listeners get the last output (within a second), the
    /// terminal its old mode, and the socket's path is removed.
    pub fn halt(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        if let Some(mut client) = self.client.take() {
            client.drain(deadline);
        }
        if let Some(mut stdio) = self.stdio.take() {
            stdio.drain(deadline);
        }
        self.listener = None;
        self.log = None;
    }
}

impl Drop for CharPort {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Waits until `fd` can be written to or the deadline has come; false if it
/// has come.
fn wait_writable(fd: &impl std::os::fd::AsRawFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // At most LAST_WORDS: fits.
    let milliseconds = left.as_millis() as libc::c_int;
    // SAFETY: `poll` is one pollfd and outlives the call.
    unsafe { libc::poll(&mut poll, 1, milliseconds) > 0 }
}
