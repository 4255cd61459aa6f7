//! From the guest to the other end.

use std::sync::Arc;

use blanket_drivers::grant::{Page, Pages};
use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::{IoVec, iovec};

use super::Broken;
use super::abi::{
    Extra, Gso, MAX_SLOTS, Status, TX_CSUM_BLANK, TX_EXTRA_INFO, TX_MORE_DATA, TX_REQUEST,
    TX_RESPONSE, TxRequest, tx_response,
};
use super::packet::{ETHERNET, HEAD};
use super::vnet;
use crate::net::{Direction, FrameQueue, Sent, send};
use crate::xen::grant::{Access, GrantTable};
use crate::xen::ring::Ring;

/// Packets that are sent before others have their turn.
const BUDGET: usize = 128;
/// Slots whose responses are shown to the guest at once: enough for few
/// notifications, few enough for it to go on sending meanwhile.
const BATCH: u32 = 64;

/// The ring of transmit requests.
pub(super) type TxRing = Ring<TX_REQUEST, TX_RESPONSE>;

/// Sends packets.
pub(super) struct Tx {
    frames: Arc<dyn FrameQueue>,
    grants: Pages<GrantTable>,
    /// The packet's requests, in order.
    requests: Vec<TxRequest>,
    /// How many of the slots behind the first are extras.
    extras: usize,
    gso: Option<Gso>,
    pages: Vec<Page<GrantTable>>,
    pieces: Vec<IoVec>,
    /// The virtio header and a copy of the packet's first bytes: what was
    /// looked at is what is sent, whatever the guest writes meanwhile.
    head: Box<[u8; HEADER_LEN + HEAD]>,
}

impl Tx {
    pub(super) fn new(frames: &Arc<dyn FrameQueue>, grants: Pages<GrantTable>) -> Self {
        Self {
            frames: Arc::clone(frames),
            grants,
            requests: Vec::new(),
            extras: 0,
            gso: None,
            pages: Vec::new(),
            pieces: Vec::new(),
            head: Box::new([0; HEADER_LEN + HEAD]),
        }
    }

    /// Sends what the frontend has put into the ring; true if there may be
    /// more. Calls `notify` when the frontend waits for responses.
    ///
    /// # Errors
    /// The ring is broken.
    pub(super) fn send(
        &mut self,
        ring: &mut TxRing,
        metrics: &Direction,
        notify: &dyn Fn(),
    ) -> Result<bool, Broken> {
        let mut more = true;
        let mut done = 0;
        for _ in 0..BUDGET {
            if !self.take(ring)? {
                more = ring.wait_for(1)?;
                if more {
                    continue;
                }
                break;
            }
            let status = self.pass(metrics);
            done += self.respond(ring, status);
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
        Ok(more)
    }

    /// Takes the next packet's slots; false if there is none. A frontend shows
    /// a packet's slots all at once.
    fn take(&mut self, ring: &mut TxRing) -> Result<bool, Broken> {
        self.requests.clear();
        self.extras = 0;
        self.gso = None;
        let Some(first) = ring.pop()? else {
            return Ok(false);
        };
        let first = TxRequest::from(first);
        self.requests.push(first);
        let mut extra = first.flags & TX_EXTRA_INFO != 0;
        while extra {
            let slot = ring.pop()?.ok_or(Broken::Incomplete)?;
            let info = Extra::parse(&slot).ok_or(Broken::Extra)?;
            self.extras += 1;
            self.gso = info.gso.or(self.gso);
            extra = info.more;
        }
        // No more slots than the ring has.
        let mut more = first.flags & TX_MORE_DATA != 0;
        while more {
            let slot = ring.pop()?.ok_or(Broken::Incomplete)?;
            let request = TxRequest::from(slot);
            self.requests.push(request);
            more = request.flags & TX_MORE_DATA != 0;
        }
        Ok(true)
    }

    /// Sends the packet that was taken.
    fn pass(&mut self, metrics: &Direction) -> Status {
        let status = if self.map().is_some() && self.prepare().is_some() {
            // SAFETY: the first piece is the head, the others lie in guest
            // memory, which the grants in `pages` keep mapped.
            match unsafe { send(&*self.frames, &self.pieces, metrics) } {
                Sent::Passed => Status::Okay,
                Sent::Dropped => Status::Dropped,
                Sent::Refused => Status::Error,
            }
        } else {
            metrics.refuse_one();
            Status::Error
        };
        // Before the guest hears about it, which then takes the pages back.
        self.pieces.clear();
        self.pages.clear();
        status
    }

    /// Maps the packet's pages: its bytes are `pieces` then.
    fn map(&mut self) -> Option<()> {
        let (first, rest) = self.requests.split_first()?;
        if rest.len() >= MAX_SLOTS {
            return None;
        }
        // The first request has the packet's size instead of its own.
        let others = rest.iter().map(|r| usize::from(r.size)).sum();
        let own = usize::from(first.size).checked_sub(others)?;
        let sizes = std::iter::once(own).chain(rest.iter().map(|r| usize::from(r.size)));
        for (request, size) in self.requests.iter().zip(sizes) {
            let page = self.grants.map(request.reference, Access::Read).ok()?;
            let piece = page.iovec(request.offset.into(), size).ok()?;
            self.pages.push(page);
            self.pieces.push(piece);
        }
        Some(())
    }

    /// Puts the virtio header and the copied head in front of the packet.
    fn prepare(&mut self) -> Option<()> {
        let first = self.requests.first()?;
        let len = usize::from(first.size);
        if len < ETHERNET {
            return None;
        }
        let (header, head) = self.head.split_first_chunk_mut::<HEADER_LEN>()?;
        let copied = iovec::read_bytes(&self.pieces, head);
        let blank = first.flags & TX_CSUM_BLANK != 0;
        *header = vnet::to_node(&mut head[..copied], len, blank, self.gso)?;
        iovec::advance(&mut self.pieces, copied);
        let head = IoVec::new(self.head.as_mut_ptr(), HEADER_LEN + copied);
        self.pieces.insert(0, head);
        Some(())
    }

    /// Answers all slots of the packet; returns how many there are.
    fn respond(&self, ring: &mut TxRing, status: Status) -> u32 {
        let mut slots = 0;
        for (i, request) in self.requests.iter().enumerate() {
            ring.push(&tx_response(request.id, status));
            let extras = if i == 0 { self.extras } else { 0 };
            for _ in 0..extras {
                ring.push(&tx_response(0, Status::Null));
            }
            slots += 1 + extras as u32;
        }
        slots
    }
}
