//! The console (virtio 1.2, 5.3): one port, `hvc0` in Linux.
//!
//! Nothing is lost on the way to a client that is connected: while it does not
//! keep up, the driver's buffers stay in the ring. Nor on the way to the guest:
//! input stays with its sender until the driver has a buffer for it.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::sync::Arc;

use blanket_memory::{IoVec, iovec};
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};

use super::queue::{Buffers, read_bytes, watch, write_bytes};
use super::{Activation, Device, QueueHandler, VirtQueue, downcast};
use crate::char::{self, CharPort};
use crate::lifecycle::{self, SavedState};
use crate::worker::Handler;

/// Device type (virtio 1.2, 5.3.1).
const KIND: u16 = 3;
/// `VIRTIO_CONSOLE_F_SIZE`: the configuration space has columns and rows.
const F_SIZE: u64 = 1 << 0;
const RX: usize = 0;
const TX: usize = 1;
/// Bytes that are moved in one step.
const STEP: usize = 16 << 10;
/// Bytes that are sent before other devices have their turn.
const BUDGET: usize = 256 << 10;
/// Requests that are served before other devices have their turn.
const MAX_REQUESTS: usize = 256;
const SAVED: &str = "virtio-console";

/// System calls of the thread that serves the console.
pub const SYSCALLS: &[libc::c_long] = char::SYSCALLS;

/// What of a console is neither in the queues nor in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Bytes of the next transmit buffer that have been sent already.
    sent: usize,
}

/// A console.
pub struct Console {
    name: String,
    size: Option<(u16, u16)>,
    /// Here unless a handler has it.
    port: Option<CharPort>,
    metrics: Arc<char::Metrics>,
    state: State,
}

impl Console {
    /// A console that leads to `port`. The guest is told the size of the
    /// port's terminal, if it has one.
    #[must_use]
    pub fn new(name: impl Into<String>, port: CharPort) -> Self {
        Self {
            name: name.into(),
            size: port.size(),
            metrics: Arc::clone(port.metrics()),
            port: Some(port),
            state: State::default(),
        }
    }
}

impl Device for Console {
    fn kind(&self) -> u16 {
        KIND
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        if self.size.is_some() { F_SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128]
    }

    /// `struct virtio_console_config` (virtio 1.2, 5.3.4).
    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.size.unwrap_or_default();
        let mut config = Vec::with_capacity(12);
        config.extend(columns.to_le_bytes());
        config.extend(rows.to_le_bytes());
        config.extend(1u32.to_le_bytes());
        config.extend(0u32.to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let queues: [VirtQueue; 2] = activation
            .queues
            .try_into()
            .map_err(|_| io::Error::other("the driver did not enable both queues"))?;
        let port = self
            .port
            .take()
            .ok_or_else(|| io::Error::other("the console is active already"))?;
        Ok(vec![Box::new(Line {
            queues,
            port,
            buffers: Buffers::default(),
            step: vec![0; STEP],
            state: std::mem::take(&mut self.state),
        })])
    }

    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        self.state = State::default();
        for handler in handlers {
            if let Some(line) = downcast::<Line>(handler) {
                self.port = Some(line.port);
            }
        }
    }

    fn save(&self, handlers: &[Box<dyn QueueHandler>]) -> Result<SavedState, lifecycle::Error> {
        let line = handlers.iter().find_map(|handler| {
            let handler: &dyn Any = handler.as_ref();
            handler.downcast_ref::<Line>()
        });
        SavedState::pack(SAVED, 1, &line.map_or(self.state, |line| line.state))
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        self.state = state.unpack(SAVED, 1)?;
        Ok(())
    }

    fn halt(&mut self) {
        // A port that a handler has ends with the handler.
        self.port = None;
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.read()
    }
}

/// The queues and the port between which bytes go.
struct Line {
    queues: [VirtQueue; 2],
    port: CharPort,
    buffers: Buffers,
    step: Vec<u8>,
    state: State,
}

impl Line {
    /// Sends what the driver has made available, as far as listeners keep up;
    /// true if there may be more that they could take.
    fn send(&mut self) -> bool {
        let mut budget = BUDGET;
        let mut more = true;
        self.queues[TX].disable_kicks();
        for _ in 0..MAX_REQUESTS {
            let Some(head) = self.queues[TX].pop(&mut self.buffers) else {
                if self.queues[TX].enable_kicks() {
                    self.queues[TX].disable_kicks();
                    continue;
                }
                more = false;
                break;
            };
            if self.send_request(&mut budget) {
                self.state.sent = 0;
                self.queues[TX].push(head, 0);
            } else {
                self.queues[TX].unpop();
                more = budget == 0;
                break;
            }
        }
        self.queues[TX].notify();
        more
    }

    /// Sends as much of the popped request as may be; true if that is all.
    fn send_request(&mut self, budget: &mut usize) -> bool {
        let pieces = &mut self.buffers.readable;
        iovec::advance(pieces, self.state.sent);
        while !pieces.is_empty() {
            let n = self.port.room().min(STEP).min(*budget);
            if n == 0 {
                return false;
            }
            let n = read_bytes(pieces, &mut self.step[..n]);
            self.port.write(&self.step[..n]);
            iovec::advance(pieces, n);
            self.state.sent += n;
            *budget -= n;
        }
        true
    }

    /// Reads into the driver's buffers; true if there may be more for which it
    /// has room.
    fn receive(&mut self) -> bool {
        let queue = &mut self.queues[RX];
        let mut more = true;
        let mut room = true;
        queue.disable_kicks();
        for _ in 0..MAX_REQUESTS {
            let Some(head) = queue.pop(&mut self.buffers) else {
                if queue.enable_kicks() {
                    queue.disable_kicks();
                    continue;
                }
                (more, room) = (false, false);
                break;
            };
            let buffer = &self.buffers.writable;
            let len = IoVec::total(buffer).min(STEP);
            let n = self.port.read(&mut self.step[..len]);
            if n == 0 && len > 0 {
                queue.unpop();
                more = false;
                break;
            }
            write_bytes(buffer, &self.step[..n]);
            queue.push(head, n as u32);
        }
        self.port.want_input(room);
        queue.notify();
        more
    }
}

impl MutEventSubscriber for Line {
    fn init(&mut self, ops: &mut EventOps) {
        for (token, queue) in self.queues.iter().enumerate() {
            if let Err(error) = watch(ops, &queue.kick, token as u32) {
                tracing::error!(%error, "a console queue cannot be watched");
            }
        }
        self.port.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if CharPort::owns(&events) {
            self.port.process(&events, ops);
        } else if let Some(queue) = self.queues.get(events.data() as usize) {
            queue.take_kick();
        }
        let more_out = self.send();
        let more_in = self.receive();
        self.port.sync(ops);
        if more_out || more_in {
            self.kick();
        }
    }
}

impl Handler for Line {
    fn kick(&mut self) {
        if let Err(error) = self.queues[TX].kick.write(1) {
            tracing::error!(%error, "a console queue cannot be woken");
        }
    }
}

impl QueueHandler for Line {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}
