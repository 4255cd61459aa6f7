//! Pages and events shared with other domains, where Xen provides the machine:
//! a front end to Linux's `/dev/xen/gntalloc`, `gntdev` and `evtchn`.
//!
//! An [`Allocator`] makes pages and grants them to a domain, which maps them
//! by their references with a [`Mapper`]; [`EventChannels`] tell each other
//! that there is something to see. All of it is unmapped, taken back and
//! closed when it is dropped.
//!
//! A domain maps what another has granted with a hypercall, and Xen flushes the
//! processors' TLBs at the end of each mapping. So a backend keeps mappings:
//! a [`Peer`] is a [`Granter`] for [`Pages`](super::Pages).
//!
//! The ioctls are those of Linux's `include/uapi/xen/{gntalloc,gntdev,evtchn}.h`.

mod abi;
mod allocator;
mod events;
mod mapper;
mod memory;
pub mod selftest;
mod store;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

pub use allocator::{Allocator, Shared};
pub use events::{EventChannels, Port};
pub use mapper::{Mapper, Peer};
pub use memory::Memory;
pub use store::own_domain;

/// Most pages of one call: what Linux's drivers take without being told
/// otherwise (`gntalloc.limit`).
pub const MAX_PAGES: usize = 1024;

/// Why pages or events cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device is not there, or not for this user.
    #[error("{path}: {source}; as root, after `modprobe {module}`, it opens in a guest of Xen")]
    Device {
        /// Its file.
        path: &'static str,
        /// Linux's module for it.
        module: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// No pages, or too many.
    #[error("{count} pages at once: ask for 1 to {MAX_PAGES}")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// Xen does not let the pages be mapped: one of them at least is not
    /// granted, not any more, to another domain, or only for reading.
    #[error("domain {domain} does not grant {references:?} to this one for such a mapping")]
    Refused {
        /// Whose pages they are.
        domain: u16,
        /// The grants.
        references: Vec<u32>,
    },
    /// A range that is not within the shared pages.
    #[error("{len} bytes at {offset} are not within {size} shared bytes")]
    Range {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Bytes of all the pages.
        size: usize,
    },
    /// A write to pages that are mapped for reading.
    #[error("the pages are mapped for reading")]
    ReadOnly,
    /// A call failed.
    #[error("cannot {what}: {source}; the other domain may be gone, or `dmesg` tells more")]
    System {
        /// What was to be done.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// xenstored's answer is not what its protocol says.
    #[error("xenstored does not say which domain this is")]
    Store,
    /// The domain's own grants were to be mapped.
    #[error("domain {domain} is this one: Xen would take its pages away from it")]
    Own {
        /// This domain.
        domain: u16,
    },
    /// The text is not an invitation.
    #[error("that is no invitation: copy what the other domain says, like 0:5:8:9:10:11:12:13")]
    Invitation,
    /// Sharing does not work as it should.
    #[error("the self-test fails: {0}")]
    SelfTest(&'static str),
}

impl Error {
    fn last(what: &'static str) -> Self {
        Self::System {
            what,
            source: io::Error::last_os_error(),
        }
    }
}

/// Whether this machine is a guest of Xen, or its control domain.
#[must_use]
pub fn is_provider() -> bool {
    std::fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen")
}

fn open(path: &'static str, module: &'static str) -> Result<Arc<File>, Error> {
    let mut options = File::options();
    options.read(true).write(true);
    // Reads of events do not wait; the others have none.
    options.custom_flags(libc::O_NONBLOCK);
    match options.open(path) {
        Ok(file) => Ok(Arc::new(file)),
        Err(source) => Err(Error::Device {
            path,
            module,
            source,
        }),
    }
}

/// The number of pages as the drivers count them.
fn checked(count: usize) -> Result<u32, Error> {
    match count {
        1..=MAX_PAGES => Ok(count as u32),
        _ => Err(Error::Count { count }),
    }
}

#[cfg(test)]
mod tests;
