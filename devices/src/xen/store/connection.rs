//! The guest's connection to the store: a page with a ring each way
//! (`struct xenstore_domain_interface` in `xs_wire.h`).

use std::sync::atomic::Ordering;

use blanket_memory::GuestRam;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::Store;
use super::wire::{self, HEADER, Header, MAX_PAYLOAD};
use crate::xen::stream::{Broken, Layout, Stream};

const REQUESTS: Layout = Layout {
    data: 0,
    size: 1024,
    consumer: 2048,
    producer: 2052,
};
const RESPONSES: Layout = Layout {
    data: 1024,
    size: 1024,
    consumer: 2056,
    producer: 2060,
};
const SERVER_FEATURES: u64 = 2064;
const CONNECTION: u64 = 2068;
const ERROR: u64 = 2072;

/// `XENSTORE_SERVER_FEATURE_RECONNECTION`, `XENSTORE_SERVER_FEATURE_ERROR`.
const FEATURES: u32 = 1 | 2;
/// `XENSTORE_CONNECTED`, `XENSTORE_RECONNECT`.
const CONNECTED: u32 = 0;
const RECONNECT: u32 = 1;

/// Why the guest is not served any more, until it reconnects
/// (`XENSTORE_ERROR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("the ring's indices make no sense")]
    RingIndex = 2,
    #[error("a message is longer than the protocol has it")]
    Protocol = 3,
}

impl From<Broken> for Fault {
    fn from(_: Broken) -> Self {
        Self::RingIndex
    }
}

/// What one step of the connection did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request was served: there may be more.
    Served,
    /// There is nothing to do until the guest rings.
    Idle,
}

/// What of a connection is not in guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The part of a request that has arrived.
    input: Vec<u8>,
    /// The part of an answer or event that has not been sent.
    output: Vec<u8>,
    /// The guest broke the protocol: it is ignored until it reconnects.
    broken: bool,
}

/// The store's end of the connection.
#[derive(Debug)]
pub struct Connection {
    memory: GuestRam,
    page: GuestAddress,
    requests: Stream,
    responses: Stream,
    state: State,
    /// Bytes have gone either way, of which the guest is not told yet.
    moved: bool,
    served: u64,
    faults: u64,
}

impl Connection {
    /// A connection over the page at `page`, in the given state.
    #[must_use]
    pub fn new(memory: GuestRam, page: GuestAddress, state: State) -> Self {
        Self {
            requests: Stream::new(memory.clone(), page, REQUESTS),
            responses: Stream::new(memory.clone(), page, RESPONSES),
            memory,
            page,
            state,
            moved: false,
            served: 0,
            faults: 0,
        }
    }

    /// Writes what the guest finds in a new page.
    ///
    /// # Errors
    /// The page is not in guest memory.
    pub fn initialise(&self) -> Result<(), Broken> {
        self.requests.clear()?;
        self.responses.clear()?;
        self.put(0, ERROR)?;
        self.put(FEATURES, SERVER_FEATURES)?;
        self.put(CONNECTED, CONNECTION)
    }

    fn put(&self, value: u32, offset: u64) -> Result<(), Broken> {
        let address = GuestAddress(self.page.0.wrapping_add(offset));
        Ok(self.memory.store(value, address, Ordering::Release)?)
    }

    /// Sends what waits and serves a request if one has arrived. No request is
    /// read before the last one's answer and all events are on their way: the
    /// guest cannot pile them up.
    pub fn step(&mut self, store: &mut Store) -> Step {
        if self.wants_reconnection() {
            self.reconnect(store);
        }
        if self.state.broken {
            return Step::Idle;
        }
        self.try_step(store).unwrap_or_else(|fault| {
            tracing::warn!(%fault, "the guest's xenstore connection is broken");
            self.faults += 1;
            self.state.broken = true;
            self.moved = true;
            // If not even that can be written, nobody looks for it.
            let _ = self.put(fault as u32, ERROR);
            Step::Idle
        })
    }

    fn try_step(&mut self, store: &mut Store) -> Result<Step, Fault> {
        if !self.flush(store)? {
            return Ok(Step::Idle);
        }
        let Some((header, payload)) = self.receive()? else {
            return Ok(Step::Idle);
        };
        self.served += 1;
        self.state.output = wire::answer(store, header, &payload);
        self.flush(store)?;
        Ok(Step::Served)
    }

    /// Sends what waits; true if that is all.
    fn flush(&mut self, store: &mut Store) -> Result<bool, Fault> {
        loop {
            if self.state.output.is_empty() {
                match store.watches().take() {
                    Some((path, token)) => self.state.output = wire::event(&path, &token),
                    None => return Ok(true),
                }
            }
            let n = self.responses.write(&self.state.output)?;
            self.moved |= n > 0;
            self.state.output.drain(..n);
            if !self.state.output.is_empty() {
                return Ok(false);
            }
        }
    }

    /// A whole request, once it has arrived.
    fn receive(&mut self) -> Result<Option<(Header, Vec<u8>)>, Fault> {
        self.fill(HEADER)?;
        let Some(header) = self.state.input.first_chunk() else {
            return Ok(None);
        };
        let header = Header::parse(header);
        let len = header.len as usize;
        if len > MAX_PAYLOAD {
            return Err(Fault::Protocol);
        }
        self.fill(HEADER + len)?;
        if self.state.input.len() < HEADER + len {
            return Ok(None);
        }
        let payload = self.state.input.split_off(HEADER);
        self.state.input.clear();
        Ok(Some((header, payload)))
    }

    /// Reads until `len` bytes of the request are here, or there are no more.
    fn fill(&mut self, len: usize) -> Result<(), Fault> {
        let mut buffer = [0; REQUESTS.size as usize];
        while self.state.input.len() < len {
            let missing = (len - self.state.input.len()).min(buffer.len());
            let n = self.requests.read(&mut buffer[..missing])?;
            if n == 0 {
                break;
            }
            self.moved = true;
            self.state.input.extend(&buffer[..n]);
        }
        Ok(())
    }

    fn wants_reconnection(&self) -> bool {
        let address = GuestAddress(self.page.0.wrapping_add(CONNECTION));
        let state = self.memory.load::<u32>(address, Ordering::Acquire);
        matches!(state, Ok(RECONNECT))
    }

    /// The guest starts anew: a kernel that was started by another one.
    fn reconnect(&mut self, store: &mut Store) {
        store.forget_client();
        self.state = State::default();
        self.moved = true;
        if self.initialise().is_err() {
            self.state.broken = true;
        }
    }

    /// Whether to tell the guest that something has moved; then it is told.
    pub fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// What is not in guest memory, to be restored.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Its counters now, as (name, value).
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.served), ("faults", self.faults)]
    }
}

#[cfg(test)]
mod tests;
