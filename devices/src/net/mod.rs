//! What every network interface does, whatever rings the guest has: frames
//! between guest memory and the other end, a TAP or a vhost-user backend,
//! their queues, and the counters.

pub(crate) mod checksum;
mod frames;
mod metrics;
mod receive;
mod send;
mod shared;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_drivers::tap::{Offloads, Tap};

pub(crate) use frames::FrameQueue;
pub(crate) use metrics::{Direction, Metrics};
pub(crate) use receive::{Frame, FrameWatch, Outcome, Spill, copy_at, read_failed};
pub(crate) use send::{Sent, send};
use shared::SharedPeer;

use crate::vhost_user::VhostUser;

/// What an interface is attached to on the node.
pub enum Attachment {
    /// The node's kernel.
    Tap(Tap),
    /// Another process.
    VhostUser(VhostUser),
}

impl From<Tap> for Attachment {
    fn from(tap: Tap) -> Self {
        Self::Tap(tap)
    }
}

/// The other end of an interface whose frames the monitor moves.
pub(crate) trait Peer: Send + Sync {
    /// Its queues.
    fn queues(&self) -> Vec<Arc<dyn FrameQueue>>;

    /// What it need not be spared on frames from the guest.
    fn takes(&self) -> Offloads;

    /// Switches what it leaves undone on frames to the guest.
    ///
    /// # Errors
    /// It cannot.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Begins or ends to use a queue, which is then the last in use.
    ///
    /// # Errors
    /// It cannot.
    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()>;

    /// Forgets the frames that wait.
    fn drain(&self);

    /// Has it send frames.
    ///
    /// # Errors
    /// It does not begin.
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    /// Has it send none any more.
    ///
    /// # Errors
    /// It does not stop.
    fn stop(&self) -> io::Result<()> {
        Ok(())
    }

    /// Frames for the guest that came to a queue before it was stopped, to be
    /// received first when it goes on, here or elsewhere.
    fn waiting(&self, _queue: usize) -> Vec<Vec<u8>> {
        Vec::new()
    }

    /// Has a queue receive these first.
    fn put(&self, _queue: usize, _frames: Vec<Vec<u8>>) {}

    /// Counters of its own.
    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl Peer for Tap {
    fn queues(&self) -> Vec<Arc<dyn FrameQueue>> {
        let all = Tap::queues(self).iter();
        all.map(|queue| Arc::clone(queue) as Arc<dyn FrameQueue>)
            .collect()
    }

    fn takes(&self) -> Offloads {
        Offloads::BASE
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
    }

    fn set_attached(&self, queue: u16, attached: bool) -> io::Result<()> {
        Tap::set_attached(self, queue, attached)
    }

    fn start(&self) -> io::Result<()> {
        self.release()
    }

    fn drain(&self) {
        Tap::drain(self);
    }
}

/// The other end of one interface with its counters.
pub(crate) struct Port {
    peer: Box<dyn Peer>,
    queues: Vec<Arc<dyn FrameQueue>>,
    metrics: Metrics,
    /// Queues in use: the peer's queues from here on are detached.
    attached: Mutex<u16>,
}

impl Port {
    /// Takes the other end with one queue in use.
    ///
    /// # Errors
    /// Its spare queues cannot be detached, or it lacks what the monitor needs
    /// of it.
    pub(crate) fn new(attachment: Attachment) -> io::Result<Self> {
        let peer: Box<dyn Peer> = match attachment {
            Attachment::Tap(tap) => Box::new(tap),
            Attachment::VhostUser(backend) => Box::new(SharedPeer::new(backend)?),
        };
        let queues = peer.queues();
        let port = Self {
            attached: Mutex::new(queues.len() as u16),
            metrics: Metrics::default(),
            queues,
            peer,
        };
        port.set_queues(1)?;
        Ok(port)
    }

    /// All queues.
    pub(crate) fn queues(&self) -> &[Arc<dyn FrameQueue>] {
        &self.queues
    }

    /// The other end.
    pub(crate) fn peer(&self) -> &dyn Peer {
        &*self.peer
    }

    /// Counters of frames towards the guest.
    pub(crate) fn received(&self) -> &Direction {
        &self.metrics.rx
    }

    /// Counters of frames from the guest.
    pub(crate) fn sent(&self) -> &Direction {
        &self.metrics.tx
    }

    /// All counters.
    pub(crate) fn read_metrics(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.metrics.read();
        all.extend(self.peer.metrics());
        all
    }

    /// Queues in use.
    pub(crate) fn used_queues(&self) -> u16 {
        *self.attached()
    }

    fn attached(&self) -> MutexGuard<'_, u16> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the other end send to the first `count` queues only.
    ///
    /// # Errors
    /// A queue cannot be attached or detached.
    pub(crate) fn set_queues(&self, count: u16) -> io::Result<()> {
        let mut attached = self.attached();
        while *attached < count {
            self.peer.set_attached(*attached, true)?;
            *attached += 1;
        }
        while *attached > count.max(1) {
            self.peer.set_attached(*attached - 1, false)?;
            *attached -= 1;
        }
        Ok(())
    }

    /// Brings it to what a new driver expects: one queue, no offloads, and
    /// nothing that was segmented and summed up for the driver that is gone.
    pub(crate) fn clear(&self, device: &str) {
        if let Err(error) = self.set_queues(1) {
            tracing::warn!(device, %error, "a queue stays attached");
        }
        if let Err(error) = self.peer.set_offloads(Offloads::default()) {
            tracing::warn!(device, %error, "the offloads stay on");
        }
        self.peer.drain();
    }
}
