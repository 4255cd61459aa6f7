//! What controllers are told without having asked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::PortInfo;
use crate::drops::Reason;
use crate::flow::conntrack::Connections;
use crate::flow::control::Gone;
use crate::flow::tables::Entry;
use crate::flow::walk::ToController;
use crate::frame::PortId;

/// Events that wait for one controller at most.
const WAITING: usize = 256;

/// A frame for controllers.
#[derive(Clone, Debug)]
pub struct PacketIn {
    /// Where it came in.
    pub port: PortId,
    /// Its network.
    pub vni: u32,
    /// Why.
    pub what: ToController,
    /// The frame.
    pub frame: Arc<[u8]>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A frame came that an entry sends to controllers.
    Packet(PacketIn),
    /// An entry went that controllers are told of.
    Removed {
        /// Which.
        entry: Arc<Entry>,
        /// Why.
        why: Gone,
        /// When.
        at: Duration,
    },
    /// A port came (0), went (1) or changed (2).
    Port(u8, PortInfo),
}

#[derive(Debug, Default)]
struct Queue {
    events: Mutex<VecDeque<Event>>,
    wake: Notify,
}

/// Events that one session has not told its controller yet.
#[derive(Debug)]
pub struct Inbox(Arc<Queue>);

/// Hands events to all sessions. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Vec<Weak<Queue>>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// A new session's inbox.
    #[must_use]
    pub fn join(&self) -> Inbox {
        let queue = Arc::new(Queue::default());
        let mut queues = lock(&self.0);
        queues.retain(|queue| queue.strong_count() != 0);
        queues.push(Arc::downgrade(&queue));
        Inbox(queue)
    }

    /// Tells all sessions. It never waits for one: locks are held for a few
    /// instructions.
    ///
    /// # Errors
    ///
    /// There is no session, or one of them has no room.
    pub fn send(&self, event: &Event) -> Result<(), Reason> {
        let queues = lock(&self.0);
        let mut result = Err(Reason::NoController);
        for queue in queues.iter().filter_map(Weak::upgrade) {
            let mut events = lock(&queue.events);
            // What has happened to entries and ports is worth more than a frame.
            let room = if matches!(event, Event::Packet(_)) {
                WAITING
            } else {
                4 * WAITING
            };
            if events.len() >= room {
                result = Err(Reason::Controller);
                continue;
            }
            events.push_back(event.clone());
            if events.len() == 1 {
                queue.wake.notify_one();
            }
            if result == Err(Reason::NoController) {
                result = Ok(());
            }
        }
        result
    }

    /// Whether there is a session.
    #[must_use]
    pub fn has_sessions(&self) -> bool {
        lock(&self.0).iter().any(|queue| queue.strong_count() != 0)
    }
}

impl Inbox {
    /// The next event.
    #[must_use]
    pub fn next(&self) -> Option<Event> {
        lock(&self.0.events).pop_front()
    }

    /// Until there are events. It may come back too early, never too late.
    pub async fn wait(&self) {
        if lock(&self.0.events).is_empty() {
            self.0.wake.notified().await;
        }
    }
}

// Connections are shared by workers as hubs are.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Hub>();
    shared::<Connections>();
};
