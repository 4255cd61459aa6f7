//! What the xenbus thread does: serves the guest's store and takes each
//! backend where its frontend wants it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::Device;
use super::domain::SharedPages;
use crate::worker::Handler;
use crate::xen::channel::Channel;
use crate::xen::store::connection::{Connection, Step};
use crate::xen::store::{Path, Store};

/// Requests that are served before others may have the store.
const MAX_REQUESTS: usize = 16;

/// The guest's end of the store.
pub(super) struct Link {
    pub(super) channel: Channel,
    pub(super) connection: Connection,
    pub(super) pages: SharedPages,
}

/// Everything behind the lock.
pub(in crate::xen) struct Inner {
    pub(in crate::xen) store: Store,
    pub(super) link: Option<Link>,
    pub(super) devices: Vec<Device>,
}

impl Inner {
    /// Serves what has arrived; true if there may be more.
    fn serve(&mut self) -> bool {
        for device in &mut self.devices {
            device.check_fault(&mut self.store);
        }
        for _ in 0..MAX_REQUESTS {
            let Some(link) = &mut self.link else {
                return false;
            };
            let step = link.connection.step(&mut self.store);
            // The guest need not wait for what its request leads to.
            if link.connection.take_moved() {
                link.channel.notify();
            }
            let changed = self.store.take_changed();
            if step == Step::Idle {
                return false;
            }
            for path in changed {
                self.changed(&path);
            }
        }
        true
    }

    /// The guest has changed a node.
    fn changed(&mut self, path: &Path) {
        for device in &mut self.devices {
            if device.is_state(path) {
                device.frontend_changed(&mut self.store);
            }
        }
    }
}

/// What the xenbus thread shares with whoever controls the guest.
pub(in crate::xen) struct Shared {
    inner: Mutex<Inner>,
    /// Has the xenbus thread look again.
    wake: Arc<EventFd>,
}

impl Shared {
    pub(super) fn new(inner: Inner, wake: Arc<EventFd>) -> Self {
        Self {
            inner: Mutex::new(inner),
            wake,
        }
    }

    pub(in crate::xen) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::xen) fn wake(&self) {
        wake(&self.wake);
    }
}

pub(super) fn wake(event: &EventFd) {
    if let Err(error) = event.write(1) {
        tracing::error!(%error, "the xenbus cannot be woken");
    }
}

/// The xenbus thread's handler.
pub(super) struct Service(pub(super) Arc<Shared>);

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps) {
        let inner = self.0.lock();
        let channel = inner.link.as_ref().map(|link| link.channel.kick());
        for event in channel.into_iter().chain([self.0.wake.as_ref()]) {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!(%error, "the xenstore cannot be watched");
            }
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut inner = self.0.lock();
        // An empty eventfd is no news.
        let _ = self.0.wake.read();
        if let Some(link) = &inner.link {
            link.channel.take();
        }
        if inner.serve() {
            self.0.wake();
        }
    }
}

impl Handler for Service {
    fn kick(&mut self) {
        self.0.wake();
    }
}
