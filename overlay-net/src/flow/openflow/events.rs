//! What controllers are told without having asked.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::PortInfo;
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

#[derive(Debug)]
struct Queue {
    events: Mutex<VecDeque<Event>>,
    wake: OwnedFd,
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
    ///
    /// # Errors
    ///
    /// There are too many open files.
    pub fn join(&self) -> io::Result<Inbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let queue = Arc::new(Queue {
            events: Mutex::default(),
            wake,
        });
        let mut queues = lock(&self.0);
        queues.retain(|queue| queue.strong_count() != 0);
        queues.push(Arc::downgrade(&queue));
        Ok(Inbox(queue))
    }

    /// Tells all sessions. False: there is none, or one of them has no room
    /// ([`crate::drops::Reason::Controller`]).
    pub fn send(&self, event: &Event) -> bool {
        let queues = lock(&self.0);
        let mut told = false;
        let mut full = false;
        for queue in queues.iter().filter_map(Weak::upgrade) {
            let mut events = lock(&queue.events);
            // What has happened to entries and ports is worth more than a frame.
            let room = if matches!(event, Event::Packet(_)) {
                WAITING
            } else {
                4 * WAITING
            };
            if events.len() >= room {
                full = true;
                continue;
            }
            events.push_back(event.clone());
            told = true;
            // It is only full if it wakes already.
            let _ = rustix::io::write(&queue.wake, &1_u64.to_ne_bytes());
        }
        told && !full
    }
}

impl Inbox {
    /// The next event.
    #[must_use]
    pub fn next(&self) -> Option<Event> {
        lock(&self.0.events).pop_front()
    }

    /// Readable when there are events.
    #[must_use]
    pub fn waker(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// Has seen that it was woken.
    pub fn woken(&self) {
        // Nothing to read: it was not.
        let _ = rustix::io::read(&self.0.wake, &mut [0; 8]);
    }
}

// Connections are shared by workers as hubs are.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Hub>();
    shared::<Connections>();
};
