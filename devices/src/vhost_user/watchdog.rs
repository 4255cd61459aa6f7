//! An end for conversations with a backend that does not answer.
//!
//! A `vhost` front end waits for its backend's answers for as long as it
//! takes, and takes a socket's own time-out for a reason to try again. So
//! somebody else ends the conversation: he shuts the socket down.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::worker::{self, ThreadSetup};

/// What the thread waits for.
enum Watch {
    /// Something to do.
    Idle,
    /// The moment at which the conversation on the socket ends.
    Until(Instant, UnixStream),
    /// Its own end.
    End,
}

struct Shared {
    watch: Mutex<Watch>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, watch: Watch) {
        *self.lock() = watch;
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut watch = self.lock();
        loop {
            let left = match &*watch {
                Watch::End => return,
                Watch::Idle => None,
                Watch::Until(end, _) => Some(end.saturating_duration_since(Instant::now())),
            };
            watch = match left {
                None => self
                    .changed
                    .wait(watch)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => {
                    if let Watch::Until(_, socket) = std::mem::replace(&mut *watch, Watch::Idle) {
                        // It fails on a socket that is closed already.
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    watch
                }
                Some(left) => {
                    let waited = self.changed.wait_timeout(watch, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Ends one conversation at a time that takes too long.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts its thread, which runs `setup` first.
    ///
    /// # Errors
    /// No thread is to be had, or `setup` failed.
    pub(super) fn spawn(setup: ThreadSetup) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            watch: Mutex::new(Watch::Idle),
            changed: Condvar::new(),
        });
        let its = Arc::clone(&shared);
        let thread = worker::spawn("vhost-limit", setup, move || its.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Shuts `socket` down unless the guard is dropped within `limit`.
    ///
    /// # Errors
    /// No descriptor is left to be had.
    pub(super) fn limit(&self, socket: &UnixStream, limit: Duration) -> io::Result<Guard<'_>> {
        let socket = socket.try_clone()?;
        self.shared
            .set(Watch::Until(Instant::now() + limit, socket));
        Ok(Guard(&self.shared))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.set(Watch::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A conversation in time.
pub(super) struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.set(Watch::Idle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_conversation_that_takes_too_long_is_ended_and_one_in_time_is_not() {
        let watchdog = Watchdog::spawn(Box::new(|| Ok(()))).unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let guard = watchdog.limit(&ours, Duration::from_secs(600)).unwrap();
        drop(guard);
        theirs.write_all(b"x").unwrap();
        let _guard = watchdog.limit(&ours, Duration::from_millis(20)).unwrap();
        let mut all = Vec::new();
        // Without the watchdog this would wait forever.
        ours.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"x");
    }
}
