//! A pair of queues and their TAP queue.

use std::sync::Arc;

use blanket_drivers::tap::TapQueue;
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::super::queue::watch;
use super::super::{Interrupt, QueueHandler, VirtQueue};
use super::Shared;
use super::rx::Rx;
use super::tx::Tx;
use crate::net::{Outcome, TapWatch};
use crate::worker::Handler;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const TAP: u32 = 2;

pub(super) struct Pair {
    queues: [VirtQueue; 2],
    rx: Rx,
    tx: Tx,
    tap: TapWatch,
    shared: Arc<Shared>,
}

impl Pair {
    pub(super) fn new(
        queues: [VirtQueue; 2],
        tap: &Arc<TapQueue>,
        mergeable: bool,
        interrupt: &Arc<dyn Interrupt>,
        shared: &Arc<Shared>,
    ) -> Self {
        Self {
            rx: Rx::new(tap, mergeable, &queues[0], interrupt),
            tx: Tx::new(tap),
            tap: TapWatch::new(tap, TAP),
            queues,
            shared: Arc::clone(shared),
        }
    }

    fn receive(&mut self, ops: &mut EventOps) {
        let outcome = self
            .rx
            .receive(&mut self.queues[0], &self.shared.port.metrics.rx);
        self.tap.follow(outcome, ops);
        // The TAP reports what is left of itself, unless a frame is at hand.
        if outcome == Outcome::More {
            wake(&self.queues[0]);
        }
    }
}

/// Makes a queue's owner look at it again, after others had their turn.
pub(super) fn wake(queue: &VirtQueue) {
    if let Err(error) = queue.kick.write(1) {
        tracing::error!(%error, "a queue cannot be woken");
    }
}

impl MutEventSubscriber for Pair {
    fn init(&mut self, ops: &mut EventOps) {
        self.tap.forget();
        let [rx, tx] = &self.queues;
        if let Err(error) =
            watch(ops, &rx.kick, RX_KICK).and_then(|()| watch(ops, &tx.kick, TX_KICK))
        {
            tracing::error!(%error, "a queue cannot be watched");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RX_KICK => {
                self.queues[0].take_kick();
                self.receive(ops);
            }
            TAP => self.receive(ops),
            _ => {
                let queue = &mut self.queues[1];
                queue.take_kick();
                if self.tx.send(queue, &self.shared.port.metrics.tx) {
                    wake(queue);
                }
            }
        }
    }
}

impl Handler for Pair {
    fn kick(&mut self) {
        self.queues.iter().for_each(wake);
    }

    fn quiesce(&mut self) {
        self.rx
            .give_back(&mut self.queues[0], &self.shared.port.metrics.rx);
    }
}

impl QueueHandler for Pair {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}
