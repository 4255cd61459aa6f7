//! KVM's dirty rings: each vCPU has a list of the pages that it has written.
//!
//! The other way is KVM's dirty log, a bit for each page of memory. The rings
//! are there from the VM's beginning or never, and then there is no log. A vCPU
//! whose ring is full leaves the guest until there is room ([`Rings::make_room`]).
//!
//! KVM lists a page when it is written for the first time, and not again before
//! the ring has been reset. So a page is taken from the ring first, then the ring
//! is reset, and only then the page may be read: whatever is written later is
//! listed again. Who takes and resets holds the lock.
//!
//! On x86, KVM lists what it writes on behalf of a vCPU that is loaded: guests'
//! accesses, and all that the ioctls of a vCPU do (clocks, stolen time, nested
//! states). What it writes otherwise would be lost, with a warning in the
//! kernel's log. Nothing that Blanket uses does that; the emulated hypercalls of
//! Xen that do are not used.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};

mod requests {
    vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, kvm_bindings::KVMIO, 0xc7);
}
use requests::KVM_RESET_DIRTY_RINGS;

/// Entries of a ring at least: what QEMU's documentation advises.
const FEWEST: u64 = 4096;
/// Entries of a ring at most: KVM has no larger ones.
const MOST: u64 = 65536;
/// An entry for so many pages of the guest's memory. A guest that writes more of
/// them between two rounds has its ring emptied, and faults on them again.
const PAGES_PER_ENTRY: u64 = 4;
/// How often the kernel may say that it has reset nothing.
const PATIENCE: u32 = 1000;

/// State of an entry: KVM has written it.
const DIRTY: u32 = 1;
/// State of an entry: it has been read.
const TAKEN: u32 = 2;

/// `struct kvm_dirty_gfn`.
#[repr(C)]
struct Entry {
    state: AtomicU32,
    slot: AtomicU32,
    page: AtomicU64,
}

const ENTRY: usize = size_of::<kvm_dirty_gfn>();
const _: () = assert!(size_of::<Entry>() == ENTRY);

/// Switches rings on, of a size that suits so many bytes of memory, for a VM that
/// has no vCPUs yet; the entries of each.
///
/// # Errors
/// This KVM has none (`Unsupported`), or refuses.
pub fn enable(vm: &VmFd, memory: u64) -> io::Result<u32> {
    let most = |cap: u32| u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
    let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
    let cap = caps.into_iter().find(|cap| most(*cap) >= PAGE as u64);
    let cap = cap.ok_or(io::ErrorKind::Unsupported)?;
    let entries = entries(memory).min(most(cap) / ENTRY as u64);
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [entries * ENTRY as u64, 0, 0, 0],
        ..Default::default()
    })?;
    Ok(entries as u32)
}

/// Entries for so many bytes of memory: a power of two.
fn entries(memory: u64) -> u64 {
    (memory / PAGE as u64 / PAGES_PER_ENTRY)
        .clamp(FEWEST, MOST)
        .next_power_of_two()
}

/// One vCPU's ring.
struct Ring {
    entries: NonNull<Entry>,
    count: u32,
}

// SAFETY: the entries are atomics, and mapped as long as the ring lives.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    fn map(fd: &VcpuFd, count: u32) -> io::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count as usize * ENTRY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as libc::off_t,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(at.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { entries, count })
    }

    fn entry(&self, number: u32) -> &Entry {
        // SAFETY: the number is below the count; the kernel's end of the mapping
        // writes the fields as atomics, too.
        unsafe { self.entries.add((number % self.count) as usize).as_ref() }
    }

    /// Takes what is listed from entry `next` on; how many entries that was.
    fn take(&self, next: &mut u32, mut found: impl FnMut(u32, u64)) -> u64 {
        let mut taken = 0;
        while taken < u64::from(self.count) {
            let entry = self.entry(*next);
            if entry.state.load(Ordering::Acquire) != DIRTY {
                break;
            }
            let slot = entry.slot.load(Ordering::Relaxed);
            found(slot, entry.page.load(Ordering::Relaxed));
            entry.state.store(TAKEN, Ordering::Release);
            *next = (*next + 1) % self.count;
            taken += 1;
        }
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this ring's, and nobody else has a reference.
        unsafe {
            libc::munmap(self.entries.as_ptr().cast(), self.count as usize * ENTRY);
        }
    }
}

