//! From the other end to the guest.

use std::collections::VecDeque;
use std::sync::Arc;

use blanket_drivers::grant::{Page, Pages};
use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::{IoVec, iovec};

use super::Broken;
use super::abi::{
    Gso, MAX_SLOTS, RX_EXTRA_INFO, RX_MORE_DATA, RX_SLOT, RxRequest, gso_extra, rx_response,
};
use super::vnet::{self, Features};
use crate::net::{Direction, Frame, FrameQueue, Outcome, Spill, copy_at, read_failed};
use crate::xen::grant::{Access, GrantTable, PAGE};
use crate::xen::ring::Ring;

/// Packets that are received before others have their turn.
const BUDGET: usize = 128;
/// Slots that are shown to the guest at once.
const BATCH: u32 = 64;
/// Slots for the longest packet: 64 KiB with an Ethernet header.
const LONGEST: usize = 17;

/// The ring of receive requests.
pub(super) type RxRing = Ring<RX_SLOT, RX_SLOT>;

/// A page that the frontend has granted for a packet.
struct Buffer {
    id: u16,
    page: Page<GrantTable>,
}

/// Receives packets.
///
/// A frame's length and whether it is to be segmented are known only when it
/// has been read, and then it lies where it lies. The extra of a packet to be
/// segmented takes the second slot, so where there can be one, a frame is read
/// into the first page, the third and so on. The rare packet that is longer
/// than a page and *not* to be segmented is moved by a page then.
pub(super) struct Rx {
    frames: Arc<dyn FrameQueue>,
    grants: Pages<GrantTable>,
    features: Features,
    /// Slots of the longest packet.
    most: usize,
    buffers: VecDeque<Buffer>,
    pieces: Vec<IoVec>,
    header: Box<[u8; HEADER_LEN]>,
    spill: Spill,
    /// A frame that waits for buffers, partly in the spill.
    frame: Option<Frame>,
}

impl Rx {
    pub(super) fn new(
        frames: &Arc<dyn FrameQueue>,
        grants: Pages<GrantTable>,
        features: Features,
    ) -> Self {
        let most = match (features.sg, features.gso()) {
            (false, _) => 1,
            (true, false) => LONGEST,
            (true, true) => LONGEST + 1,
        };
        debug_assert!(most <= MAX_SLOTS);
        Self {
            frames: Arc::clone(frames),
            grants,
            features,
            most,
            buffers: VecDeque::new(),
            pieces: Vec::new(),
            header: Box::new([0; HEADER_LEN]),
            spill: Spill::new(),
            frame: None,
        }
    }

    /// Where frames come from.
    pub(super) fn frames(&self) -> &Arc<dyn FrameQueue> {
        &self.frames
    }

    /// Moves frames into the frontend's buffers. Calls `notify` when the
    /// frontend waits for them.
    ///
    /// # Errors
    /// The ring is broken.
    pub(super) fn receive(
        &mut self,
        ring: &mut RxRing,
        metrics: &Direction,
        notify: &dyn Fn(),
    ) -> Result<Outcome, Broken> {
        let mut outcome = Outcome::More;
        let mut done = 0;
        for _ in 0..BUDGET {
            self.gather(ring)?;
            outcome = self.advance(ring, metrics, &mut done);
            if outcome == Outcome::Starved && ring.wait_for(1)? {
                outcome = Outcome::More;
            }
            if outcome != Outcome::More {
                break;
            }
            if done >= BATCH {
                done = 0;
                if ring.publish() {
                    notify();
                }
            }
        }
        if ring.publish() {
            notify();
        }
        Ok(outcome)
    }

    /// Gives unused buffers back to the ring, for whoever serves it next.
    pub(super) fn give_back(&mut self, ring: &mut RxRing, metrics: &Direction) {
        if self.frame.take().is_some() {
            metrics.drop_one();
        }
        // A frame that is dropped may lie in some.
        self.buffers.iter().for_each(|it| it.page.written());
        // At most as many as a packet has slots.
        ring.rewind(self.buffers.len() as u32);
        self.buffers.clear();
    }

    /// Takes buffers until any packet fits.
    fn gather(&mut self, ring: &mut RxRing) -> Result<(), Broken> {
        while self.buffers.len() < self.most {
            let Some(slot) = ring.pop()? else {
                break;
            };
            let request = RxRequest::from(slot);
            match self.grants.map(request.reference, Access::Write) {
                Ok(page) => self.buffers.push_back(Buffer {
                    id: request.id,
                    page,
                }),
                Err(error) => {
                    ring.rewind(1);
                    return Err(Broken::Grant(error));
                }
            }
        }
        Ok(())
    }

