//! The xenbus: each device's two directories in the xenstore, and the
//! handshake of its frontend and its backend over their `state` nodes
//! (`xen/include/public/io/xenbus.h`).

use std::io;
use std::sync::Arc;

use blanket_memory::GuestRam;

use super::EventChannels;
use super::grant::GrantTable;
use crate::lifecycle::{self, SavedState};
use crate::worker::Workers;

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
    fn pause(&mut self) -> Result<(), lifecycle::Error>;

    /// Serves the rings again, first whatever came in the meantime.
    ///
    /// # Errors
    /// It cannot run on.
    fn resume(&mut self) -> Result<(), lifecycle::Error>;

    /// Ends the device: flushes what must not be lost and lets its peers go.
    fn halt(&mut self);

    /// The state of a paused backend: indices, references, ports.
    ///
    /// # Errors
    /// The state cannot be encoded.
    fn save(&self) -> Result<SavedState, lifecycle::Error>;

    /// Takes over the state of an equally configured backend. Guest memory and
    /// grants are restored already. It is paused then, and connected if the
    /// saved one was. On an error it must be disconnected.
    ///
    /// # Errors
    /// The state is damaged, too new, another device's, or what it refers to is
    /// not there.
    fn restore(&mut self, state: &SavedState, context: &Context) -> Result<(), lifecycle::Error>;

    /// The device's counters now, as (name, value).
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}
