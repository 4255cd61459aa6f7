//! blkif: a disk of a `pv` machine (`xen/include/public/io/blkif.h`).
//!
//! Each ring has a [`Store`] of its own into the image, and the store moves
//! data from and to the guest's pages themselves. Writes complete when the
//! node has them; a flush makes whatever completed before it durable.
//!
//! Sectors are of 512 bytes in all numbers of the protocol, also where
//! `sector-size` is larger, as in Linux's front- and backends.

mod handler;
mod pace;
mod request;
mod setup;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use blanket_drivers::grant::{self, Pages};
use blanket_drivers::store::{self, Image, SECTOR, Store, ThreadSetup};
use serde::{Deserialize, Serialize};

use self::handler::{DiskRing, RingHandler};
pub use self::request::INDIRECT_SEGMENTS;
use self::setup::{MAX_RING_PAGE_ORDER, Setup};
use super::bus::{Backend, Context, Error};
use super::channel::Channel;
use super::grant::Access;
use super::ring::Indices;
pub use crate::disk::Metrics;
use crate::disk::{self, DEPTH, Identity};
use crate::lifecycle::{self, SavedState};
use crate::worker::{HandlerId, Workers};

/// Pages of a frontend that stay mapped, per request in a ring: a Linux
/// frontend uses up to 32 for data, and one for a table.
const KEPT_PER_REQUEST: usize = 33;

/// `VDISK_READONLY` of the node `info`.
const READONLY: u32 = 4;

/// Version of [`State`].
const STATE_VERSION: u32 = 1;

/// What a migration carries.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Bytes: the other side's image must be as large.
    capacity: u64,
    /// If a frontend is connected.
    connection: Option<Connection>,
}

/// A connected frontend, with nothing in flight.
#[derive(Debug, Serialize, Deserialize)]
struct Connection {
    setup: Setup,
    /// By ring.
    indices: Vec<Indices>,
}

/// Where the handlers of the rings are.
enum Handlers {
    /// No frontend is connected.
    None,
    /// On these workers.
    Running(Workers, Vec<(usize, HandlerId)>),
    /// Here, with nothing in flight.
    Parked(Workers, Vec<RingHandler>),
}

/// A disk.
pub struct Block {
    image: Image,
    position: u32,
    queues: usize,
    persistent: bool,
    /// Connected rings have taken theirs.
    stores: Vec<Box<dyn Store>>,
    setup: Option<Setup>,
    handlers: Handlers,
    identity: Arc<Identity>,
    grants: Arc<grant::Metrics>,
}

/// How a [`Block`] is made.
pub struct Options<'a> {
    /// For people, logs and metrics: `blk0`.
    pub name: &'a str,
    /// Which disk of the guest it is, from 0: `xvda`, `xvdb`, ...
    pub position: u32,
    /// Most rings; at least one.
    pub queues: u16,
    /// Let the frontend reuse its pages, so that they stay mapped
    /// (`feature-persistent`). It copies all data to and from them then.
    pub persistent: bool,
}

impl Block {
    /// A disk on `image`.
    ///
    /// Rings and threads of its stores are made now, before the process
    /// confines itself; each thread first runs a `setup()`.
    ///
    /// # Errors
    /// A ring or a thread cannot be had.
    pub fn new(
        options: &Options,
        image: Image,
        setup: impl Fn() -> ThreadSetup,
    ) -> Result<Self, store::Error> {
        let queues = options.queues.max(1);
        let stores = (0..queues)
            .map(|_| image.queue(DEPTH, &setup))
            .collect::<Result<_, _>>()?;
        let log = image.log();
        Ok(Self {
            image,
            position: options.position,
            queues: queues.into(),
            persistent: options.persistent,
            stores,
            setup: None,
            handlers: Handlers::None,
            identity: Arc::new(Identity {
                name: options.name.to_owned(),
                metrics: Arc::default(),
                log,
            }),
            grants: Arc::default(),
        })
    }

    /// The disk's counters; they outlive it.
    #[must_use]
    pub fn counters(&self) -> Arc<Metrics> {
        Arc::clone(&self.identity.metrics)
    }

