//! The network interface of a `pv` machine (`xen/include/public/io/netif.h`)
//! on a TAP, or on a vhost-user backend.
//!
//! A queue is a ring of packets to send, a ring of buffers for packets to
//! receive, and a queue of the other end; `Queue` owns the three on one worker.
//! As with virtio, packets go between the guest's pages and the kernel in one
//! system call each, without a copy in between; to and from a backend they are
//! copied once, without a system call. TCP packets up to 64 KiB stay
//! whole in both directions, and checksums are left to whoever has to compute
//! them: the flags and extras of Xen's rings are translated to the virtio
//! header of the other end's frames, and back.
//!
//! # Grants
//!
//! Linux's netfront has no persistent grants: it grants each packet's own pages
//! and takes them back with the response. A page that is still marked as in
//! use then breaks its ring. So only the rings stay mapped, and each buffer
//! from its request to its response. A page is mapped by a look at its entry in
//! the grant table and a mark in it, both in memory that the monitor has mapped
//! anyway: there is no hypercall and no TLB flush to save.
//!
//! # Moving
//!
//! All that the guest has handed over is in the rings, and a paused queue has
//! answered each request that it took or given it back. A restored queue goes
//! on there; the frontend notices nothing and stays connected. The bus then
//! writes the backend's state once more: Linux's netfront takes that as the
//! sign to announce its addresses to the network, which only it knows.

mod abi;
mod packet;
mod queue;
mod rx;
mod state;
mod tx;
mod vnet;

#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::sync::Arc;

use blanket_drivers::grant::{Metrics, Pages};
use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{self, Offloads};

use super::bus::{self, Backend, Context};
use super::channel::Channel;
use super::grant::{self, Access, Grant};
use super::ring::{self, Indices, Ring};
use crate::lifecycle::{self, SavedState};
use crate::net::{Attachment, Port};
use crate::worker::{HandlerId, Workers};
use queue::{Queue, Rings};
use rx::Rx;
use state::{QueueState, State};
use tx::Tx;
use vnet::Features;

/// System calls of the threads that serve an interface.
pub const SYSCALLS: &[libc::c_long] = tap::SYSCALLS;

/// How a frontend broke a ring's rules.
#[derive(Debug, thiserror::Error)]
enum Broken {
    /// Its indices cannot be.
    #[error(transparent)]
    Ring(#[from] ring::Error),
    /// A packet's slots were shown in part.
    #[error("a packet ends before its last slot")]
    Incomplete,
    /// There is no such extra.
    #[error("a malformed extra")]
    Extra,
    /// A buffer for packets is not granted.
    #[error("a receive buffer: {0}")]
    Grant(grant::Error),
}

/// What the queues of an interface have in common.
struct Shared {
    name: String,
    port: Port,
    grants: Arc<Metrics>,
}

/// A network interface.
pub struct Netif {
    index: u32,
    mac: MacAddress,
    mtu: Option<u16>,
    shared: Arc<Shared>,
    connection: Option<Connection>,
}

/// What there is between a frontend's connection and its end.
struct Connection {
    features: Features,
    workers: Workers,
    queues: Vec<Place>,
}

/// Where a queue is.
enum Place {
    /// On a worker.
    Running(usize, HandlerId),
    /// At rest.
    Parked(Box<Queue>),
}

impl Netif {
    /// Interface `index` of the guest, called `name` in logs and metrics, with
    /// address `mac` on `attachment`, with as many queues at most as that has.
    /// The guest is told `mtu` (in bytes) if there is one.
    ///
    /// # Errors
    /// A TAP's spare queues cannot be detached, or a backend lacks what the
    /// monitor needs of it.
    pub fn new(
        index: u32,
        name: impl Into<String>,
        attachment: impl Into<Attachment>,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        Ok(Self {
            index,
            mac,
            mtu,
            shared: Arc::new(Shared {
                name: name.into(),
                port: Port::new(attachment.into())?,
                grants: Arc::default(),
            }),
            connection: None,
        })
    }

