//! The thread that keeps the connection to a backend.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use blanket_memory::shared_log::SharedLog;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::session::{Inflight, Session};
use super::watchdog::Watchdog;
use super::{Error, Rings, State};

/// How long a backend that has gone is left alone at first, and at most: each
/// time twice as long.
const RETRY: Duration = Duration::from_millis(20);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// What the thread is asked for.
pub(crate) enum Command {
    /// Have a backend serve these rings.
    Start(Box<dyn Rings>),
    /// Stop it, and say where the rings stopped.
    Stop(SyncSender<Option<Vec<u16>>>),
    /// Use so many pairs of queues.
    Enable(u16),
    /// Have it note what it writes of the memory below this address, or no more.
    Log(
        Option<u64>,
        SyncSender<Result<Option<Arc<SharedLog>>, Error>>,
    ),
    /// Give the backend up.
    GiveUp,
    /// End.
    End,
}

pub(super) struct Keeper {
    path: PathBuf,
    pairs: u16,
    session: Option<Session>,
    rings: Option<Box<dyn Rings>>,
    log: Option<Arc<SharedLog>>,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    watchdog: Watchdog,
    state: Arc<State>,
    /// What the backend is at.
    inflight: Option<Inflight>,
    /// When to connect next, and how long to wait after that.
    retry: Instant,
    pause: Duration,
    /// Whether the reason for the last failure was told.
    told: bool,
}

impl Keeper {
    pub(super) fn new(
        (path, pairs): (PathBuf, u16),
        session: Session,
        (commands, wake): (Receiver<Command>, Arc<OwnedFd>),
        watchdog: Watchdog,
        state: Arc<State>,
    ) -> Self {
        let mut keeper = Self {
            path,
            pairs,
            session: None,
            rings: None,
            log: None,
            commands,
            wake,
            watchdog,
            state,
            inflight: None,
            retry: Instant::now(),
            pause: RETRY,
            told: false,
        };
        keeper.take(session);
        keeper
    }

    pub(super) fn run(mut self) {
        loop {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "the connection to a vhost-user backend is not watched");
                return;
            }
            // An empty eventfd is no news.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            while let Ok(command) = self.commands.try_recv() {
                if matches!(command, Command::End) {
                    return;
                }
                self.carry_out(command);
            }
            if self.session.is_none() && Instant::now() >= self.retry {
                self.connect();
            }
        }
    }

    /// Waits for a command, the end of the connection, or the time for another.
    fn wait(&mut self) -> io::Result<()> {
        let left = self.retry.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if let Some(session) = &self.session {
            fds.push(PollFd::new(session.socket(), PollFlags::IN));
        }
        let timeout = self.session.is_none().then_some(&left);
        match rustix::event::poll(&mut fds, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            drop(fds);
            self.lose("it has gone");
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Start(rings) => {
                self.rings = Some(rings);
                if self.session.is_some() {
                    self.begin();
                } else {
                    self.link(false);
                }
            }
            Command::Stop(reply) => {
                let bases = self.stop();
                // Nobody waits for it any more.
                let _ = reply.send(bases);
            }
            Command::Enable(pairs) => {
                if let Some(session) = &mut self.session
                    && let Err(error) = session.enable(pairs, &self.watchdog)
                {
                    self.lose(&error.to_string());
                }
            }
            Command::Log(end, reply) => {
                let log = self.set_log(end);
                // Nobody waits for it any more.
                let _ = reply.send(log);
            }
            Command::GiveUp => self.lose("it broke the rules of a ring"),
            Command::End => {}
        }
    }

    fn connect(&mut self) {
        self.wait_longer();
        match Session::open(&self.path, self.pairs, &self.watchdog) {
            Ok(session) => {
                tracing::info!(path = %self.path.display(), "the vhost-user backend is back");
                self.take(session);
                self.begin();
            }
            // Once, and not each second.
            Err(error) if !self.told => {
                self.told = true;
                tracing::info!(%error, "no vhost-user backend; trying again");
            }
            Err(_) => {}
        }
    }

    fn wait_longer(&mut self) {
        self.retry = Instant::now() + self.pause;
        self.pause = (2 * self.pause).min(RETRY_MOST);
    }

    fn take(&mut self, session: Session) {
        self.session = Some(session);
        self.told = false;
        self.state.connected.store(true, Ordering::Relaxed);
        self.state.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Has the backend begin, if there are rings.
    fn begin(&mut self) {
        let (Some(rings), Some(session)) = (&mut self.rings, &mut self.session) else {
            return;
        };
        let begun = rings.begin().map_err(Error::Rings).and_then(|setup| {
            let log = self.log.as_deref();
            session.start(&setup, log, &mut self.inflight, &self.watchdog)
        });
        match begun {
            Ok(()) => {
                self.pause = RETRY;
                self.link(true);
            }
            Err(error) => self.lose(&error.to_string()),
        }
    }

    /// Begins or ends to have it note what it writes. One that is not there will
    /// be told when it comes.
    fn set_log(&mut self, end: Option<u64>) -> Result<Option<Arc<SharedLog>>, Error> {
        self.log = end
            .map(|end| SharedLog::new(end).map(Arc::new))
            .transpose()
            .map_err(Error::Resource)?;
        if let Some(session) = &mut self.session
            && let Err(error) = session.log(self.log.as_deref(), &self.watchdog)
        {
            self.log = None;
            self.lose(&error.to_string());
            return Err(error);
        }
        Ok(self.log.clone())
    }

    /// Stops the backend; where the rings stopped.
    fn stop(&mut self) -> Option<Vec<u16>> {
        let bases = self
            .session
            .as_mut()
            .map(|session| session.stop(&self.watchdog));
        // Whether the link is up is of no concern to those who stopped it.
        self.rings = None;
        match bases? {
            Ok(bases) => Some(bases),
            Err(error) => {
                self.lose(&error.to_string());
                None
            }
        }
    }

    /// The backend has gone, or had better.
    fn lose(&mut self, reason: &str) {
        if self.session.take().is_none() {
            return;
        }
        let path = self.path.display();
        tracing::warn!(%path, reason, "the vhost-user backend is lost");
        self.state.connected.store(false, Ordering::Relaxed);
        self.wait_longer();
        self.link(false);
    }

    fn link(&mut self, up: bool) {
        if let Some(rings) = &mut self.rings {
            rings.link(up);
        }
    }
}
