//! Frames that wait for a port to become active.

use std::collections::VecDeque;

use crate::drops::Reason;
use crate::frame::{Frame, Offload};

use super::vlan::Edit;

/// A frame that waited, as its port gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// All its bytes.
    pub bytes: Vec<u8>,
    /// What is left to do for it.
    pub offload: Offload,
}

/// Frames a port may have waiting.
const FRAMES: usize = 4096;
/// Bytes a port may have waiting.
const BYTES: usize = 8 << 20;

#[derive(Debug, Default)]
pub(super) struct Hold {
    frames: VecDeque<Held>,
    bytes: usize,
}

impl Hold {
    pub(super) fn push(&mut self, frame: &Frame<'_>, edit: Edit) -> Result<(), Reason> {
        let len = frame.len();
        if self.frames.len() >= FRAMES || self.bytes + len > BYTES {
            return Err(Reason::HoldFull);
        }
        let mut frame = frame.clone();
        if !edit.apply(&mut frame.head, &mut frame.offload) {
            return Err(Reason::Malformed);
        }
        let bytes = frame.to_vec();
        self.bytes += bytes.len();
        self.frames.push_back(Held {
            bytes,
            offload: frame.offload,
        });
        Ok(())
    }

    pub(super) fn take(&mut self) -> Vec<Held> {
        self.bytes = 0;
        self.frames.drain(..).collect()
    }
}