    /// Queues that a frontend may have.
    fn most_queues(&self) -> usize {
        self.shared.port.queues().len()
    }

    /// Takes up the connection that `state` describes, with all queues at rest.
    fn attach(&mut self, state: &State, context: &Context) -> Result<(), bus::Error> {
        let mut queues = Vec::with_capacity(state.queues.len());
        for (i, queue) in state.queues.iter().enumerate() {
            queues.push(Place::Parked(self.build(
                i,
                queue,
                state.features,
                context,
            )?));
        }
        let connection = self.connection.insert(Connection {
            features: state.features,
            workers: Arc::clone(&context.workers),
            queues,
        });
        let port = &self.shared.port;
        port.peer().set_offloads(state.features.offloads())?;
        port.set_queues(connection.queues.len() as u16)?;
        Ok(())
    }

    fn build(
        &self,
        index: usize,
        state: &QueueState,
        features: Features,
        context: &Context,
    ) -> Result<Box<Queue>, bus::Error> {
        let frames = self.shared.port.queues().get(index);
        let frames = frames.ok_or_else(|| bus::Error::Refused(format!("no queue {index}")))?;
        let grants = &context.grants;
        let tx = open_ring(
            grants.map(state.tx.reference, Access::Write)?,
            state.tx.indices,
        )?;
        let rx = open_ring(
            grants.map(state.rx.reference, Access::Write)?,
            state.rx.indices,
        )?;
        let tx_channel = Arc::new(Channel::bind(&context.events, state.tx.port)?);
        let rx_channel = if state.rx.port == state.tx.port {
            Arc::clone(&tx_channel)
        } else {
            Arc::new(Channel::bind(&context.events, state.rx.port)?)
        };
        // A frontend takes its pages back with each response: see above.
        let pages = || Pages::new(Arc::clone(grants), None, &self.shared.grants);
        let rings = Rings {
            tx,
            rx,
            tx_channel,
            rx_channel,
        };
        Ok(Box::new(Queue::new(
            index as u16,
            rings,
            (Tx::new(frames, pages()), Rx::new(frames, pages(), features)),
            &self.shared,
            &context.fault,
        )))
    }

    /// Puts queues that are at rest on workers.
    fn run(&mut self) -> io::Result<()> {
        let first = self.index as usize;
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        self.shared.port.peer().start()?;
        let workers = &connection.workers;
        let queues = std::mem::take(&mut connection.queues);
        for (i, place) in queues.into_iter().enumerate() {
            let place = match place {
                Place::Parked(queue) => {
                    let worker = (first + i) % workers.len();
                    Place::Running(worker, workers[worker].add(queue)?)
                }
                running @ Place::Running(..) => running,
            };
            connection.queues.push(place);
        }
        Ok(())
    }

    /// Takes the queues off their workers.
    fn park(&mut self) -> io::Result<()> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        for place in &mut connection.queues {
            if let Place::Running(worker, id) = place {
                let handler = connection.workers[*worker].remove(*id)?;
                let queue = (handler as Box<dyn Any>).downcast::<Queue>();
                let queue = queue.map_err(|_| io::Error::other("a foreign handler"))?;
                *place = Place::Parked(queue);
            }
        }
        self.shared.port.peer().stop()
    }

    /// Forgets the frontend.
    fn detach(&mut self) {
        if let Err(error) = self.park() {
            tracing::error!(name = self.shared.name, %error, "a queue cannot be stopped");
        }
        if self.connection.take().is_some() {
            self.shared.port.clear(&self.shared.name);
        }
    }

    fn failed(&self, message: impl Into<String>) -> lifecycle::Error {
        lifecycle::Error::Device {
            device: self.shared.name.clone(),
            message: message.into(),
        }
    }
}

