//! A pair of rings and their queue of frames.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::rx::{Rx, RxRing};
use super::tx::{Tx, TxRing};
use super::{Broken, Shared};
use crate::net::{FrameWatch, Outcome};
use crate::worker::Handler;
use crate::xen::channel::Channel;

const TX: u32 = 0;
const RX: u32 = 1;
const FRAMES: u32 = 2;

/// The rings of a queue with their event channels.
pub(super) struct Rings {
    pub(super) tx: TxRing,
    pub(super) rx: RxRing,
    pub(super) tx_channel: Arc<Channel>,
    /// The same as for transmission, unless the frontend split them.
    pub(super) rx_channel: Arc<Channel>,
}

impl Rings {
    fn is_split(&self) -> bool {
        !Arc::ptr_eq(&self.tx_channel, &self.rx_channel)
    }
}

/// Serves a queue on a worker.
pub(super) struct Queue {
    index: u16,
    rings: Rings,
    tx: Tx,
    rx: Rx,
    watch: FrameWatch,
    shared: Arc<Shared>,
    /// Tells the bus that a ring is broken.
    fault: Arc<dyn Fn() + Send + Sync>,
    broken: bool,
}

impl Queue {
    pub(super) fn new(
        index: u16,
        rings: Rings,
        (tx, rx): (Tx, Rx),
        shared: &Arc<Shared>,
        fault: &Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        Self {
            index,
            rings,
            watch: FrameWatch::new(rx.frames(), FRAMES),
            tx,
            rx,
            shared: Arc::clone(shared),
            fault: Arc::clone(fault),
            broken: false,
        }
    }

    /// Its rings, while it rests.
    pub(super) fn rings(&self) -> &Rings {
        &self.rings
    }

    fn send(&mut self) -> Result<(), Broken> {
        let channel = &self.rings.tx_channel;
        let metrics = self.shared.port.sent();
        let notify = || channel.notify();
        if self.tx.send(&mut self.rings.tx, metrics, &notify)? {
            channel.wake();
        }
        Ok(())
    }

    fn receive(&mut self, ops: &mut EventOps) -> Result<(), Broken> {
        let channel = &self.rings.rx_channel;
        let metrics = self.shared.port.received();
        let notify = || channel.notify();
        let outcome = self.rx.receive(&mut self.rings.rx, metrics, &notify)?;
        self.watch.follow(outcome, ops);
        // The queue reports what is left in it, unless a frame is at hand.
        if outcome == Outcome::More {
            channel.wake();
        }
        Ok(())
    }

    fn serve(&mut self, token: u32, ops: &mut EventOps) -> Result<(), Broken> {
        match token {
            TX => {
                self.rings.tx_channel.take();
                self.send()?;
                if self.rings.is_split() {
                    return Ok(());
                }
            }
            RX => self.rings.rx_channel.take(),
            _ => {}
        }
        self.receive(ops)
    }

    /// Leaves a ring alone whose frontend breaks the rules.
    fn give_up(&mut self, reason: &Broken, ops: &mut EventOps) {
        let (name, queue) = (&self.shared.name, self.index);
        tracing::warn!(name, queue, %reason, "the guest broke a network ring");
        self.broken = true;
        self.watch.follow(Outcome::Gone, ops);
        (self.fault)();
    }
}

impl MutEventSubscriber for Queue {
    fn init(&mut self, ops: &mut EventOps) {
        self.watch.forget();
        let mut watch = |channel: &Channel, token| {
            let events = Events::with_data(channel.kick(), token, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(?error, "a network ring cannot be watched");
            }
        };
        watch(&self.rings.tx_channel, TX);
        if self.rings.is_split() {
            watch(&self.rings.rx_channel, RX);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.broken {
            // Until the bus has closed it, the guest may still send.
            self.rings.tx_channel.take();
            self.rings.rx_channel.take();
        } else if let Err(reason) = self.serve(events.data(), ops) {
            self.give_up(&reason, ops);
        }
    }
}

impl Handler for Queue {
    fn kick(&mut self) {
        self.rings.tx_channel.wake();
        self.rings.rx_channel.wake();
    }

    fn quiesce(&mut self) {
        let metrics = self.shared.port.received();
        self.rx.give_back(&mut self.rings.rx, metrics);
    }
}
