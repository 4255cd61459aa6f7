//! The console of a `pv` guest: `hvc0` in Linux, over a page that it shares
//! from its start (`struct xencons_interface` in `console.h`).
//!
//! Nothing is lost on the way to a client that keeps its connection: while it
//! does not keep up, the bytes stay in the ring. Nor on the way to the guest:
//! input stays with its sender until the ring has room.

use std::any::Any;
use std::sync::Arc;

use blanket_memory::GuestRam;
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::EventChannels;
use super::channel::Channel;
use super::stream::{Broken, Layout, Stream};
use crate::char::{self, CharPort};
use crate::lifecycle::{Error, SavedState};
use crate::worker::{Handler, HandlerId, Workers};

const INPUT: Layout = Layout {
    data: 0,
    size: 1024,
    consumer: 3072,
    producer: 3076,
};
const OUTPUT: Layout = Layout {
    data: 1024,
    size: 2048,
    consumer: 3080,
    producer: 3084,
};
/// Bytes that are moved in one step: a whole ring.
const STEP: usize = 2048;
/// Steps each way before other devices have their turn.
const STEPS: usize = 64;
const NAME: &str = "xen-console";

/// System calls of the thread that serves the console.
pub const SYSCALLS: &[libc::c_long] = char::SYSCALLS;

/// A page that the guest shares with a backend from its start, and the event
/// channel that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedPage {
    /// The page's guest physical address.
    pub address: u64,
    /// The guest's end of the event channel.
    pub port: u32,
}

/// What of a console is not in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    page: Option<SharedPage>,
    /// The guest broke its ring: it has no console until it is reset.
    broken: bool,
}

/// Where the line is.
enum Place {
    Parked(Box<Line>),
    Running(HandlerId),
    Halted,
}

/// A console.
pub struct Console {
    memory: GuestRam,
    events: Arc<dyn EventChannels>,
    workers: Workers,
    metrics: Arc<char::Metrics>,
    place: Place,
}

impl Console {
    /// A console that leads to `port` and is served by the first of `workers`.
    #[must_use]
    pub fn new(
        port: CharPort,
        memory: GuestRam,
        events: Arc<dyn EventChannels>,
        workers: Workers,
    ) -> Self {
        Self {
            memory,
            events,
            workers,
            metrics: Arc::clone(port.metrics()),
            place: Place::Parked(Box::new(Line {
                port,
                link: None,
                state: State::default(),
                step: vec![0; STEP],
            })),
        }
    }

    fn parked(&mut self) -> Result<&mut Line, Error> {
        match &mut self.place {
            Place::Parked(line) => Ok(line),
            Place::Running(_) | Place::Halted => Err(error(&"it must be paused first")),
        }
    }

    /// Joins the parked console to the page of a new guest.
    ///
    /// # Errors
    /// The page is not in guest memory, or the port cannot be bound.
    pub fn attach(&mut self, page: SharedPage) -> Result<(), Error> {
        self.rejoin(page)?;
        if let Some(link) = &self.parked()?.link {
            let cleared = link.input.clear().and_then(|()| link.output.clear());
            cleared.map_err(|e| error(&e))?;
        }
        Ok(())
    }

    /// Joins the parked console to the page of a guest that goes on in a new
    /// domain: what is on its way in the page arrives.
    ///
    /// # Errors
    /// The page is not in guest memory, or the port cannot be bound.
    pub fn rejoin(&mut self, page: SharedPage) -> Result<(), Error> {
        self.detach()?;
        self.join(State {
            page: Some(page),
            broken: false,
        })
    }

    /// Joins the parked console to a page as it is.
    fn join(&mut self, state: State) -> Result<(), Error> {
        let link = match state.page {
            Some(page) => {
                let channel = Channel::bind(&self.events, page.port).map_err(|e| error(&e))?;
                let address = GuestAddress(page.address);
                Some(Link {
                    channel,
                    input: Stream::new(self.memory.clone(), address, INPUT),
                    output: Stream::new(self.memory.clone(), address, OUTPUT),
                })
            }
            None => None,
        };
        let line = self.parked()?;
        line.state = state;
        line.link = link;
        Ok(())
    }

    /// Lets go of the guest; whoever listens stays connected.
    ///
    /// # Errors
    /// The console is not parked.
    pub fn detach(&mut self) -> Result<(), Error> {
        let line = self.parked()?;
        line.link = None;
        line.state = State::default();
        Ok(())
    }

    /// Serves the guest.
    ///
    /// # Errors
    /// The worker has ended.
    pub fn run(&mut self) -> Result<(), Error> {
        match (
            std::mem::replace(&mut self.place, Place::Halted),
            self.workers.first(),
        ) {
            (Place::Parked(line), Some(worker)) => {
                self.place = Place::Running(worker.add(line).map_err(|e| error(&e))?);
            }
            (place, _) => self.place = place,
        }
        Ok(())
    }

