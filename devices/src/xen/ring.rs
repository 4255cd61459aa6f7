//! The ring that a frontend and its backend share
//! (`xen/include/public/io/ring.h`), seen from the backend.
//!
//! One page or several begin with the four indices, then come the entries: a
//! response takes the place of a request. The guest writes all of it at any
//! time. So the backend keeps its own indices, never reads back what it wrote,
//! copies each request before looking at it, and calls a ring broken whose
//! producer claims what cannot be.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use blanket_memory::{IoVec, iovec};
use serde::{Deserialize, Serialize};

use super::grant::{Access, Grant, PAGE};

/// Where the entries begin.
const HEADER: usize = 64;

/// What a ring begins with.
#[repr(C)]
struct Header {
    req_prod: AtomicU32,
    req_event: AtomicU32,
    rsp_prod: AtomicU32,
    rsp_event: AtomicU32,
}

/// Why a ring cannot be used (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A ring has 1, 2, 4, ... pages.
    #[error("a ring of {pages} pages: give it a power of two")]
    Pages {
        /// As many were given.
        pages: usize,
    },
    /// A page of it cannot be written.
    #[error("page {reference} of the ring cannot be written")]
    ReadOnly {
        /// The page's grant.
        reference: u32,
    },
    /// The indices cannot be: more requests than there is room for.
    #[error("{requests} requests in a ring with room for {room}")]
    Overflow {
        /// Requests, as the index of their producer has it.
        requests: u32,
        /// Entries that are not in the backend's hands.
        room: u32,
    },
}

/// A backend's own indices. They only grow, and wrap at 2³².
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Indices {
    /// The next request to take.
    pub req_cons: u32,
    /// The next response to give.
    pub rsp_prod: u32,
}

/// A shared ring with requests of `REQUEST` and responses of `RESPONSE` bytes.
pub struct Ring<const REQUEST: usize, const RESPONSE: usize> {
    pages: Vec<Grant>,
    /// In the first page.
    header: IoVec,
    entries: u32,
    indices: Indices,
    /// Requests up to here were there at the last look.
    req_prod: u32,
    /// Responses up to here are visible to the guest.
    published: u32,
}

impl<const REQUEST: usize, const RESPONSE: usize> Ring<REQUEST, RESPONSE> {
    /// Bytes of an entry: a request and a response share it.
    const ENTRY: usize = if REQUEST > RESPONSE {
        REQUEST
    } else {
        RESPONSE
    };

    /// The ring in `pages`, in their order, from where its last backend left
    /// it: the frontend knows its own state best.
    ///
    /// # Errors
    /// The pages make no ring, or its indices cannot be.
    pub fn new(pages: Vec<Grant>) -> Result<Self, Error> {
        let mut ring = Self::build(pages)?;
        let next = ring.header().rsp_prod.load(Ordering::Acquire);
        ring.set(Indices {
            req_cons: next,
            rsp_prod: next,
        });
        ring.available()?;
        Ok(ring)
    }

    /// The ring in `pages` with a saved backend's indices.
    ///
    /// # Errors
    /// The pages make no ring, or the indices do not fit.
    pub fn restore(pages: Vec<Grant>, indices: Indices) -> Result<Self, Error> {
        let mut ring = Self::build(pages)?;
        let taken = indices.req_cons.wrapping_sub(indices.rsp_prod);
        if taken > ring.entries {
            return Err(Error::Overflow {
                requests: taken,
                room: ring.entries,
            });
        }
        ring.set(indices);
        Ok(ring)
    }

    fn build(pages: Vec<Grant>) -> Result<Self, Error> {
        let count = pages.len();
        if !count.is_power_of_two() {
            return Err(Error::Pages { pages: count });
        }
        let pages_error = Error::Pages { pages: count };
        let header = pages[0].iovec(0, HEADER).map_err(|_| pages_error)?;
        if !(header.as_ptr() as usize).is_multiple_of(align_of::<Header>()) {
            return Err(pages_error);
        }
        if let Some(page) = pages.iter().find(|page| page.access() != Access::Write) {
            let reference = page.reference();
            return Err(Error::ReadOnly { reference });
        }
        let entries = u32::try_from((count * PAGE - HEADER) / Self::ENTRY)
            .ok()
            .and_then(u32::checked_ilog2)
            .ok_or(pages_error)?;
        Ok(Self {
            pages,
            header,
            entries: 1 << entries,
            indices: Indices::default(),
            req_prod: 0,
            published: 0,
        })
    }

    fn set(&mut self, indices: Indices) {
        self.indices = indices;
        self.req_prod = indices.req_cons;
        self.published = indices.rsp_prod;
    }

    /// Requests and responses that fit.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// The backend's indices. To be saved when every response is published.
    #[must_use]
    pub fn indices(&self) -> Indices {
        self.indices
    }