/// What has been taken from the rings.
struct Taken {
    /// Where each ring goes on.
    next: Vec<u32>,
    /// The pages, if somebody wants to know.
    pages: Option<Pages>,
}

/// The rings of a VM's vCPUs.
pub struct Rings {
    vm: Arc<VmFd>,
    rings: Vec<Ring>,
    taken: Mutex<Taken>,
}

impl Rings {
    /// Of these vCPUs, all that `vm` has, each with a ring of so many entries.
    ///
    /// # Errors
    /// A ring cannot be mapped.
    pub fn map(vm: Arc<VmFd>, vcpus: &[VcpuFd], entries: u32) -> io::Result<Self> {
        let rings = vcpus.iter().map(|fd| Ring::map(fd, entries));
        Ok(Self {
            vm,
            rings: rings.collect::<io::Result<_>>()?,
            taken: Mutex::new(Taken {
                next: vec![0; vcpus.len()],
                pages: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to note pages, with none noted. KVM is told to list them after that.
    ///
    /// # Errors
    /// KVM does not reset the rings.
    pub fn start(&self, ram: &GuestRam) -> io::Result<()> {
        let mut taken = self.lock();
        // What is left of the last time.
        taken.pages = None;
        self.empty(&mut taken)?;
        taken.pages = Some(Pages::none(ram));
        Ok(())
    }

    /// Notes no more.
    pub fn stop(&self) {
        self.lock().pages = None;
    }

    /// Takes the pages of `ram` that were written since the last time. They may be
    /// read now.
    ///
    /// # Errors
    /// KVM does not reset the rings, or nothing has been started.
    pub fn take(&self, ram: &GuestRam) -> io::Result<Pages> {
        let mut taken = self.lock();
        self.empty(&mut taken)?;
        let pages = taken.pages.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(std::mem::replace(pages, Pages::none(ram)))
    }

    /// Makes room in the rings, for a vCPU whose own is full.
    ///
    /// # Errors
    /// KVM does not reset the rings.
    pub fn make_room(&self) -> io::Result<()> {
        self.empty(&mut self.lock())
    }

    /// Notes what all rings list, and resets them.
    fn empty(&self, taken: &mut Taken) -> io::Result<()> {
        let Taken { next, pages } = taken;
        let mut left = 0;
        for (ring, next) in self.rings.iter().zip(next) {
            left += ring.take(next, |slot, page| {
                // Slots of the other address space, that of SMM, there are none.
                if let Some(pages) = pages {
                    pages.insert(slot as usize, usize::try_from(page).unwrap_or(usize::MAX));
                }
            });
        }
        // A kernel may stop half way where a signal waits. Each entry counts: a
        // page whose entry has not been reset can be written unnoticed.
        let mut idle = 0;
        while left > 0 {
            // SAFETY: the call has no memory to read or write.
            let reset =
                unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS() as _, 0) };
            match u64::try_from(reset) {
                Ok(0) => idle += 1,
                Ok(count) => left = left.saturating_sub(count),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                    idle += 1;
                }
            }
            if idle > PATIENCE {
                return Err(io::Error::other("KVM does not reset its dirty rings"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_grow_with_memory_within_what_kvm_takes() {
        assert_eq!(entries(16 << 20), FEWEST);
        assert_eq!(entries(256 << 20), 16384);
        assert_eq!(entries(300 << 20), 32768);
        assert_eq!(entries(1 << 40), MOST);
    }
}
