//! Guest memory: where it lies, what backs it, and vectors into it.
//!
//! [`GuestRam`] is the one name for a guest's memory in the whole house;
//! [`layout::regions`] says where it lies in the guest's physical address
//! space and [`build`] maps it; [`uffd`] resolves faults on it. Of disks that follow their
//! guest, [`absent`] knows what has not come.

pub mod absent;
pub mod dirty;
pub mod iovec;
pub mod layout;
mod map;
pub mod shared_log;
pub mod uffd;

pub use iovec::IoVec;
pub use map::{Backing, Error, Spec, build, build_at, discard, populate, touched_bytes};

/// A guest's memory. Cheap to clone: the clones share the mappings, and the log
/// of what is written ([`dirty`]).
pub type GuestRam = vm_memory::GuestMemoryMmap<dirty::WriteLog>;
