//! Frames on their way to a guest that moves to another node.

use std::io;
use std::sync::Arc;

use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{self, TapQueue};
use blanket_migration::Place;

/// The longest frame with its header, and a little to notice a longer one.
const LONGEST: usize = 65550 + tap::HEADER_LEN + 1;

/// The taps of a guest, at the node that it leaves or at the one that it gets to.
#[derive(Default)]
pub(crate) struct Frames {
    /// Each interface's queues and address.
    taps: Vec<(Vec<Arc<TapQueue>>, MacAddress)>,
    /// Interfaces that have been announced from somewhere else.
    found: Vec<usize>,
}

impl Frames {
    /// Of interfaces with these queues and addresses.
    pub(super) fn of(taps: impl Iterator<Item = (Vec<Arc<TapQueue>>, MacAddress)>) -> Self {
        Self {
            taps: taps.collect(),
            found: Vec::new(),
        }
    }

    /// The next frame that has come to the taps.
    pub(super) fn take(&mut self, into: &mut Vec<u8>) -> Option<Place> {
        for (interface, (queues, mac)) in self.taps.iter().enumerate() {
            for (queue, tap) in queues.iter().enumerate() {
                into.resize(LONGEST, 0);
                while let Ok(len) = tap.read(into) {
                    if !(tap::HEADER_LEN..LONGEST).contains(&len) {
                        continue;
                    }
                    if !tap::announces(&into[..len], *mac) {
                        into.truncate(len);
                        return Some(Place {
                            interface: interface as u16,
                            queue: queue as u16,
                        });
                    }
                    if !self.found.contains(&interface) {
                        self.found.push(interface);
                    }
                }
            }
        }
        None
    }

    /// Whether all have been announced from somewhere else.
    pub(super) fn are_found(&self) -> bool {
        self.found.len() == self.taps.len()
    }

    fn queues(&self) -> impl Iterator<Item = &Arc<TapQueue>> {
        self.taps.iter().flat_map(|(queues, _)| queues)
    }

    /// Lets nothing of the taps' own in until it is let in.
    ///
    /// # Errors
    /// The node is out of descriptors.
    pub(crate) fn hold(&self) -> io::Result<()> {
        self.queues().try_for_each(|queue| queue.hold())
    }

    /// Has the guest receive a frame that came to another node.
    pub(super) fn put(&self, place: Place, frame: &[u8]) {
        let queues = self.taps.get(usize::from(place.interface));
        let queue = queues.and_then(|(queues, _)| {
            let at = usize::from(place.queue);
            queues.get(at).or(queues.first())
        });
        if !queue.is_some_and(|queue| queue.put(frame)) {
            tracing::debug!(?place, "a frame that was sent on is dropped");
        }
    }

    /// Forgets what has come to the taps: it has come to the other node, too.
    pub(crate) fn forget(&self) {
        self.queues().for_each(|queue| queue.drain());
    }

    /// Lets the taps' own in.
    pub(super) fn let_in(&self) {
        for queue in self.queues() {
            if let Err(error) = queue.release() {
                tracing::error!(%error, "an interface receives nothing");
            }
        }
    }
}
