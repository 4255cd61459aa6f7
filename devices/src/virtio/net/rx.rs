//! From the other end to the guest.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::IoVec;
use virtio_queue::QueueT;

use super::super::queue::Buffers;
use super::super::{Interrupt, VirtQueue};
use super::used::UsedFrames;
use crate::net::{Direction, Frame, FrameQueue, Outcome, Spill, copy_at, read_failed};

/// Frames that are received before others have their turn.
const BUDGET: usize = 128;
/// Room that is gathered for a frame: what virtio 1.2, 5.1.6.3.1 asks of a
/// driver for its largest one.
const ROOM: usize = 65550 + HEADER_LEN;
/// Pieces of guest memory in one call, which leaves one for the spill.
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize - 1;
/// Where the header has `num_buffers` (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// A buffer that was popped and has not been used.
struct Chain {
    head: u16,
    pieces: usize,
    len: usize,
}

/// What becomes of a frame next.
enum Fate {
    Deliver,
    Drop,
    Wait,
}

pub(super) struct Rx {
    frames: Arc<dyn FrameQueue>,
    mergeable: bool,
    chains: VecDeque<Chain>,
    /// The chains' pieces in order.
    pieces: Vec<IoVec>,
    room: usize,
    spill: Spill,
    /// A frame whose tail waits in the spill for buffers.
    frame: Option<Frame>,
    used: UsedFrames,
    buffers: Buffers,
    done: Vec<(u16, u32)>,
}

impl Rx {
    pub(super) fn new(
        frames: &Arc<dyn FrameQueue>,
        mergeable: bool,
        queue: &VirtQueue,
        interrupt: &Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            frames: Arc::clone(frames),
            mergeable,
            chains: VecDeque::new(),
            pieces: Vec::new(),
            room: 0,
            spill: Spill::new(),
            frame: None,
            used: UsedFrames::new(queue, Arc::clone(interrupt)),
            buffers: Buffers::default(),
            done: Vec::new(),
        }
    }

    /// Moves frames into the driver's buffers.
    pub(super) fn receive(&mut self, queue: &mut VirtQueue, metrics: &Direction) -> Outcome {
        queue.disable_kicks();
        let mut outcome = Outcome::More;
        for _ in 0..BUDGET {
            self.gather(queue);
            outcome = self.advance(queue, metrics);
            if outcome == Outcome::Starved && queue.enable_kicks() {
                queue.disable_kicks();
                outcome = Outcome::More;
            }
            if outcome != Outcome::More {
                break;
            }
        }
        self.used.notify(queue);
        outcome
    }

    /// Gives unused buffers back to the queue, for whoever serves it next.
    pub(super) fn give_back(&mut self, queue: &mut VirtQueue, metrics: &Direction) {
        if self.frame.take().is_some() {
            metrics.drop_one();
        }
        for _ in self.chains.drain(..) {
            queue.unpop();
        }
        self.pieces.clear();
        self.room = 0;
    }

    /// Pops buffers until any frame fits (one buffer, if they are not merged).
    fn gather(&mut self, queue: &mut VirtQueue) {
        while if self.mergeable {
            self.room < ROOM && self.pieces.len() < MAX_PIECES
        } else {
            self.chains.is_empty()
        } {
            let Some(head) = queue.pop(&mut self.buffers) else {
                break;
            };
            let len = IoVec::total(&self.buffers.writable);
            if len < HEADER_LEN {
                queue.fail("a receive buffer without room for the header");
                break;
            }
            self.chains.push_back(Chain {
                head,
                pieces: self.buffers.writable.len(),
                len,
            });
            self.pieces.append(&mut self.buffers.writable);
            self.room += len;
        }
    }

    /// Takes one step with the frame that waits, or with the next one.
    fn advance(&mut self, queue: &mut VirtQueue, metrics: &Direction) -> Outcome {
        if queue.is_broken() || self.chains.is_empty() {
            return Outcome::Starved;
        }
        if self.frame.is_none() {
            match self.read() {
                Ok(frame) => self.frame = Some(frame),
                Err(error) => return read_failed(&error, queue.index, metrics),
            }
        }
        match self.fate(queue) {
            Fate::Deliver => {
                let len = self.deliver(queue);
                metrics.passed(len.saturating_sub(HEADER_LEN));
                Outcome::More
            }
            Fate::Drop => {
                self.frame = None;
                metrics.drop_one();
                Outcome::More
            }
            Fate::Wait => Outcome::Starved,
        }
    }

    /// Reads a frame into the driver's buffers and what is longer into the
    /// spill.
    fn read(&mut self) -> io::Result<Frame> {
        let kept = self.pieces.split_off(self.pieces.len().min(MAX_PIECES));
        // SAFETY: the pieces lie in guest memory, which the queue keeps mapped.
        let frame = unsafe { self.spill.read(&*self.frames, &mut self.pieces) };
        self.pieces.extend(kept);
        frame
    }

    fn fate(&self, queue: &VirtQueue) -> Fate {
        let Some(frame) = &self.frame else {
            return Fate::Wait;
        };
        if Spill::is_cut(frame) {
            Fate::Drop
        } else if frame.len <= self.room {
            Fate::Deliver
        } else if !self.mergeable
            || self.pieces.len() >= MAX_PIECES
            || self.chains.len() >= usize::from(queue.queue.size() / 2)
        {
            // It will never fit, or the driver had its chance: half its ring
            // does not hold the frame.
            Fate::Drop
        } else {
            Fate::Wait
        }
    }

    /// Completes the frame, which fits, and hands its buffers to the driver.
    /// Returns the frame's length.
    fn deliver(&mut self, queue: &mut VirtQueue) -> usize {
        let Some(frame) = self.frame.take() else {
            return 0;
        };
        copy_at(&self.pieces, frame.direct, self.spill.tail(&frame));
        self.done.clear();
        let (mut left, mut pieces) = (frame.len, 0);
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let n = left.min(chain.len);
            // A chain is shorter than 4 GiB: `pop` sees to it.
            self.done.push((chain.head, n as u32));
            left -= n;
            pieces += chain.pieces;
            self.room -= chain.len;
        }
        let count = self.done.len() as u16;
        copy_at(&self.pieces, NUM_BUFFERS, &count.to_le_bytes());
        self.pieces.drain(..pieces);
        self.used.push(queue, &self.done);
        frame.len
    }
}
