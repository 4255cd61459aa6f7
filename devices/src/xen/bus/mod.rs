//! The xenbus: each device's two directories in the xenstore, and the
//! handshake of its frontend and its backend over their `state` nodes
//! (`xen/include/public/io/xenbus.h`).
//!
//! [`XenBus`] has all devices, the console and the xenstore of one guest. A
//! thread of its own serves the store and calls the [`Backend`]s; the rings
//! themselves are served on the workers that all devices share.

mod device;
mod domain;
mod lifecycle;
mod service;

use std::io;
use std::sync::Arc;

use blanket_memory::GuestRam;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::EventChannels;
use super::channel::Channel;
use super::console::Console;
use super::control::Control;
use super::grant::GrantTable;
use super::store::Errno;
use super::store::connection::{self, Connection};
use crate::char::CharPort;
use crate::lifecycle::{Error as LifecycleError, SavedState};
use crate::worker::{HandlerId, ThreadSetup, Worker, Workers};

pub use device::State;
pub(super) use device::read;
pub(super) use domain::write;
pub use domain::{Domain, SharedPages};
pub(super) use service::Shared;

use device::Device;
use service::{Inner, Link, Service};

/// What backends work with.
#[derive(Clone)]
pub struct Context {
    /// Guest memory.
    pub memory: GuestRam,
    /// What the guest grants.
    pub grants: Arc<GrantTable>,
    /// How the guest and its backends ring each other.
    pub events: Arc<dyn EventChannels>,
    /// Threads for rings. Whoever calls a backend is none of them, so it may
    /// wait for them.
    pub workers: Workers,
    /// For a handler that finds its ring broken: the bus closes the backend
    /// then, from its own thread. Each backend has its own.
    pub fault: Arc<dyn Fn() + Send + Sync>,
}