    /// Takes one step with the frame that waits, or with the next one.
    fn advance(&mut self, ring: &mut RxRing, metrics: &Direction, done: &mut u32) -> Outcome {
        if self.buffers.is_empty() {
            return Outcome::Starved;
        }
        let frame = match self.frame.take() {
            Some(frame) => frame,
            None => match self.read() {
                Ok(frame) => frame,
                Err(error) => return read_failed(&error, 0, metrics),
            },
        };
        let Some(len) = frame.len.checked_sub(HEADER_LEN).filter(|len| *len > 0) else {
            metrics.refuse_one();
            return Outcome::More;
        };
        let gso = vnet::is_gso(&self.header);
        if gso && !self.features.gso() {
            metrics.refuse_one();
            return Outcome::More;
        }
        let slots = len.div_ceil(PAGE) + usize::from(gso);
        if slots > self.most || Spill::is_cut(&frame) {
            metrics.drop_one();
            return Outcome::More;
        }
        if slots > self.buffers.len() {
            self.frame = Some(frame);
            return Outcome::Starved;
        }
        self.lay_out(&frame, gso);
        match vnet::to_guest(&self.header, &self.pieces, self.features) {
            Some(packet) => {
                *done += self.deliver(ring, packet.flags, packet.gso);
                metrics.passed(len);
            }
            None => metrics.refuse_one(),
        }
        Outcome::More
    }

    /// Reads a frame into the buffers, and what is longer into the spill.
    fn read(&mut self) -> std::io::Result<Frame> {
        self.point(self.features.gso(), self.buffers.len() * PAGE);
        let header = IoVec::new(self.header.as_mut_ptr(), HEADER_LEN);
        self.pieces.insert(0, header);
        // SAFETY: the first piece is the header, the others lie in guest
        // memory, which the grants in `buffers` keep mapped.
        unsafe { self.spill.read(&*self.frames, &mut self.pieces) }
    }

    /// Lets `pieces` be `len` bytes in the buffers, the second one left out if
    /// an extra is to take its place.
    fn point(&mut self, extra: bool, len: usize) {
        self.pieces.clear();
        let mut left = len;
        for (i, buffer) in self.buffers.iter().enumerate() {
            if extra && i == 1 {
                continue;
            }
            let n = left.min(PAGE);
            self.pieces.extend(buffer.page.iovec(0, n));
            left -= n;
            if left == 0 {
                break;
            }
        }
    }

    /// Brings the frame into place: `pieces` are its bytes then.
    fn lay_out(&mut self, frame: &Frame, gso: bool) {
        let len = frame.len - HEADER_LEN;
        let direct = frame.direct - HEADER_LEN;
        self.point(gso, len);
        if self.features.gso() && !gso {
            for i in 1..direct.min(len).div_ceil(PAGE) {
                let n = PAGE.min(direct.min(len) - i * PAGE);
                self.move_page(i + 1, i, n);
            }
        }
        copy_at(&self.pieces, direct, self.spill.tail(frame));
    }

    /// Copies the first `len` bytes of one buffer to another.
    fn move_page(&mut self, from: usize, to: usize, len: usize) {
        let mut bytes = [0; PAGE];
        let page = |i: usize| self.buffers.get(i)?.page.iovec(0, len).ok();
        if let (Some(from), Some(to)) = (page(from), page(to)) {
            let n = iovec::read_bytes(&[from], &mut bytes);
            iovec::write_bytes(&[to], &bytes[..n]);
        }
    }

    /// Hands the packet in `pieces` to the frontend; returns how many slots it
    /// takes. Each response has the slot of its own request: Linux counts on
    /// it, as extras have no room for a request's number.
    fn deliver(&mut self, ring: &mut RxRing, flags: u16, gso: Option<Gso>) -> u32 {
        let mut slots = 0;
        let count = self.pieces.len();
        for (i, piece) in self.pieces.iter().enumerate() {
            let Some(buffer) = self.buffers.pop_front() else {
                break;
            };
            let mut own = if i == 0 { flags } else { 0 };
            if i + 1 < count {
                own |= RX_MORE_DATA;
            }
            if i == 0 && gso.is_some() {
                own |= RX_EXTRA_INFO;
            }
            buffer.page.written();
            drop(buffer.page);
            ring.push(&rx_response(buffer.id, own, piece.len()));
            slots += 1;
            if i == 0
                && let Some(gso) = gso
            {
                if let Some(buffer) = self.buffers.pop_front() {
                    buffer.page.written();
                }
                ring.push(&gso_extra(gso));
                slots += 1;
            }
        }
        slots
    }
}
