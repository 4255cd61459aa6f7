//! The backend of vhost-user (QEMU's `docs/interop/vhost-user.rst`): a port
//! that any VMM's network interface can be attached to.
//!
//! ```text
//!   front end --messages--> control thread --changes--> Device <--frames--> worker
//!       '-- guest memory: rings, buffers ------------------'
//! ```
//!
//! A thread of the port's own ([`control`]) waits for connections and answers
//! what front ends ask; it maps their memory and describes their rings. The
//! worker, which owns the port, has the [`Device`]: the rings that are served.
//! The thread never touches it: it hands the worker what to change, and waits
//! until that is done. So the data path has no lock, and waits for nobody.
//!
//! A frame that comes from a guest is only referred to: its head is copied, its
//! body lies in the guest's memory until the call that received it returns, and
//! then its buffers go back. A frame to the guest is copied into its buffers:
//! one copy from guest to guest.
//!
//! # Front ends that come and go
//!
//! When a front end leaves, or breaks the rules, its memory is let go and the
//! port is down until the next one comes. Buffers are handed back in the order
//! in which they were taken, within the call that took them; so a front end
//! whose backend was killed need not know what was in flight: rings go on
//! where the used ring ends, and at most the frames of one burst are received
//! twice or lost.
//!
//! # A hostile front end
//!
//! Descriptors are read once and checked; chains have a length. Memory must
//! lie on tmpfs or hugetlbfs, whose pages come without waiting for anybody;
//! where its owner cuts its file short, zeros take its place ([`fault`]).
//! Notifications must be eventfds. What breaks the rules ends the connection.

mod control;
mod device;
mod event;
mod fault;
mod features;
mod memory;
mod packet;
mod ring;

#[cfg(test)]
mod tests;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::BackendReqHandler;

use super::Port;
use crate::drops::{Drops, Reason};
use crate::frame::Frame;
use crate::jail;
use control::Control;
use device::Device;

/// How long a worker may take for a change. It takes microseconds, unless it
/// is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a front end that is not there is left alone.
const RETRY: Duration = Duration::from_millis(500);

/// Pairs of queues at most: rings are numbered by a byte.
pub const MOST_PAIRS: u16 = 128;

/// What goes wrong with a front end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Memory is described that is not there, overlaps or is too much.
    #[error("memory or a ring that is not where the front end says")]
    Outside,
    /// Its memory could make the switch wait.
    #[error("memory that is not on tmpfs or hugetlbfs; use a memfd or huge pages")]
    Foreign,
    /// It cannot be mapped.
    #[error("memory cannot be mapped: {0}")]
    Memory(io::Error),
    /// The worker does not serve the port.
    #[error("the port's worker does not answer")]
    Worker,
}

/// Something that the worker does with the device for the control thread.
type Change = Box<dyn FnOnce(&mut Device) + Send>;

/// What the control thread and the port have in common.
struct Link {
    changes: Mutex<Sender<Change>>,
    /// Whether there is a change.
    pending: AtomicBool,
    /// Wakes the worker.
    wake: OwnedFd,
    /// Readable when the worker has something to do: changes, or frames.
    poll: Arc<OwnedFd>,
    /// The port is no more.
    ended: Mutex<Ended>,
    end: Condvar,
}

/// Whether the port is no more, and what is to be shut down then.
#[derive(Default)]
struct Ended {
    is: bool,
    connection: Option<UnixStream>,
}

impl Link {
    fn new(changes: Sender<Change>) -> io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = rustix::event::eventfd(0, flags)?;
        let poll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let data = epoll::EventData::new_u64(0);
        epoll::add(&poll, &wake, data, epoll::EventFlags::IN)?;
        Ok(Self {
            changes: Mutex::new(changes),
            pending: AtomicBool::new(false),
            wake,
            poll,
            ended: Mutex::default(),
            end: Condvar::new(),
        })
    }

    /// Has the worker change the device; what it answers.
    ///
    /// # Errors
    ///
    /// The worker does not answer.
    fn with<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Device) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (reply, answer) = sync_channel(1);
        let change: Change = Box::new(move |device| {
            // If nobody waits any more, it is dropped.
            let _ = reply.try_send(change(device));
        });
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.send(change).map_err(|_| Error::Worker)?;
        drop(changes);
        self.pending.store(true, Ordering::Release);
        event::tell(&self.wake);
        answer.recv_timeout(PATIENCE).map_err(|_| Error::Worker)
    }

    fn ended(&self) -> MutexGuard<'_, Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits before another try; true if the port is no more.
    fn pause(&self) -> bool {
        let ended = self.ended();
        let waited = self.end.wait_timeout_while(ended, RETRY, |ended| !ended.is);
        waited.unwrap_or_else(PoisonError::into_inner).0.is
    }
}

/// Where front ends are met.
enum Meeting {
    /// They connect.
    Listen(UnixListener),
    /// They listen.
    Connect(PathBuf),
}

/// A port whose other end is a front end of vhost-user.
pub struct VhostUser {
    device: Device,
    /// Until the end.
    changes: Option<Receiver<Change>>,
    link: Arc<Link>,
    max_frame: usize,
    /// To be shut down, so that the thread ends.
    listener: Option<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl VhostUser {
    /// Waits for front ends at a socket, with up to `pairs` pairs of queues;
    /// small frames are up to `max_frame` bytes long. A socket at `path` that
    /// nobody listens at is replaced.
    ///
    /// # Errors
    ///
    /// The socket cannot be made, or there is no thread to be had.
    pub fn listen(path: &Path, pairs: u16, max_frame: usize) -> io::Result<Self> {
        let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        let listener = match UnixListener::bind(path) {
            Err(error) if in_use(&error) && is_left(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            other => other?,
        };
        Self::accept(listener, pairs, max_frame)
    }

    /// As [`VhostUser::listen`], at a socket that somebody else has made.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn accept(listener: UnixListener, pairs: u16, max_frame: usize) -> io::Result<Self> {
        let own = listener.try_clone()?;
        let mut port = Self::new(Meeting::Listen(listener), pairs, max_frame)?;
        port.listener = Some(own);
        Ok(port)
    }

    /// Connects to a front end that listens at `path`, as soon as it does and
    /// again when it comes back.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn connect(path: &Path, pairs: u16, max_frame: usize) -> io::Result<Self> {
        Self::new(Meeting::Connect(path.to_owned()), pairs, max_frame)
    }

