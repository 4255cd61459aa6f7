//! The guest's side of grants and rings, for tests of backends.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::grant::{GrantTable, PAGE};
use super::{BACKEND, EventChannels, GUEST};
use crate::virtio::testing::ram;

/// `GTF_permit_access`, `GTF_readonly`, `GTF_reading | GTF_writing`.
const PERMIT_ACCESS: u16 = 1;
const READONLY: u16 = 1 << 2;
const IN_USE: u16 = 3 << 3;

/// A guest's memory and its grant table, which has the last page of memory.
/// Reference n is for whatever page the test says.
pub(crate) struct Guest {
    pub(crate) ram: GuestRam,
    pub(crate) grants: Arc<GrantTable>,
    table: u64,
}

impl Guest {
    /// A guest with `pages` pages of memory.
    pub(crate) fn new(pages: usize) -> Self {
        let ram = ram(pages * PAGE);
        let table = ((pages - 1) * PAGE) as u64;
        let grants = Arc::new(GrantTable::new(ram.clone(), GuestAddress(table), 1));
        Self { ram, grants, table }
    }

    fn entry(&self, reference: u32) -> GuestAddress {
        GuestAddress(self.table + 8 * u64::from(reference))
    }

    /// Writes an entry as it is.
    pub(crate) fn put(&self, reference: u32, flags: u16, domain: u16, frame: u32) {
        let entry = u64::from(flags) | u64::from(domain) << 16 | u64::from(frame) << 32;
        self.ram.write_obj(entry, self.entry(reference)).unwrap();
    }

    /// Grants page `frame` to the backends.
    pub(crate) fn grant(&self, reference: u32, frame: u32) {
        self.put(reference, PERMIT_ACCESS, BACKEND, frame);
    }

    /// Grants page `frame` for reading.
    pub(crate) fn grant_readonly(&self, reference: u32, frame: u32) {
        self.put(reference, PERMIT_ACCESS | READONLY, BACKEND, frame);
    }

    /// Grants page `frame` to another domain.
    pub(crate) fn grant_to_stranger(&self, reference: u32, frame: u32) {
        self.put(reference, PERMIT_ACCESS, GUEST + 1, frame);
    }

    /// Whether a backend has the page mapped.
    pub(crate) fn in_use(&self, reference: u32) -> bool {
        let flags: u16 = self
            .ram
            .load(self.entry(reference), Ordering::Acquire)
            .unwrap();
        flags & IN_USE != 0
    }

    /// The guest in a new process: its memory is all that is left, with the
    /// marks of its mappings in `entries`.
    pub(crate) fn moved(&mut self, entries: &[u8]) -> Arc<GrantTable> {
        let table = GuestAddress(self.table);
        self.ram.write_slice(entries, table).unwrap();
        self.grants = Arc::new(GrantTable::new(self.ram.clone(), table, 1));
        Arc::clone(&self.grants)
    }

    /// The grant table's bytes.
    pub(crate) fn entries(&self) -> Vec<u8> {
        let mut entries = vec![0; PAGE];
        let table = GuestAddress(self.table);
        self.ram.read_slice(&mut entries, table).unwrap();
        entries
    }

    /// Takes a grant back, as the guest does: not while it is in use.
    pub(crate) fn revoke(&self, reference: u32) -> bool {
        let free = !self.in_use(reference);
        if free {
            self.put(reference, 0, 0, 0);
        }
        free
    }
}

/// The guest's ends of its event channels; every port below 100 may be bound.
#[derive(Default)]
pub(crate) struct Events {
    bound: Mutex<BTreeMap<u32, EventFd>>,
    notified: AtomicUsize,
}

impl Events {
    /// Notifies the backend.
    pub(crate) fn send(&self, port: u32) {
        self.bound.lock().unwrap()[&port].write(1).unwrap();
    }

    /// Ports that backends have bound.
    pub(crate) fn bound(&self) -> Vec<u32> {
        self.bound.lock().unwrap().keys().copied().collect()
    }