    /// Maps the rings of `setup` and binds their channels. `indices` are a
    /// saved backend's.
    fn attach(
        &mut self,
        setup: &Setup,
        indices: Option<&[Indices]>,
        context: &Context,
    ) -> Result<Vec<RingHandler>, Error> {
        let mut parts = Vec::new();
        for (i, ring) in setup.rings.iter().enumerate() {
            let saved = indices.and_then(|indices| indices.get(i).copied());
            let ring_pages = ring
                .references
                .iter()
                .map(|reference| context.grants.map(*reference, Access::Write))
                .collect::<Result<_, _>>()?;
            let shared = match saved {
                Some(indices) => DiskRing::restore(ring_pages, indices),
                None => DiskRing::new(ring_pages),
            };
            let shared = shared.map_err(|error| Error::Refused(error.to_string()))?;
            parts.push((shared, Channel::bind(&context.events, ring.port)?));
        }
        // Nothing can fail any more: the stores come back with the handlers.
        if parts.len() > self.stores.len() {
            let message = format!("{} rings for {} queues", parts.len(), self.stores.len());
            return Err(Error::Refused(message));
        }
        let stores = self.stores.drain(..parts.len());
        Ok(parts
            .into_iter()
            .zip(stores)
            .map(|((ring, channel), store)| {
                let keep = setup.persistent && self.persistent;
                let room = ring.entries() as usize * KEPT_PER_REQUEST;
                let keep = NonZeroUsize::new(room).filter(|_| keep);
                let pages = Pages::new(Arc::clone(&context.grants), keep, &self.grants);
                RingHandler::new(
                    ring,
                    store,
                    pages,
                    channel,
                    Arc::clone(&self.identity),
                    Arc::clone(&context.fault),
                )
            })
            .collect())
    }

    /// Puts parked handlers on workers, round robin.
    fn unpark(&mut self) -> io::Result<()> {
        let (workers, parked) = match std::mem::replace(&mut self.handlers, Handlers::None) {
            Handlers::Parked(workers, parked) => (workers, parked),
            other => {
                self.handlers = other;
                return Ok(());
            }
        };
        let mut running = Vec::new();
        let mut failed = None;
        for (i, handler) in parked.into_iter().enumerate() {
            let worker = (self.position as usize + i) % workers.len();
            match workers[worker].add(Box::new(handler)) {
                Ok(id) => running.push((worker, id)),
                Err(error) => failed = Some(error),
            }
        }
        self.handlers = Handlers::Running(workers, running);
        failed.map_or(Ok(()), Err)
    }

    /// Takes the handlers off their workers, with nothing in flight.
    fn park(&mut self) -> io::Result<()> {
        let Handlers::Running(workers, running) = &self.handlers else {
            return Ok(());
        };
        let mut parked = Vec::new();
        for (worker, id) in running {
            let handler = workers[*worker].remove(*id)? as Box<dyn Any>;
            let handler = handler
                .downcast::<RingHandler>()
                .map_err(|_| io::Error::other("a worker gave back another's handler"))?;
            parked.push(*handler);
        }
        self.handlers = Handlers::Parked(Arc::clone(workers), parked);
        Ok(())
    }

    /// Bytes that are best discarded at once.
    fn granularity(&self) -> u32 {
        self.image.physical_block_size()
    }

    fn failed(&self, error: &impl ToString) -> lifecycle::Error {
        lifecycle::Error::Device {
            device: self.identity.name.clone(),
            message: error.to_string(),
        }
    }
}

/// The number of a guest's disk, as `xvda` and so on have it (Xen's
/// `vbd-interface(7)`).
fn number(position: u32) -> u32 {
    const XVD: u32 = 202 << 8;
    const EXTENDED: u32 = 1 << 28;
    match position {
        0..16 => XVD | position << 4,
        _ => EXTENDED | position << 8,
    }
}

fn nodes(list: &[(&str, u64)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(name, value)| ((*name).to_owned(), value.to_string()))
        .collect()
}