    /// Stops serving the guest.
    ///
    /// # Errors
    /// The worker has ended.
    pub fn park(&mut self) -> Result<(), Error> {
        if let (Place::Running(id), Some(worker)) = (&self.place, self.workers.first()) {
            let line = worker.remove(*id).map_err(|e| error(&e))?;
            let line = (line as Box<dyn Any>)
                .downcast::<Line>()
                .map_err(|_| error(&"a worker gave back another's handler"))?;
            self.place = Place::Parked(line);
        }
        Ok(())
    }

    /// Ends the console after its last words.
    pub fn halt(&mut self) {
        if let Err(error) = self.park() {
            tracing::warn!(%error, "halt");
        }
        self.place = Place::Halted;
    }

    /// The state of a parked console.
    ///
    /// # Errors
    /// It is not parked, or cannot be encoded.
    pub fn save(&self) -> Result<SavedState, Error> {
        match &self.place {
            Place::Parked(line) => SavedState::pack(NAME, 1, &line.state),
            Place::Running(_) | Place::Halted => Err(error(&"it must be paused first")),
        }
    }

    /// Takes over a saved state; guest memory is restored already.
    ///
    /// # Errors
    /// The state is damaged, or its port cannot be bound.
    pub fn restore(&mut self, state: &SavedState) -> Result<(), Error> {
        let state = state.unpack(NAME, 1)?;
        self.detach()?;
        self.join(state)
    }

    /// Its counters now, as (name, value).
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.read()
    }
}

fn error(message: &impl ToString) -> Error {
    Error::Device {
        device: NAME.into(),
        message: message.to_string(),
    }
}

/// The guest's end.
struct Link {
    channel: Channel,
    input: Stream,
    output: Stream,
}

/// What a step found.
#[derive(Default)]
struct Turn {
    /// Bytes have gone either way: the guest wants to know.
    moved: bool,
    /// There may be more to move.
    more: bool,
}

/// Both ends, and what goes between them.
struct Line {
    port: CharPort,
    link: Option<Link>,
    state: State,
    step: Vec<u8>,
}

impl Line {
    fn turn(&mut self) {
        let Some(link) = self.link.as_ref().filter(|_| !self.state.broken) else {
            self.port.want_input(false);
            return;
        };
        let mut turn = Turn::default();
        let done = send(link, &mut self.port, &mut self.step, &mut turn)
            .and_then(|()| receive(link, &mut self.port, &mut self.step, &mut turn));
        if turn.moved {
            link.channel.notify();
        }
        if let Err(broken) = done {
            tracing::warn!(error = %broken, "the guest's console is cut off");
            self.state.broken = true;
            self.port.want_input(false);
        } else if turn.more {
            link.channel.wake();
        }
    }
}

/// Passes on what the guest has written, as far as listeners keep up.
fn send(link: &Link, port: &mut CharPort, step: &mut [u8], turn: &mut Turn) -> Result<(), Broken> {
    for _ in 0..STEPS {
        let room = port.room().min(STEP);
        if room == 0 {
            return Ok(());
        }
        let n = link.output.read(&mut step[..room])?;
        if n == 0 {
            return Ok(());
        }
        port.write(&step[..n]);
        turn.moved = true;
    }
    turn.more = true;
    Ok(())
}

/// Passes on what somebody has sent, as far as the guest's ring has room.
fn receive(
    link: &Link,
    port: &mut CharPort,
    step: &mut [u8],
    turn: &mut Turn,
) -> Result<(), Broken> {
    for _ in 0..STEPS {
        // The guest rings when it has taken something.
        let room = link.input.room()?.min(STEP);
        port.want_input(room > 0);
        if room == 0 {
            return Ok(());
        }
        let n = port.read(&mut step[..room]);
        if n == 0 {
            return Ok(());
        }
        link.input.write(&step[..n])?;
        turn.moved = true;
    }
    turn.more = true;
    Ok(())
}

impl MutEventSubscriber for Line {
    fn init(&mut self, ops: &mut EventOps) {
        if let Some(link) = &self.link
            && let Err(error) = ops.add(Events::new(link.channel.kick(), EventSet::IN))
        {
            tracing::error!(%error, "the console cannot be watched");
        }
        self.port.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if CharPort::owns(&events) {
            self.port.process(&events, ops);
        } else if let Some(link) = &self.link {
            link.channel.take();
        }
        self.turn();
        self.port.sync(ops);
    }
}

impl Handler for Line {
    fn kick(&mut self) {
        if let Some(link) = &self.link {
            link.channel.wake();
        }
    }

    fn quiesce(&mut self) {
        // The guest's last words before it stops or is moved.
        self.turn();
    }
}

#[cfg(test)]
mod tests;
