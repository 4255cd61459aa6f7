mod connection;
mod hostile;
mod receive;
mod transmit;

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use blanket_drivers::grant::Pages;
use blanket_drivers::tap::{HEADER_LEN, TapQueue};
use vm_memory::{Bytes, GuestAddress};

use super::Broken;
use super::abi::{RX_SLOT, TX_REQUEST};
use super::rx::{Rx, RxRing};
use super::tx::{Tx, TxRing};
use super::vnet::Features;
use crate::net::{FrameQueue, Metrics, Outcome};
use crate::xen::grant::{Access, PAGE};
use crate::xen::testing::{FrontRing, Guest};

/// Pages of the guest.
const PAGES: usize = 512;
/// Pages of the rings, granted under the same numbers.
const TX_PAGE: u32 = 1;
const RX_PAGE: u32 = 2;
/// First page for data, granted by the same number unless a test takes it back.
const DATA: u32 = 16;

const ALL: Features = Features {
    sg: true,
    checksum: true,
    gso4: true,
    gso6: true,
};

/// A guest with two rings, as its frontend sees them.
struct Front {
    guest: Guest,
    tx: FrontRing,
    rx: FrontRing,
}

impl Front {
    fn new() -> Self {
        let guest = Guest::new(PAGES);
        guest.grant(TX_PAGE, TX_PAGE);
        guest.grant(RX_PAGE, RX_PAGE);
        for page in DATA..PAGES as u32 - 1 {
            guest.grant(page, page);
        }
        let ring =
            |page: u32, entry| FrontRing::new(&guest.ram, u64::from(page) * PAGE as u64, 1, entry);
        Self {
            tx: ring(TX_PAGE, TX_REQUEST),
            rx: ring(RX_PAGE, RX_SLOT),
            guest,
        }
    }

    /// Puts a slot of a packet into the ring; its number is that of its grant.
    fn slot(&mut self, reference: u32, offset: u16, size: u16, flags: u16) {
        let mut request = reference.to_le_bytes().to_vec();
        for field in [offset, flags, reference as u16, size] {
            request.extend(field.to_le_bytes());
        }
        self.tx.push(&request);
    }

    /// Puts an extra about segmentation into the ring.
    fn gso(&mut self, kind: u8, size: u16) {
        let [s0, s1] = size.to_le_bytes();
        self.tx.push(&[1, 0, s0, s1, kind, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Takes an answer: (number of the request, status).
    fn sent(&mut self) -> Option<(u16, i16)> {
        let [i0, i1, s0, s1] = self.tx.pop::<4>()?;
        Some((u16::from_le_bytes([i0, i1]), i16::from_le_bytes([s0, s1])))
    }

    /// Offers pages for packets. True if the backend is to be notified.
    fn offer(&mut self, pages: std::ops::Range<u32>) -> bool {
        for page in pages {
            let mut request = (page as u16).to_le_bytes().to_vec();
            request.extend([0, 0]);
            request.extend(page.to_le_bytes());
            self.rx.push(&request);
        }
        self.rx.publish()
    }

    /// Takes the next slot of a received packet.
    fn received(&mut self) -> Option<[u8; RX_SLOT]> {
        self.rx.pop()
    }

    fn write(&self, page: u32, offset: u64, bytes: &[u8]) {
        let addr = GuestAddress(u64::from(page) * PAGE as u64 + offset);
        self.guest.ram.write_slice(bytes, addr).unwrap();
    }

    fn read(&self, page: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let addr = GuestAddress(u64::from(page) * PAGE as u64);
        self.guest.ram.read_slice(&mut bytes, addr).unwrap();
        bytes
    }
}

/// A queue with a datagram socket in the TAP's place.
struct Rig {
    front: Front,
    tx_ring: TxRing,
    rx_ring: RxRing,
    tx: Tx,
    rx: Rx,
    peer: UnixDatagram,
    metrics: Metrics,
    /// Notifications of the frontend.
    notified: Cell<usize>,
}

impl Rig {
    fn new(features: Features) -> Self {
        let front = Front::new();
        let page = |reference| vec![front.guest.grants.map(reference, Access::Write).unwrap()];
        let (tx_ring, rx_ring) = (
            TxRing::new(page(TX_PAGE)).unwrap(),
            RxRing::new(page(RX_PAGE)).unwrap(),
        );
        let pages = || Pages::new(Arc::clone(&front.guest.grants), None, &Arc::default());
        let (tx_pages, rx_pages) = (pages(), pages());
        let (tap, peer) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        peer.set_nonblocking(true).unwrap();
        let tap: Arc<dyn FrameQueue> = Arc::new(TapQueue::from(OwnedFd::from(tap)));
        Self {
            tx: Tx::new(&tap, tx_pages),
            rx: Rx::new(&tap, rx_pages, features),
            front,
            tx_ring,
            rx_ring,
            peer,
            metrics: Metrics::default(),
            notified: Cell::new(0),
        }
    }

    fn send(&mut self) -> Result<bool, Broken> {
        let notify = || self.notified.set(self.notified.get() + 1);
        self.tx.send(&mut self.tx_ring, &self.metrics.tx, &notify)
    }

    fn receive(&mut self) -> Result<Outcome, Broken> {
        let notify = || self.notified.set(self.notified.get() + 1);
        self.rx
            .receive(&mut self.rx_ring, &self.metrics.rx, &notify)
    }

    fn count(&self, name: &str) -> u64 {
        let all = self.metrics.read();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// `len` bytes that differ from place to place.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

/// A frame as a TAP has it: a packet of `bytes` behind `header`.
fn frame(header: [u8; HEADER_LEN], len: usize) -> Vec<u8> {
    [&header[..], &bytes(len)].concat()
}