    /// Notifications by backends.
    pub(crate) fn notified(&self) -> usize {
        self.notified.load(Ordering::SeqCst)
    }
}

impl EventChannels for Events {
    fn bind(&self, port: u32, kick: &EventFd) -> io::Result<()> {
        let mut bound = self.bound.lock().unwrap();
        if port >= 100 || bound.contains_key(&port) {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        bound.insert(port, kick.try_clone()?);
        Ok(())
    }

    fn unbind(&self, port: u32) {
        self.bound.lock().unwrap().remove(&port);
    }

    fn notify(&self, _: u32) {
        self.notified.fetch_add(1, Ordering::SeqCst);
    }
}

/// The frontend's side of a ring whose pages are contiguous in guest memory.
pub(crate) struct FrontRing {
    ram: GuestRam,
    base: u64,
    entry: usize,
    entries: u32,
    pub(crate) req_prod: u32,
    pub(crate) rsp_cons: u32,
}

/// Where the ring's indices are.
const REQ_PROD: u64 = 0;
const REQ_EVENT: u64 = 4;
const RSP_PROD: u64 = 8;
const RSP_EVENT: u64 = 12;

impl FrontRing {
    /// An empty ring of `pages` pages from `base` on with entries of `entry`
    /// bytes.
    pub(crate) fn new(ram: &GuestRam, base: u64, pages: usize, entry: usize) -> Self {
        let entries = 1 << ((pages * PAGE - 64) / entry).ilog2();
        let ring = Self {
            ram: ram.clone(),
            base,
            entry,
            entries,
            req_prod: 0,
            rsp_cons: 0,
        };
        for (offset, value) in [(REQ_PROD, 0), (RSP_PROD, 0), (REQ_EVENT, 1), (RSP_EVENT, 1)] {
            ring.store(offset, value);
        }
        ring
    }

    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    fn store(&self, offset: u64, value: u32) {
        let addr = GuestAddress(self.base + offset);
        self.ram.store(value, addr, Ordering::SeqCst).unwrap();
    }

    fn load(&self, offset: u64) -> u32 {
        let addr = GuestAddress(self.base + offset);
        self.ram.load(addr, Ordering::SeqCst).unwrap()
    }

    fn slot(&self, index: u32) -> GuestAddress {
        let index = u64::from(index % self.entries);
        GuestAddress(self.base + 64 + index * self.entry as u64)
    }

    /// Puts a request into the ring, not published yet.
    pub(crate) fn push(&mut self, request: &[u8]) {
        assert!(request.len() <= self.entry);
        assert!(self.req_prod.wrapping_sub(self.rsp_cons) < self.entries);
        let slot = self.slot(self.req_prod);
        self.ram.write_slice(request, slot).unwrap();
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// Publishes the requests. True if the backend wants a notification.
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.load(REQ_PROD), self.req_prod);
        self.store(REQ_PROD, new);
        let event = self.load(REQ_EVENT);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Writes the producer's index as it is.
    pub(crate) fn claim(&self, req_prod: u32) {
        self.store(REQ_PROD, req_prod);
    }

    /// Starts both sides' indices at `index`.
    pub(crate) fn start_at(&mut self, index: u32) {
        self.req_prod = index;
        self.rsp_cons = index;
        self.store(REQ_PROD, index);
        self.store(RSP_PROD, index);
        self.store(REQ_EVENT, index.wrapping_add(1));
        self.store(RSP_EVENT, index.wrapping_add(1));
    }

    /// Takes the next response of `N` bytes. If there is none, asks for a
    /// notification of the next.
    pub(crate) fn pop<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.load(RSP_PROD) == self.rsp_cons {
            self.store(RSP_EVENT, self.rsp_cons.wrapping_add(1));
            if self.load(RSP_PROD) == self.rsp_cons {
                return None;
            }
        }
        let mut response = [0; N];
        let slot = self.slot(self.rsp_cons);
        self.ram.read_slice(&mut response, slot).unwrap();
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Some(response)
    }
}
