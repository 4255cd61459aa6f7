//! The frontend's pages: mapped for a request, or kept for the next ones.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use lru::LruCache;

use crate::xen::grant::{Access, Error, Grant, GrantTable};

/// A mapped page. Requests that use a kept page share it, so it stays mapped
/// until the last of them is done.
pub(super) enum Page {
    /// Unmapped with the request.
    Once(Grant),
    /// Mapped as long as it is among the recently used.
    Kept(Arc<Grant>),
}

impl Deref for Page {
    type Target = Grant;

    fn deref(&self) -> &Grant {
        match self {
            Self::Once(grant) => grant,
            Self::Kept(grant) => grant,
        }
    }
}

/// Maps pages. With persistent grants (`feature-persistent`) the frontend uses
/// the same pages for all its requests: those used last stay mapped.
pub(super) struct Pages {
    table: Arc<GrantTable>,
    kept: Option<LruCache<u32, Arc<Grant>>>,
}

impl Pages {
    /// Pages of `table`; up to `keep` stay mapped, or none.
    pub(super) fn new(table: Arc<GrantTable>, keep: Option<NonZeroUsize>) -> Self {
        Self {
            table,
            kept: keep.map(LruCache::new),
        }
    }

    /// The page that the guest has granted as `reference`.
    ///
    /// # Errors
    /// It has not, or not this way.
    pub(super) fn map(&mut self, reference: u32, access: Access) -> Result<Page, Error> {
        let Some(kept) = &mut self.kept else {
            return self.table.map(reference, access).map(Page::Once);
        };
        if let Some(grant) = kept.get(&reference) {
            return Ok(Page::Kept(Arc::clone(grant)));
        }
        // For writing: the next request with it may be of the other kind.
        match self.table.map(reference, Access::Write) {
            Ok(grant) => {
                let grant = Arc::new(grant);
                kept.push(reference, Arc::clone(&grant));
                Ok(Page::Kept(grant))
            }
            Err(Error::ReadOnly { .. }) if access == Access::Read => {
                self.table.map(reference, access).map(Page::Once)
            }
            Err(error) => Err(error),
        }
    }

    /// Unmaps what no request uses.
    pub(super) fn release(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.clear();
        }
    }
}