/// Why a backend did not take what its frontend set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The frontend wrote no such node, or nonsense into it.
    #[error("the frontend's node '{node}' is {}", .value.as_ref().map_or("missing".to_owned(), |v| format!("{v:?}")))]
    Node {
        /// Its name, relative to the frontend's directory.
        node: String,
        /// What is in it.
        value: Option<String>,
    },
    /// A ring or buffer does not lie in pages that the guest granted.
    #[error(transparent)]
    Grant(#[from] super::grant::Error),
    /// Anything else that the frontend asks for and cannot have.
    #[error("{0}")]
    Refused(String),
    /// An event channel or a worker failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The model of one paravirtual device, without the handshake of the xenbus.
///
/// All calls come from one thread at a time that is none of the context's
/// workers. [`Backend::connect`] and [`Backend::disconnect`] alternate.
pub trait Backend: Send {
    /// The name of its class's directories: `vbd` or `vif`.
    fn kind(&self) -> &'static str;

    /// Its number in them: 51712 for `xvda`, 0 for the first network interface.
    fn index(&self) -> u32;

    /// The device's name in logs and metrics, like `blk0`.
    fn name(&self) -> &str;

    /// Nodes of the backend's directory that are there before the frontend
    /// looks: features, limits.
    fn offer(&self) -> Vec<(String, String)>;

    /// Nodes of the frontend's directory that the toolstack writes:
    /// `virtual-device`, `mac`, `handle`.
    fn frontend(&self) -> Vec<(String, String)>;

    /// The frontend has set itself up: reads its nodes, maps its rings, binds
    /// its event channels and puts handlers on workers. `frontend` gives the
    /// value of a node, named relative to the frontend's directory. Returns the
    /// nodes that the backend's directory has when it is connected.
    ///
    /// # Errors
    /// The frontend's setup cannot be used; everything is as before then.
    fn connect(
        &mut self,
        frontend: &dyn Fn(&str) -> Option<String>,
        context: &Context,
    ) -> Result<Vec<(String, String)>, Error>;

    /// The frontend closes or is gone: stops the handlers, unmaps and unbinds.
    /// Without effect on a backend that is not connected.
    fn disconnect(&mut self);

    /// Takes the handlers off their workers with nothing in flight: on return
    /// nothing touches guest memory. Without effect when not connected.
    ///
    /// # Errors
    /// It could not be brought to rest.
    fn pause(&mut self) -> Result<(), LifecycleError>;

    /// Serves the rings again, first whatever came in the meantime.
    ///
    /// # Errors
    /// It cannot run on.
    fn resume(&mut self) -> Result<(), LifecycleError>;

    /// Ends the device: flushes what must not be lost and lets its peers go.
    fn halt(&mut self);

    /// The state of a paused backend: indices, references, ports.
    ///
    /// # Errors
    /// The state cannot be encoded.
    fn save(&self) -> Result<SavedState, LifecycleError>;

    /// Takes over the state of an equally configured backend. Guest memory and
    /// grants are restored already. It is paused then, and connected if the
    /// saved one was. On an error it must be disconnected.
    ///
    /// # Errors
    /// The state is damaged, too new, another device's, or what it refers to is
    /// not there.
    fn restore(&mut self, state: &SavedState, context: &Context) -> Result<(), LifecycleError>;

    /// The device's counters now, as (name, value).
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}

/// What a bus is made of.
pub struct Parts {
    /// What the guest is told about itself.
    pub domain: Domain,
    /// Guest memory.
    pub memory: GuestRam,
    /// What the guest grants.
    pub grants: Arc<GrantTable>,
    /// How the guest and its backends ring each other.
    pub events: Arc<dyn EventChannels>,
    /// Threads for rings; the first serves the console.
    pub workers: Workers,
    /// The devices.
    pub backends: Vec<Box<dyn Backend>>,
    /// Where the console leads.
    pub console: CharPort,
    /// Runs at the start of the bus's own thread.
    pub setup: ThreadSetup,
}

/// All paravirtual devices, the console and the xenstore of one guest.
///
/// Its life is as [`crate::lifecycle`] has it, with one step more: before it is
/// started, and again after each reset, [`XenBus::attach`] joins it to the
/// pages of the guest that has been built.
pub struct XenBus {
    domain: Domain,
    memory: GuestRam,
    events: Arc<dyn EventChannels>,
    console: Console,
    shared: Arc<Shared>,
    thread: Worker,
    running: Option<HandlerId>,
}

impl XenBus {
    /// Makes the bus and its thread, for a guest that is not built yet.
    ///
    /// # Errors
    /// There are no more threads or descriptors, or the domain's name or UUID
    /// cannot be told to the guest.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let context = Context {
            memory: parts.memory.clone(),
            grants: parts.grants,
            events: Arc::clone(&parts.events),
            workers: Arc::clone(&parts.workers),
            fault: Arc::new(|| {}),
        };
        let mut devices = Vec::new();
        for backend in parts.backends {
            let wake = Arc::clone(&wake);
            let fault = Arc::new(move || service::wake(&wake));
            devices.push(Device::new(backend, context.clone(), fault));
        }
        let mut inner = Inner {
            store: domain::store(&parts.domain).map_err(io::Error::other)?,
            link: None,
            devices,
        };
        inner.publish().map_err(io::Error::other)?;
        Ok(Self {
            console: Console::new(
                parts.console,
                parts.memory.clone(),
                Arc::clone(&parts.events),
                parts.workers,
            ),
            domain: parts.domain,
            memory: parts.memory,
            events: parts.events,
            shared: Arc::new(Shared::new(inner, wake)),
            thread: Worker::spawn("xenbus", parts.setup)?,
            running: None,
        })
    }

    /// Joins the bus, not running, to a guest that has been built: to the pages
    /// that it shares from its start, whose ports it has for [`super::BACKEND`].
    ///
    /// # Errors
    /// A page is not in guest memory, a port cannot be bound, or the bus runs.
    pub fn attach(&mut self, pages: SharedPages) -> Result<(), LifecycleError> {
        self.join(pages)?;
        self.console.attach(pages.console)
    }

    /// Begins a connection of the guest's.
    fn join(&self, pages: SharedPages) -> Result<(), LifecycleError> {
        let link = self.link(pages, connection::State::default())?;
        link.connection.initialise().map_err(|e| error(&e))?;
        let mut inner = self.shared.lock();
        domain::announce(&mut inner.store, &pages).map_err(|e| error(&e))?;
        inner.link = Some(link);
        Ok(())
    }

    /// The store's end of a guest's connection.
    fn link(&self, pages: SharedPages, state: connection::State) -> Result<Link, LifecycleError> {
        // The old end must be free before its port can be bound again.
        self.shared.lock().link = None;
        if self.running.is_some() {
            return Err(error(&"it must be paused first"));
        }
        let channel = Channel::bind(&self.events, pages.store.port).map_err(|e| error(&e))?;
        let address = vm_memory::GuestAddress(pages.store.address);
        Ok(Link {
            channel,
            connection: Connection::new(self.memory.clone(), address, state),
            pages,
        })
    }

    /// Tells the guest what it is called now: in `name`, and in the `name` of its
    /// `vm`. Who watches those hears of it when the bus runs. A store that is
    /// restored has the name that it was saved with.
    ///
    /// # Errors
    /// The store refuses.
    pub fn set_name(&mut self, name: &str) -> Result<(), LifecycleError> {
        name.clone_into(&mut self.domain.name);
        let mut inner = self.shared.lock();
        domain::rename(&mut inner.store, name).map_err(|e| error(&e))?;
        drop(inner);
        self.shared.wake();
        Ok(())
    }

    /// What controls the guest by way of the store.
    #[must_use]
    pub fn control(&self) -> Control {
        Control::new(Arc::clone(&self.shared), &self.domain)
    }

    /// The devices' counters now: (device, its counters). Besides the devices
    /// by their names, there are `console0` and `xenstore`.
    #[must_use]
    pub fn metrics(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        let inner = self.shared.lock();
        let mut store = inner.store.metrics();
        if let Some(link) = &inner.link {
            store.extend(link.connection.metrics());
        }
        let mut all = vec![
            ("xenstore".to_owned(), store),
            ("console0".to_owned(), self.console.metrics()),
        ];
        for device in &inner.devices {
            let mut counters = device.backend.metrics();
            counters.push(("state", device.state as u64));
            counters.push(("connections", device.connections));
            counters.push(("faults", device.faults));
            all.push((device.backend.name().to_owned(), counters));
        }
        all
    }
}

impl Inner {
    /// Writes all devices' directories for frontends that have not started.
    fn publish(&mut self) -> Result<(), Errno> {
        let Self { store, devices, .. } = self;
        devices
            .iter_mut()
            .try_for_each(|device| device.publish(store))
    }
}

fn error(message: &impl ToString) -> LifecycleError {
    LifecycleError::Device {
        device: "xenbus".into(),
        message: message.to_string(),
    }
}

#[cfg(test)]
mod tests;