    fn new(meeting: Meeting, pairs: u16, max_frame: usize) -> io::Result<Self> {
        if !(1..=MOST_PAIRS).contains(&pairs) {
            return Err(io::Error::other("a port has 1 to 128 pairs of queues"));
        }
        let (sender, changes) = channel();
        let link = Arc::new(Link::new(sender)?);
        let its = Arc::clone(&link);
        let thread = std::thread::Builder::new().name("vhost-user".into());
        let thread = thread.spawn(move || run(&its, &meeting, pairs))?;
        Ok(Self {
            device: Device::new(pairs, max_frame),
            changes: Some(changes),
            link,
            max_frame,
            listener: None,
            thread: Some(thread),
        })
    }

    /// Whether there is a front end whose rings are served.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.device.is_up()
    }

    /// Does what the control thread asks for.
    fn serve(&mut self) {
        if !self.link.pending.load(Ordering::Relaxed)
            || !self.link.pending.swap(false, Ordering::Acquire)
        {
            return;
        }
        let changes = self.changes.iter().flat_map(Receiver::try_iter);
        for change in changes {
            change(&mut self.device);
        }
    }
}

impl Port for VhostUser {
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(&mut Frame<'_>)) -> io::Result<usize> {
        self.serve();
        Ok(self.device.receive(most, each))
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        self.device.send(frame)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.device.flush();
        Ok(())
    }

    fn arm(&mut self) -> io::Result<bool> {
        // What is asked for after this wakes the worker again.
        event::take(&self.link.wake);
        self.serve();
        Ok(self.device.arm())
    }

    fn disarm(&mut self) {
        self.device.disarm();
    }

    fn waker(&self) -> BorrowedFd<'_> {
        self.link.poll.as_fd()
    }

    fn is_up(&self) -> bool {
        self.device.is_up()
    }

    fn polls_cheaply(&self) -> bool {
        true
    }

    fn max_frame(&self) -> usize {
        self.max_frame
    }

    fn drops(&self) -> &Drops {
        &self.device.drops
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        let mut ended = self.link.ended();
        ended.is = true;
        if let Some(connection) = &ended.connection {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(ended);
        self.link.end.notify_all();
        // Whoever waits for a change learns that nobody makes it.
        self.changes = None;
        if let Some(listener) = &self.listener {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects to the socket at `path` without waiting.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(socket.into())
}

/// Whether a socket is there that nobody listens at.
fn is_left(path: &Path) -> bool {
    match connect(path).map_err(|error| error.kind()) {
        Err(io::ErrorKind::PermissionDenied) => is_left_given(path),
        other => other.is_err_and(|kind| kind == io::ErrorKind::ConnectionRefused),
    }
}

/// The same of a socket that was given to somebody: to ask at it, the switch
/// has it back, for it does not have the right to pass over permissions.
fn is_left_given(path: &Path) -> bool {
    let Ok(was) = std::fs::symlink_metadata(path) else {
        return false;
    };
    let give = |user, group| std::os::unix::fs::lchown(path, Some(user), Some(group));
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if !was.file_type().is_socket() || give(user.as_raw(), group.as_raw()).is_err() {
        return false;
    }
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    let left = connect(path).is_err_and(refused);
    if !left && give(was.uid(), was.gid()).is_err() {
        tracing::warn!("{} is not its owner's any more", path.display());
    }
    left
}

/// Meets one front end after the other, until the port is no more.
fn run(link: &Arc<Link>, meeting: &Meeting, pairs: u16) {
    if let Err(error) = jail::enter(jail::Class::VhostUser) {
        tracing::error!(%error, "no vhost-user front end: no filter for its thread");
        return;
    }
    loop {
        let met = match meeting {
            Meeting::Listen(listener) => listener.accept().map(|(socket, _)| socket),
            Meeting::Connect(path) => connect(path),
        };
        match met.and_then(|socket| attend(link, socket, pairs)) {
            Ok(()) if link.ended().is => return,
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(%error, "no vhost-user front end");
                if link.pause() {
                    return;
                }
            }
        }
    }
}

/// Answers a front end until it leaves.
///
/// # Errors
///
/// No descriptors are to be had.
fn attend(link: &Arc<Link>, socket: UnixStream, pairs: u16) -> io::Result<()> {
    let (kept, own) = (socket.try_clone()?, socket.try_clone()?);
    {
        let mut ended = link.ended();
        if ended.is {
            return Ok(());
        }
        ended.connection = Some(kept);
    }
    let control = Arc::new(Mutex::new(Control::new(Arc::clone(link), pairs)));
    let mut handler = BackendReqHandler::from_stream(socket, control);
    let begun = link.with(move |device| device.connection = Some(own));
    if begun.is_ok() {
        let left = loop {
            if let Err(error) = handler.handle_request() {
                break error;
            }
        };
        tracing::info!(reason = %left, "a vhost-user front end has left");
    }
    link.ended().connection = None;
    // What it had is unmapped and closed here, not by the worker. One that
    // does not answer will do so itself.
    drop(link.with(Device::clear));
    Ok(())
}
