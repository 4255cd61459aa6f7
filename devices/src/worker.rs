//! Threads that serve queues.
//!
//! A [`Worker`] is an event loop that *owns* the [`Handler`]s on it: one owner
//! per ring, no lock on the data path. Whoever needs a handler (to pause, save
//! or reset it) takes it off the worker and has it for itself.

mod patience;

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};

use self::patience::Patience;
pub(crate) use self::patience::expect;

/// Bytes of a thread's stack. Less than a huge page: a stack that the kernel
/// makes one of would count whole.
pub const STACK: usize = 512 << 10;

/// Something that a worker runs: it registers its file descriptors in
/// [`MutEventSubscriber::init`] and serves them in `process`.
pub trait Handler: MutEventSubscriber + Any + Send {
    /// Runs on the worker right after the handler was added: serve whatever
    /// came while nobody was looking.
    fn kick(&mut self) {}

    /// Runs on the worker right before the handler is taken off: complete or
    /// cancel what is in flight, so that nothing touches guest memory later.
    fn quiesce(&mut self) {}
}

/// A handler on its way to or from a worker. (`event-manager` wants a type of
/// its own to implement its trait on.)
struct Slot(Box<dyn Handler>);

impl MutEventSubscriber for Slot {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        patience::woken();
        self.0.process(events, ops);
    }
    fn init(&mut self, ops: &mut EventOps) {
        self.0.init(ops);
    }
}

/// Names a handler on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandlerId(SubscriberId);

/// Runs on a new thread before its loop starts: where the monitor confines it.
pub type ThreadSetup = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The worker threads that a machine's devices share.
pub type Workers = Arc<[Worker]>;

/// Starts a thread named `name` (15 bytes at most are shown) that runs `body`
/// once `setup` has confined it.
///
/// # Errors
/// No thread is to be had, or `setup` failed.
pub(crate) fn spawn(
    name: &str,
    setup: ThreadSetup,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (report, outcome) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(move || {
            let ready = setup();
            let ok = ready.is_ok();
            // The spawner waits for this; if it is gone, so is the machine.
            let _ = report.send(ready);
            if ok {
                body();
            }
        })?;
    outcome
        .recv()
        .map_err(|_| io::Error::other("a thread died at its start"))??;
    Ok(thread)
}

/// A thread with an event loop.
pub struct Worker {
    endpoint: RemoteEndpoint<Slot>,
    thread: Option<JoinHandle<()>>,
}

/// The loop ends when its stop flag is set; the flag is a subscriber's death.
struct Stop;

impl Worker {
    /// Starts a thread named `name` (15 bytes at most are shown).
    ///
    /// # Errors
    /// No thread, no epoll, or `setup` failed.
    pub fn spawn(name: &str, setup: ThreadSetup) -> io::Result<Self> {
        let mut manager = EventManager::<Slot>::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let mut patience = Patience::new();
        let thread = spawn(name, setup, move || {
            while !STOP.with(std::cell::Cell::get) {
                if let Err(error) = patience.run(&mut manager) {
                    tracing::error!(%error, "event loop");
                    break;
                }
            }
        })?;
        Ok(Self {
            endpoint,
            thread: Some(thread),
        })
    }

    /// Puts a handler on the worker and kicks it.
    ///
    /// # Errors
    /// The worker has ended.
    pub fn add(&self, handler: Box<dyn Handler>) -> io::Result<HandlerId> {
        self.call(move |ops| {
            let id = ops.add_subscriber(Slot(handler));
            if let Ok(slot) = ops.subscriber_mut(id) {
                slot.0.kick();
            }
            Ok(HandlerId(id))
        })
    }

    /// Quiesces a handler and takes it off the worker.
    ///
    /// # Errors
    /// The worker has ended or never had it.
    pub fn remove(&self, id: HandlerId) -> io::Result<Box<dyn Handler>> {
        self.call(move |ops| {
            let slot = ops.subscriber_mut(id.0).map_err(io::Error::other)?;
            slot.0.quiesce();
            let slot = ops.remove_subscriber(id.0).map_err(io::Error::other)?;
            Ok(slot.0)
        })
    }

    fn call<O: Send + 'static>(
        &self,
        call: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Slot>) -> io::Result<O> + Send + 'static,
    ) -> io::Result<O> {
        self.endpoint
            .call_blocking(move |ops| -> Result<O, CallError> { call(ops).map_err(CallError) })
            .map_err(|CallError(error)| error)
    }
}

struct CallError(io::Error);

impl From<event_manager::Error> for CallError {
    fn from(error: event_manager::Error) -> Self {
        Self(io::Error::other(error))
    }
}

thread_local! {
    /// Set on a worker's own thread when it is to end.
    static STOP: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Drop for Worker {
    fn drop(&mut self) {
        let stopped = self.call(|_| {
            STOP.with(|stop| stop.set(true));
            Ok(Stop)
        });
        if let (Ok(Stop), Some(thread)) = (stopped, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::EventFd;

    struct Echo {
        event: EventFd,
        seen: Sender<&'static str>,
    }

    impl MutEventSubscriber for Echo {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.event.read().unwrap();
            self.seen.send("event").unwrap();
            expect();
        }
    }

    impl Handler for Echo {
        fn kick(&mut self) {
            self.seen.send("kick").unwrap();
        }
        fn quiesce(&mut self) {
            self.seen.send("quiesce").unwrap();
        }
    }

    #[test]
    fn a_handler_is_kicked_served_quiesced_and_given_back() {
        let worker = Worker::spawn("test", Box::new(|| Ok(()))).unwrap();
        let event = EventFd::new(0).unwrap();
        let (seen, got) = channel();
        let id = worker
            .add(Box::new(Echo {
                event: event.try_clone().unwrap(),
                seen,
            }))
            .unwrap();
        assert_eq!(got.recv().unwrap(), "kick");
        // Those that come soon are looked for, the last one is slept for.
        for pause in [0, 0, 0, 0, 0, 20] {
            std::thread::sleep(Duration::from_millis(pause));
            event.write(1).unwrap();
            assert_eq!(got.recv().unwrap(), "event");
        }
        let handler = worker.remove(id).unwrap();
        assert_eq!(got.recv().unwrap(), "quiesce");
        assert!((handler as Box<dyn Any>).downcast::<Echo>().is_ok());
        event.write(1).unwrap();
        assert!(worker.remove(id).is_err());
        assert!(got.try_recv().is_err());
    }

    #[test]
    fn a_failed_setup_is_reported() {
        let error = Worker::spawn("test", Box::new(|| Err(io::Error::other("no")))).err();
        assert_eq!(error.unwrap().to_string(), "no");
    }
}
