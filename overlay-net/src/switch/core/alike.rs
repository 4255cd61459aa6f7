//! Frames that are alike: those that come one after the other, within a turn of
//! a port or the uplinks, from one station to another. What is decided for the
//! first of them holds for the others, since nothing has happened in between;
//! so a burst takes one look at the tables, not one for each frame.

use super::Switch;
use crate::bridge::{Edit, Output, Place};
use crate::frame::{Frame, Key, Layers, Mac, Vni};

/// What the frame before was, and what the others go by.
pub(super) struct Alike {
    from: Place,
    vni: Vni,
    dst: Mac,
    src: Mac,
    pub(super) to: Output,
    /// The largest packet.
    most: usize,
    /// Those that the flow table has not counted yet.
    pub(super) frames: u64,
    pub(super) bytes: u64,
}

/// Whether the bridge has nothing to do with it but to send it on: not if it
/// may have to change it, or learns more from it than where its sender is.
fn is_plain(key: &Key) -> bool {
    const SYN: u8 = 2;
    key.tags[0].is_none() && key.arp.is_none() && key.tcp_flags & SYN == 0
}

impl Alike {
    /// Whether a frame goes the same way.
    pub(super) fn takes(&self, from: Place, key: &Key, layers: &Layers, frame: &Frame<'_>) -> bool {
        (self.from, self.vni, self.dst, self.src) == (from, key.vni, key.dst, key.src)
            && is_plain(key)
            && layers.packet(frame) <= self.most
    }
}

impl Switch {
    /// A frame has gone its way: others like it take the same one until
    /// [`Switch::end_alike`].
    pub(super) fn begin_alike(&mut self, from: Place, key: &Key, way: Option<(Output, usize)>) {
        let Some((to, most)) = way.filter(|_| is_plain(key)) else {
            return;
        };
        let grouped = match to.to {
            Place::Port(id) => self
                .slot(id)
                .is_none_or(|slot| !slot.spec.groups.is_empty()),
            Place::Node(_) => false,
        };
        if to.edit == Edit::None && !grouped && !self.is_watched() {
            self.alike = Some(Alike {
                from,
                vni: key.vni,
                dst: key.dst,
                src: key.src,
                to,
                most,
                frames: 0,
                bytes: 0,
            });
        }
    }

    /// Something else happens.
    pub(super) fn end_alike(&mut self) {
        let Some(alike) = self.alike.take() else {
            return;
        };
        let flows = self.flows.get_mut(&alike.vni);
        if let Some(pipeline) = flows.and_then(|flows| flows.pipeline.as_mut()) {
            pipeline.count_alike(self.now, alike.frames, alike.bytes);
        }
    }
}