impl Backend for Block {
    fn kind(&self) -> &'static str {
        "vbd"
    }

    fn index(&self) -> u32 {
        number(self.position)
    }

    fn name(&self) -> &str {
        &self.identity.name
    }

    fn offer(&self) -> Vec<(String, String)> {
        let writable = !self.image.readonly();
        let discard = self.image.discard();
        let mut offer = nodes(&[
            ("max-ring-page-order", MAX_RING_PAGE_ORDER.into()),
            ("multi-queue-max-queues", self.queues as u64),
            ("feature-max-indirect-segments", INDIRECT_SEGMENTS as u64),
            ("feature-persistent", self.persistent.into()),
            ("feature-flush-cache", writable.into()),
            ("feature-discard", discard.into()),
        ]);
        if discard {
            offer.extend(nodes(&[
                ("discard-granularity", self.granularity().into()),
                ("discard-alignment", 0),
                ("discard-secure", 0),
            ]));
        }
        let mode = if writable { "w" } else { "r" };
        offer.push(("mode".to_owned(), mode.to_owned()));
        offer
    }

    fn frontend(&self) -> Vec<(String, String)> {
        let number = self.index().to_string();
        vec![
            ("virtual-device".to_owned(), number),
            ("device-type".to_owned(), "disk".to_owned()),
        ]
    }

    fn connect(
        &mut self,
        frontend: &dyn Fn(&str) -> Option<String>,
        context: &Context,
    ) -> Result<Vec<(String, String)>, Error> {
        let setup = setup::read(frontend, self.queues)?;
        let handlers = self.attach(&setup, None, context)?;
        self.handlers = Handlers::Parked(Arc::clone(&context.workers), handlers);
        self.setup = Some(setup);
        if let Err(error) = self.unpark() {
            self.disconnect();
            return Err(error.into());
        }
        let info = if self.image.readonly() { READONLY } else { 0 };
        Ok(nodes(&[
            ("sectors", self.image.capacity() / SECTOR),
            ("sector-size", self.image.block_size().into()),
            (
                "physical-sector-size",
                self.image.physical_block_size().into(),
            ),
            ("info", info.into()),
        ]))
    }

    fn disconnect(&mut self) {
        if let Err(error) = self.park() {
            tracing::error!(disk = self.identity.name, %error, "cannot stop the rings");
        }
        if let Handlers::Parked(_, handlers) = std::mem::replace(&mut self.handlers, Handlers::None)
        {
            let stores = handlers.into_iter().map(RingHandler::into_store);
            self.stores.extend(stores);
        }
        self.setup = None;
    }

    fn pause(&mut self) -> Result<(), lifecycle::Error> {
        self.park().map_err(|error| self.failed(&error))
    }

    fn resume(&mut self) -> Result<(), lifecycle::Error> {
        self.unpark().map_err(|error| self.failed(&error))
    }

    fn halt(&mut self) {
        self.disconnect();
        self.stores.clear();
        if let Err(error) = self.image.flush() {
            tracing::error!(disk = self.identity.name, %error, "the disk could not be flushed");
        }
    }

    fn save(&self) -> Result<SavedState, lifecycle::Error> {
        let settled = disk::check_settled(&self.identity.metrics);
        settled.map_err(|error| self.failed(&error))?;
        let connection = match (&self.setup, &self.handlers) {
            (Some(setup), Handlers::Parked(_, handlers)) => Some(Connection {
                setup: setup.clone(),
                indices: handlers.iter().map(RingHandler::indices).collect(),
            }),
            (Some(_), Handlers::Running(..)) => {
                return Err(self.failed(&"a running disk cannot be saved: pause it first"));
            }
            _ => None,
        };
        let state = State {
            capacity: self.image.capacity(),
            connection,
        };
        SavedState::pack(self.name(), STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState, context: &Context) -> Result<(), lifecycle::Error> {
        let state: State = state.unpack(self.name(), STATE_VERSION)?;
        disk::check_capacity(state.capacity, &self.image).map_err(|error| self.failed(&error))?;
        self.disconnect();
        if let Some(Connection { setup, indices }) = state.connection {
            let handlers = self
                .attach(&setup, Some(&indices), context)
                .map_err(|error| self.failed(&error))?;
            self.handlers = Handlers::Parked(Arc::clone(&context.workers), handlers);
            self.setup = Some(setup);
        }
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.identity.metrics.list();
        counters.extend(self.grants.list());
        counters
    }
}
