//! Grants: pages that a guest, or another domain, lets a backend use.
//!
//! Whoever lets pages be used, and refuses the others, is a [`Granter`]: the
//! grant table of a guest in a `pv` machine, or, where Xen provides the
//! machine, a [domain](xen::Peer) beside it. A backend gets at the pages with
//! [`Pages`]. Either each page is mapped for one request, or the mappings
//! outlive their requests (*persistent grants*, `feature-persistent` of Xen's
//! block devices): a request then costs a look-up instead of a mapping and its
//! end, which takes a hypercall and a flush of the processors' TLBs under Xen.
//!
//! virtio has no grants: all of a guest's memory is mapped as long as the guest
//! lives, so there is nothing to look up, to keep or to revoke.

mod metrics;
mod pages;
#[cfg(test)]
mod tests;
pub mod xen;

use std::sync::Arc;

pub use metrics::Metrics;
pub use pages::{Page, Pages};

/// Bytes of a granted page.
pub const PAGE: usize = 4096;

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// The backend reads the page.
    Read,
    /// The backend reads and writes the page.
    Write,
}

/// Lets a backend map pages.
pub trait Granter {
    /// A mapped page. It keeps the granter alive; dropping it unmaps it.
    type Page;
    /// Why a page cannot be mapped.
    type Error;

    /// Maps the page that is granted as `reference`.
    ///
    /// # Errors
    /// It is not granted to the backend, or not for this access.
    fn map(self: &Arc<Self>, reference: u32, access: Access) -> Result<Self::Page, Self::Error>;

    /// Whether the grant that `page` was mapped by still stands. A kept page
    /// whose grant does not is never used again.
    fn stands(&self, page: &Self::Page) -> bool;

    /// Whether a page that could not be mapped for writing, because of
    /// `error`, may be granted for reading.
    fn may_be_readable(error: &Self::Error) -> bool;
}

/// The example there.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/grants.md")]
struct Documentation;
