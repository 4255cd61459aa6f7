//! A pair of virtqueues and their queue of frames.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::super::queue::watch;
use super::super::{Interrupt, QueueHandler, VirtQueue};
use super::Shared;
use super::rx::Rx;
use super::tx::Tx;
use crate::net::{FrameQueue, FrameWatch, Outcome};
use crate::worker::Handler;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const FRAMES: u32 = 2;

pub(super) struct Pair {
    queues: [VirtQueue; 2],
    rx: Rx,
    tx: Tx,
    watch: FrameWatch,
    shared: Arc<Shared>,
}

impl Pair {
    pub(super) fn new(
        queues: [VirtQueue; 2],
        frames: &Arc<dyn FrameQueue>,
        mergeable: bool,
        interrupt: &Arc<dyn Interrupt>,
        shared: &Arc<Shared>,
    ) -> Self {
        Self {
            rx: Rx::new(frames, mergeable, &queues[0], interrupt),
            tx: Tx::new(frames),
            watch: FrameWatch::new(frames, FRAMES),
            queues,
            shared: Arc::clone(shared),
        }
    }

    fn receive(&mut self, ops: &mut EventOps) {
        let outcome = self
            .rx
            .receive(&mut self.queues[0], self.shared.port.received());
        self.watch.follow(outcome, ops);
        // The queue reports what is left in it, unless a frame is at hand.
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
        self.watch.forget();
        if let Err(error) = self.shared.port.peer().start() {
            tracing::error!(%error, "the interface's other end does not begin");
        }
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
            FRAMES => self.receive(ops),
            _ => {
                let queue = &mut self.queues[1];
                queue.take_kick();
                if self.tx.send(queue, self.shared.port.sent()) {
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
            .give_back(&mut self.queues[0], self.shared.port.received());
    }
}

impl QueueHandler for Pair {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}
