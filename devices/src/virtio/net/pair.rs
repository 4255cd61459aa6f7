//! A pair of queues and their TAP queue.

use std::sync::Arc;

use blanket_drivers::tap::TapQueue;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::super::queue::watch;
use super::super::{Interrupt, QueueHandler, VirtQueue};
use super::metrics::Metrics;
use super::rx::{Outcome, Rx};
use super::tx::Tx;
use crate::worker::Handler;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const TAP: u32 = 2;

pub(super) struct Pair {
    queues: [VirtQueue; 2],
    tap: Arc<TapQueue>,
    rx: Rx,
    tx: Tx,
    metrics: Arc<Metrics>,
    /// Whether epoll looks at the TAP: not while the driver has no buffers.
    watching: bool,
}

impl Pair {
    pub(super) fn new(
        queues: [VirtQueue; 2],
        tap: &Arc<TapQueue>,
        mergeable: bool,
        interrupt: &Arc<dyn Interrupt>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        Self {
            rx: Rx::new(tap, mergeable, &queues[0], interrupt),
            tx: Tx::new(tap),
            tap: Arc::clone(tap),
            queues,
            metrics: Arc::clone(metrics),
            watching: false,
        }
    }

    fn receive(&mut self, ops: &mut EventOps) {
        let outcome = self.rx.receive(&mut self.queues[0], &self.metrics.rx);
        let watch = matches!(outcome, Outcome::Empty | Outcome::More);
        if watch != self.watching {
            self.watching = watch;
            let events = Events::with_data(&*self.tap, TAP, EventSet::IN);
            let changed = if watch {
                ops.add(events)
            } else {
                ops.remove(events)
            };
            if let Err(error) = changed {
                tracing::error!(?error, "a tap cannot be watched");
            }
        }
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
        self.watching = false;
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
                if self.tx.send(queue, &self.metrics.tx) {
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
        self.rx.give_back(&mut self.queues[0], &self.metrics.rx);
    }
}

impl QueueHandler for Pair {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}