    /// The references of its pages, in their order.
    #[must_use]
    pub fn references(&self) -> Vec<u32> {
        self.pages.iter().map(Grant::reference).collect()
    }

    /// Requests that wait to be taken.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn available(&mut self) -> Result<u32, Error> {
        let req_prod = self.header().req_prod.load(Ordering::Acquire);
        let Indices { req_cons, rsp_prod } = self.indices;
        let requests = req_prod.wrapping_sub(req_cons);
        let room = self.entries - req_cons.wrapping_sub(rsp_prod);
        // A producer that went back shows as far too many, too.
        if requests > room {
            return Err(Error::Overflow { requests, room });
        }
        self.req_prod = req_prod;
        Ok(requests)
    }

    /// Takes the next request: a copy that nobody changes any more.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop(&mut self) -> Result<Option<[u8; REQUEST]>, Error> {
        if self.req_prod == self.indices.req_cons && self.available()? == 0 {
            return Ok(None);
        }
        let mut request = [0; REQUEST];
        let pieces = self.entry(self.indices.req_cons, REQUEST);
        let read = iovec::read_bytes(&pieces, &mut request);
        debug_assert_eq!(read, REQUEST);
        self.indices.req_cons = self.indices.req_cons.wrapping_add(1);
        Ok(Some(request))
    }

    /// Gives the last `requests` that were taken back, none of which was
    /// answered: [`Ring::pop`] reads them again.
    pub fn rewind(&mut self, requests: u32) {
        let Indices { req_cons, rsp_prod } = self.indices;
        debug_assert!(requests <= req_cons.wrapping_sub(rsp_prod));
        self.indices.req_cons = req_cons.wrapping_sub(requests);
    }

    /// Puts a response into the ring, for a request that was taken before.
    /// The guest sees it after [`Ring::publish`].
    pub fn push(&mut self, response: &[u8; RESPONSE]) {
        debug_assert_ne!(self.indices.rsp_prod, self.indices.req_cons);
        let pieces = self.entry(self.indices.rsp_prod, RESPONSE);
        let written = iovec::write_bytes(&pieces, response);
        debug_assert_eq!(written, RESPONSE);
        let offset = self.offset(self.indices.rsp_prod);
        // Entries may lie across two pages.
        let pages = offset / PAGE..=(offset + RESPONSE - 1) / PAGE;
        self.pages
            .get(pages)
            .into_iter()
            .flatten()
            .for_each(Grant::written);
        self.indices.rsp_prod = self.indices.rsp_prod.wrapping_add(1);
    }

    /// Responses that were pushed and not published.
    #[must_use]
    pub fn unpublished(&self) -> u32 {
        self.indices.rsp_prod.wrapping_sub(self.published)
    }

    /// Shows the guest what was pushed. True if it wants to be notified.
    #[must_use = "the guest may wait for a notification"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.indices.rsp_prod);
        if old == new {
            return false;
        }
        // The guest sees the responses before their index ...
        self.header().rsp_prod.store(new, Ordering::Release);
        self.header_written();
        self.published = new;
        // ... and the index before the backend looks whether it is awaited.
        fence(Ordering::SeqCst);
        let event = self.header().rsp_event.load(Ordering::Relaxed);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks for a notification when `more` requests (at least one) have come.
    /// True if as many are there already: take them, none will be notified.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn wait_for(&mut self, more: u32) -> Result<bool, Error> {
        let event = self.indices.req_cons.wrapping_add(more);
        self.header().req_event.store(event, Ordering::Relaxed);
        self.header_written();
        // The guest sees the event before the backend looks the last time.
        fence(Ordering::SeqCst);
        Ok(self.available()? >= more)
    }

    fn header(&self) -> &Header {
        let header = self.header.as_ptr().cast::<Header>();
        // SAFETY: `build` took the pointer from the first page, which is longer
        // than the header, aligned, and mapped as long as `pages` has it. The
        // guest's accesses are as those of another thread: the fields are atomic.
        unsafe { &*header }
    }

    /// Notes that the header was written.
    fn header_written(&self) {
        if let Some(page) = self.pages.first() {
            page.written();
        }
    }

    /// Where the entry of `index` is, in bytes from the first page on.
    fn offset(&self, index: u32) -> usize {
        HEADER + (index & (self.entries - 1)) as usize * Self::ENTRY
    }

    /// Where the first `len` bytes of the entry of `index` are: entries may lie
    /// across pages.
    fn entry(&self, index: u32, len: usize) -> [IoVec; 2] {
        let offset = self.offset(index);
        let (page, start) = (offset / PAGE, offset % PAGE);
        let first = len.min(PAGE - start);
        [(page, start, first), (page + 1, 0, len - first)].map(|(page, start, len)| {
            self.pages
                .get(page)
                .and_then(|page| page.iovec(start, len).ok())
                .unwrap_or(IoVec::new(std::ptr::null_mut(), 0))
        })
    }
}

#[cfg(test)]
mod tests;