/// The ring in a page, with a saved backend's indices if there are some.
fn open_ring<const REQUEST: usize, const RESPONSE: usize>(
    page: Grant,
    indices: Option<Indices>,
) -> Result<Ring<REQUEST, RESPONSE>, bus::Error> {
    let pages = vec![page];
    let ring = match indices {
        Some(indices) => Ring::restore(pages, indices),
        None => Ring::new(pages),
    };
    ring.map_err(|error| bus::Error::Refused(error.to_string()))
}

impl Backend for Netif {
    fn kind(&self) -> &'static str {
        "vif"
    }

    fn index(&self) -> u32 {
        self.index
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn offer(&self) -> Vec<(String, String)> {
        let queues = self.most_queues().to_string();
        let taken = self.shared.port.peer().takes();
        let takes = |bit| {
            if taken.contains(Offloads(bit)) {
                "1"
            } else {
                "0"
            }
        };
        [
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", takes(libc::TUN_F_TSO4)),
            ("feature-gso-tcpv6", takes(libc::TUN_F_TSO6)),
            ("feature-ipv6-csum-offload", "1"),
            ("feature-no-csum-offload", "0"),
            ("feature-rx-copy", "1"),
            ("feature-rx-flip", "0"),
            ("feature-split-event-channels", "1"),
            ("multi-queue-max-queues", &queues),
        ]
        .map(|(node, value)| (node.to_owned(), value.to_owned()))
        .into()
    }

    fn frontend(&self) -> Vec<(String, String)> {
        let mut nodes = vec![
            ("handle".to_owned(), self.index.to_string()),
            ("mac".to_owned(), self.mac.to_string()),
        ];
        nodes.extend(self.mtu.map(|mtu| ("mtu".to_owned(), mtu.to_string())));
        nodes
    }

    fn connect(
        &mut self,
        frontend: &dyn Fn(&str) -> Option<String>,
        context: &Context,
    ) -> Result<Vec<(String, String)>, bus::Error> {
        let state = state::read(frontend, self.most_queues())?;
        let connected = self.attach(&state, context).and_then(|()| Ok(self.run()?));
        if let Err(error) = connected {
            self.detach();
            return Err(error);
        }
        Ok(Vec::new())
    }

    fn disconnect(&mut self) {
        self.detach();
    }

    fn pause(&mut self) -> Result<(), lifecycle::Error> {
        self.park().map_err(|error| self.failed(error.to_string()))
    }

    fn resume(&mut self) -> Result<(), lifecycle::Error> {
        self.run().map_err(|error| self.failed(error.to_string()))
    }

    fn halt(&mut self) {
        self.detach();
    }

    fn save(&self) -> Result<SavedState, lifecycle::Error> {
        let state = self
            .connection
            .as_ref()
            .map(|connection| {
                let peer = self.shared.port.peer();
                let queues = connection.queues.iter().enumerate();
                let queues = queues.map(|(index, place)| match place {
                    Place::Parked(queue) => Ok(QueueState {
                        frames: peer.waiting(index),
                        ..QueueState::of(queue.rings())
                    }),
                    Place::Running(..) => Err(self.failed("it is not paused")),
                });
                Ok(State {
                    features: connection.features,
                    queues: queues.collect::<Result<_, _>>()?,
                })
            })
            .transpose()?;
        SavedState::pack("xen-netif", 1, &state)
    }

    fn restore(&mut self, state: &SavedState, context: &Context) -> Result<(), lifecycle::Error> {
        self.detach();
        let Some(state) = state.unpack::<Option<State>>("xen-netif", 1)? else {
            return Ok(());
        };
        let (used, most) = (state.queues.len(), self.most_queues());
        if !(1..=most).contains(&used) {
            return Err(self.failed(format!(
                "the guest uses {used} queues, the interface has {most}: give it as many"
            )));
        }
        self.attach(&state, context).map_err(|error| {
            self.detach();
            self.failed(error.to_string())
        })?;
        for (index, queue) in state.queues.into_iter().enumerate() {
            self.shared.port.peer().put(index, queue.frames);
        }
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.shared.port.read_metrics();
        counters.extend(self.shared.grants.list());
        counters
    }
}
