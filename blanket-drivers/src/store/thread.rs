//! The engine that works everywhere: a thread that does one request at a time.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::qcow2::Layers;
use super::raw::RawFile;
use super::{Completion, Request, Store, ThreadSetup};

/// What a thread works on.
#[derive(Clone, Debug)]
pub(super) enum Backend {
    /// Bytes as they are.
    Raw(Arc<RawFile>),
    /// Copy-on-write layers.
    Qcow2(Arc<Layers>),
}

impl Backend {
    pub(super) fn run(&self, request: Request) -> Completion {
        match self {
            Self::Raw(raw) => raw.run(request),
            Self::Qcow2(layers) => layers.run(request),
        }
    }
}

/// A store with a thread of its own.
pub(super) struct ThreadStore {
    requests: Option<SyncSender<Request>>,
    completions: Receiver<Completion>,
    event: EventFd,
    in_flight: usize,
    depth: usize,
    thread: Option<JoinHandle<()>>,
}

impl ThreadStore {
    /// Starts the thread and waits until `setup` is through.
    ///
    /// # Errors
    /// No thread, no eventfd, or `setup` failed.
    pub(super) fn new(backend: Backend, depth: u16, setup: ThreadSetup) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let signal = event.try_clone()?;
        let (requests, work) = sync_channel(depth.into());
        let (done, completions) = channel();
        let (report, outcome) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            // Less than a huge page, which would count whole.
            .stack_size(1 << 20)
            .spawn(move || {
                let ready = setup();
                let ok = ready.is_ok();
                // The spawner waits for this; if it is gone, so is the machine.
                let _ = report.send(ready);
                if ok {
                    serve(&backend, &work, &done, &signal);
                }
            })?;
        outcome
            .recv()
            .map_err(|_| io::Error::other("a store's thread died at its start"))??;
        Ok(Self {
            requests: Some(requests),
            completions,
            event,
            in_flight: 0,
            depth: depth.into(),
            thread: Some(thread),
        })
    }
}

fn serve(backend: &Backend, work: &Receiver<Request>, done: &Sender<Completion>, signal: &EventFd) {
    for request in work {
        if done.send(backend.run(request)).is_err() {
            break;
        }
        // Full (EAGAIN) is as good as signalled.
        let _ = signal.write(1);
    }
}

impl Store for ThreadStore {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        if self.in_flight >= self.depth {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let requests = self.requests.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        requests.try_send(request).map_err(|error| match error {
            TrySendError::Full(_) => io::Error::from(io::ErrorKind::WouldBlock),
            TrySendError::Disconnected(_) => io::Error::from(io::ErrorKind::BrokenPipe),
        })?;
        self.in_flight += 1;
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        // Clear the event first: what completes from now on sets it again.
        let _ = self.event.read();
        let before = out.len();
        out.extend(self.completions.try_iter());
        self.in_flight -= out.len() - before;
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn drain(&mut self, out: &mut Vec<Completion>) {
        while self.in_flight > 0 {
            match self.completions.recv() {
                Ok(completion) => {
                    self.in_flight -= 1;
                    out.push(completion);
                }
                // The thread is dead and touches nothing any more.
                Err(_) => self.in_flight = 0,
            }
        }
        let _ = self.event.read();
    }
}

impl Drop for ThreadStore {
    fn drop(&mut self) {
        // Without a sender the thread ends after what it has.
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
