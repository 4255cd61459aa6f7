//! Pages of other domains: `/dev/xen/gntdev`.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::ioctl::ioctl_with_mut_ptr;

use super::abi::{GNTDEV_MAP_GRANT_REF, GNTDEV_UNMAP_GRANT_REF, Range};
use super::{Error, Memory, checked, open, own_domain};
use crate::grant::{Access, Granter};

/// Maps pages that other domains grant.
#[derive(Clone, Debug)]
pub struct Mapper {
    driver: Arc<File>,
    /// The number of this domain.
    own: u16,
}

impl Mapper {
    /// Opens the driver.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::Store`].
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            driver: open("/dev/xen/gntdev", "xen_gntdev")?,
            own: own_domain()?,
        })
    }

    /// Maps the pages that `domain` grants as `references`, side by side: all
    /// of them, or none.
    ///
    /// # Errors
    /// [`Error::Count`]; [`Error::Own`]; [`Error::Refused`]: one of them is not
    /// granted to this domain, or not this way.
    pub fn map(&self, domain: u16, references: &[u32], access: Access) -> Result<Memory, Error> {
        let count = checked(references.len())?;
        // Xen keeps no page of a domain with translated memory at two places.
        if domain == self.own {
            return Err(Error::Own { domain });
        }
        let mut request = request(domain, references);
        // SAFETY: the driver reads the 16 bytes in front and `count` entries of
        // 8 bytes behind them, and writes the second word.
        let done = unsafe {
            let call = GNTDEV_MAP_GRANT_REF();
            ioctl_with_mut_ptr(&*self.driver, call, request.as_mut_ptr())
        };
        if done < 0 {
            return Err(Error::last("have pages mapped"));
        }
        let range = Range::new(request[1], count);
        let writable = access == Access::Write;
        // Xen is asked now.
        Memory::map(&self.driver, range, GNTDEV_UNMAP_GRANT_REF(), writable)
            .map_err(|source| refusal(domain, references, source))
    }
}

/// `struct ioctl_gntdev_map_grant_ref`: count (32 bits), padding, index (64),
/// then domain (32) and reference (32) of each page.
pub(super) fn request(domain: u16, references: &[u32]) -> Vec<u64> {
    let mut request = vec![references.len() as u64, 0];
    let page = |reference: &u32| u64::from(domain) | u64::from(*reference) << 32;
    request.extend(references.iter().map(page));
    request
}

/// The driver does not tell what Xen objects to.
fn refusal(domain: u16, references: &[u32], source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EINVAL | libc::EAGAIN | libc::EPERM) => Error::Refused {
            domain,
            references: references.to_vec(),
        },
        _ => Error::System {
            what: "map pages of another domain",
            source,
        },
    }
}

/// A domain whose pages a backend maps one by one.
#[derive(Debug)]
pub struct Peer {
    mapper: Mapper,
    domain: u16,
}

impl Peer {
    /// The pages that `domain` grants.
    #[must_use]
    pub fn new(mapper: Mapper, domain: u16) -> Self {
        Self { mapper, domain }
    }
}

impl Granter for Peer {
    type Page = Memory;
    type Error = Error;

    fn map(self: &Arc<Self>, reference: u32, access: Access) -> Result<Memory, Error> {
        self.mapper.map(self.domain, &[reference], access)
    }

    /// Always: Xen lets no domain take back a page that another has mapped.
    fn stands(&self, _: &Memory) -> bool {
        true
    }

    fn may_be_readable(error: &Error) -> bool {
        matches!(error, Error::Refused { .. })
    }
}
