//! A backend's pages: mapped for a request, or kept for the next ones.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use lru::LruCache;

use super::metrics::{Metrics, count};
use super::{Access, Granter};

/// A page and the count of its end.
struct Mapped<P> {
    page: P,
    metrics: Arc<Metrics>,
}

impl<P> Drop for Mapped<P> {
    fn drop(&mut self) {
        count(&self.metrics.unmaps);
    }
}

/// A mapped page. Requests that use a kept page share it, so it stays mapped
/// until the last of them has dropped it, whatever becomes of its grant.
pub struct Page<G: Granter>(Held<G::Page>);

enum Held<P> {
    /// Unmapped with the request.
    Once(Mapped<P>),
    /// Mapped as long as it is among the recently used.
    Kept(Arc<Mapped<P>>),
}

impl<G: Granter> Deref for Page<G> {
    type Target = G::Page;

    fn deref(&self) -> &G::Page {
        match &self.0 {
            Held::Once(mapped) => &mapped.page,
            Held::Kept(mapped) => &mapped.page,
        }
    }
}

/// Maps pages. With persistent grants the frontend uses the same pages for all
/// its requests: those used last stay mapped.
pub struct Pages<G: Granter> {
    granter: Arc<G>,
    kept: Option<LruCache<u32, Arc<Mapped<G::Page>>>>,
    metrics: Arc<Metrics>,
}

impl<G: Granter> Pages<G> {
    /// Pages that `granter` grants; up to `keep` of them stay mapped when no
    /// request uses them, or none.
    pub fn new(granter: Arc<G>, keep: Option<NonZeroUsize>, metrics: &Arc<Metrics>) -> Self {
        Self {
            granter,
            kept: keep.map(LruCache::new),
            metrics: Arc::clone(metrics),
        }
    }

    /// The page that is granted as `reference`.
    ///
    /// # Errors
    /// It is not granted, or not this way.
    pub fn map(&mut self, reference: u32, access: Access) -> Result<Page<G>, G::Error> {
        let Some(kept) = &mut self.kept else {
            return self.map_once(reference, access);
        };
        if let Some(mapped) = kept.get(&reference) {
            if self.granter.stands(&mapped.page) {
                count(&self.metrics.hits);
                return Ok(Page(Held::Kept(Arc::clone(mapped))));
            }
            count(&self.metrics.revocations);
            kept.pop(&reference);
        }
        count(&self.metrics.misses);
        // For writing: the next request with it may be of the other kind.
        match self.granter.map(reference, Access::Write) {
            Ok(page) => Ok(self.keep(reference, page)),
            Err(error) if access == Access::Read && G::may_be_readable(&error) => {
                self.map_once(reference, access)
            }
            Err(error) => {
                count(&self.metrics.refusals);
                Err(error)
            }
        }
    }

    /// Unmaps what no request uses.
    pub fn release(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.clear();
        }
    }

    fn map_once(&self, reference: u32, access: Access) -> Result<Page<G>, G::Error> {
        match self.granter.map(reference, access) {
            Ok(page) => Ok(Page(Held::Once(self.mapped(page)))),
            Err(error) => {
                count(&self.metrics.refusals);
                Err(error)
            }
        }
    }

    fn keep(&mut self, reference: u32, page: G::Page) -> Page<G> {
        let mapped = Arc::new(self.mapped(page));
        if let Some(kept) = &mut self.kept
            && kept.push(reference, Arc::clone(&mapped)).is_some()
        {
            count(&self.metrics.evictions);
        }
        Page(Held::Kept(mapped))
    }

    fn mapped(&self, page: G::Page) -> Mapped<G::Page> {
        count(&self.metrics.maps);
        Mapped {
            page,
            metrics: Arc::clone(&self.metrics),
        }
    }
}
