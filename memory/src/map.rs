//! Mapping guest memory.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::dirty::WriteLog;
use crate::{GuestRam, layout};

/// Which pages back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages.
    Small,
    /// Ordinary pages that the kernel may merge into huge ones.
    #[default]
    Transparent,
    /// hugetlbfs pages of `1 << shift` bytes (21 or 30), reserved at once.
    Hugetlb {
        /// log2 of the page size.
        shift: u32,
    },
}

/// What to map.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Bytes of RAM.
    pub size: u64,
    /// Pages behind it.
    pub backing: Backing,
    /// A memfd that other processes can map, instead of anonymous memory.
    pub shared: bool,
}

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel did not give the memory.
    #[error("cannot get {mib} MiB of guest memory: {source}; {remedy}")]
    Map {
        /// Asked for, in MiB.
        mib: u64,
        /// The kernel's answer.
        source: io::Error,
        /// What to do.
        remedy: String,
    },
    /// The size does not fit the pages.
    #[error("{size} bytes of memory is not a multiple of the {page_kib} KiB huge pages")]
    Unaligned {
        /// Bytes asked for.
        size: u64,
        /// Page size in KiB.
        page_kib: u64,
    },
    /// The regions could not be put together.
    #[error("guest memory layout: {0}")]
    Layout(String),
}

impl Spec {
    fn map_error(&self, source: io::Error) -> Error {
        let mib = self.size >> 20;
        let remedy = match self.backing {
            Backing::Hugetlb { shift } => format!(
                "reserve huge pages first: echo {} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                self.size >> shift,
                1u64 << (shift - 10)
            ),
            _ => "ask for less with --memory, or free some".to_owned(),
        };
        Error::Map {
            mib,
            source,
            remedy,
        }
    }
}

/// Maps a guest's memory as [`layout::regions`] places it. Pages come when
/// they are touched, but for hugetlbfs, whose pages are reserved here.
///
/// # Errors
/// The kernel has no such memory, or the size does not fit the pages.
pub fn build(spec: &Spec) -> Result<GuestRam, Error> {
    let regions: Vec<_> = layout::regions(spec.size).into_iter().collect();
    build_at(spec, &regions)
}

/// Maps a guest's memory in regions of its machine's choice, as (start,
/// bytes): `spec.size` bytes in all.
///
/// # Errors
/// As [`build`].
pub fn build_at(spec: &Spec, places: &[(GuestAddress, u64)]) -> Result<GuestRam, Error> {
    if let Backing::Hugetlb { shift } = spec.backing
        && !spec.size.is_multiple_of(1 << shift)
    {
        return Err(Error::Unaligned {
            size: spec.size,
            page_kib: 1 << (shift - 10),
        });
    }
    enough(spec)?;
    let file = spec.shared.then(|| memfd(spec)).transpose()?;
    let mut offset = 0;
    let mut regions = Vec::new();
    for &(start, len) in places {
        regions.push(region(spec, start, len, file.as_ref(), offset)?);
        offset += len;
    }
    let ram = GuestRam::from_regions(regions).map_err(|error| Error::Layout(error.to_string()))?;
    if spec.backing == Backing::Transparent {
        advise_huge(&ram);
    }
    Ok(ram)
}

/// Refuses what the machine could never hold: overcommit would let the mapping
/// through and kill the guest later.
fn enough(spec: &Spec) -> Result<(), Error> {
    // SAFETY: sysconf reads two constants of the system.
    let (pages, page) = unsafe {
        (
            libc::sysconf(libc::_SC_PHYS_PAGES),
            libc::sysconf(libc::_SC_PAGESIZE),
        )
    };
    let physical = u64::try_from(pages).unwrap_or(0) * u64::try_from(page).unwrap_or(0);
    if physical != 0 && spec.size > physical {
        return Err(spec.map_error(io::Error::other(format!(
            "this machine has {} MiB in all",
            physical >> 20
        ))));
    }
    Ok(())
}

fn memfd(spec: &Spec) -> Result<File, Error> {
    let flags = match spec.backing {
        Backing::Hugetlb { shift } => libc::MFD_HUGETLB | (shift << libc::MFD_HUGE_SHIFT),
        _ => 0,
    };
    sealed(c"guest-memory", spec.size, flags).map_err(|error| spec.map_error(error))
}

/// Memory of `len` bytes that can be shared. Its size is fixed: whoever shares it
/// cannot make us fault.
pub(crate) fn sealed(name: &CStr, len: u64, flags: libc::c_uint) -> io::Result<File> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string; the flags are valid.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    // SAFETY: fcntl on our own descriptor.
    let sealed = unsafe {
        libc::fcntl(
            file.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        )
    };
    if sealed < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn region(
    spec: &Spec,
    start: GuestAddress,
    len: u64,
    file: Option<&File>,
    offset: u64,
) -> Result<GuestRegionMmap<WriteLog>, Error> {
    let size = usize::try_from(len).map_err(|_| Error::Layout(format!("{len} bytes")))?;
    let mut flags = libc::MAP_NORESERVE;
    if let Backing::Hugetlb { shift } = spec.backing {
        // Reserved now: a guest must not die by SIGBUS later.
        flags = libc::MAP_HUGETLB | ((shift as i32) << libc::MAP_HUGE_SHIFT);
    }
    let map = || {
        let builder = MmapRegionBuilder::new_with_bitmap(size, WriteLog::with_len(size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match file {
            Some(file) => builder
                .with_file_offset(FileOffset::new(
                    file.try_clone().map_err(|error| spec.map_error(error))?,
                    offset,
                ))
                .with_mmap_flags(libc::MAP_SHARED | (flags & libc::MAP_NORESERVE)),
            None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags),
        };
        builder.build().map_err(|error| match error {
            MmapRegionError::Mmap(source) => spec.map_error(source),
            other => Error::Layout(other.to_string()),
        })
    };
    GuestRegionMmap::new(aligned(map)?, start)
        .ok_or_else(|| Error::Layout(format!("{len} bytes at {:#x}", start.0)))
}

/// Bytes of an ordinary page.
const PAGE: usize = 4096;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// A mapping that begins at a multiple of 2 MiB, as guest memory does: only
/// then can one entry of the nested page table map a whole huge page. Where
/// the kernel (before Linux 6.7) does not see to that, room above the mapping
/// is taken for as long as it is made; if that does not help, any will do.
fn aligned(
    map: impl Fn() -> Result<MmapRegion<WriteLog>, Error>,
) -> Result<MmapRegion<WriteLog>, Error> {
    const TRIES: usize = 8;
    let mut fillers = Vec::new();
    let mut region = map()?;
    while !(region.as_ptr() as usize).is_multiple_of(HUGE) && fillers.len() < TRIES {
        let over = region.as_ptr() as usize % HUGE;
        drop(region);
        fillers.extend(Filler::new(over));
        region = map()?;
    }
    Ok(region)
}

/// A piece of address space that nobody uses.
struct Filler {
    start: *mut libc::c_void,
    len: usize,
}

impl Filler {
    fn new(len: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel wants it disturbs nobody.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        (start != libc::MAP_FAILED).then_some(Self { start, len })
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nothing points into it.
        unsafe {
            libc::munmap(self.start, self.len);
        }
    }
}

/// Asks for transparent huge pages; a kernel without them says no, and that is
/// no reason to stop.
fn advise_huge(ram: &GuestRam) {
    for region in ram.iter() {
        // SAFETY: the range is a mapping that we own; the advice changes no content.
        unsafe {
            libc::madvise(
                region.as_ptr().cast(),
                region.len() as usize,
                libc::MADV_HUGEPAGE,
            );
        }
    }
}

/// Has the kernel find pages for `len` bytes at `start` before they are
/// touched, from the last to the first: whoever writes them meanwhile, from the
/// first on, is met half-way.
///
/// A hint: what it does not achieve (a kernel before Linux 5.14, a range that
/// is no memory) the first touch will.
pub fn populate(ram: &GuestRam, start: GuestAddress, len: usize) {
    let mut pieces = Vec::new();
    if crate::iovec::push(ram, start, len, &mut pieces).is_err() {
        return;
    }
    for piece in pieces.iter().rev() {
        let start = piece.as_ptr() as usize & !(PAGE - 1);
        let mut end = piece.as_ptr() as usize + piece.len();
        while end > start {
            // A huge page at a time.
            let at = ((end - 1) & !(HUGE - 1)).max(start);
            // SAFETY: the pages hold guest memory that `ram` keeps mapped;
            // their content stays.
            let done = unsafe {
                libc::madvise(at as *mut libc::c_void, end - at, libc::MADV_POPULATE_WRITE)
            };
            if done != 0 {
                return;
            }
            end = at;
        }
    }
}

/// Empties whole pages of memory that is private to this process: they are zeros
/// then, or come from whoever sees to the faults there.
///
/// # Errors
/// There is no such memory, or it is in huge pages.
pub fn discard(ram: &GuestRam, start: GuestAddress, len: usize) -> io::Result<()> {
    for slice in ram.get_slices(start, len) {
        let slice = slice.map_err(io::Error::other)?;
        let place = slice.ptr_guard_mut();
        // SAFETY: the range lies within guest memory, to whose content nothing
        // in this process has references; all of it may be replaced at any time.
        let done =
            unsafe { libc::madvise(place.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Bytes of guest memory that are resident now, by mincore(2).
#[must_use]
pub fn touched_bytes(ram: &GuestRam) -> u64 {
    const BATCH: usize = 1 << 16;
    let mut pages = vec![0u8; BATCH];
    let mut resident = 0u64;
    for region in ram.iter() {
        let mut at = 0;
        while at < region.len() as usize {
            let len = (region.len() as usize - at).min(BATCH * PAGE);
            // SAFETY: the range lies within a mapping that we own, and `pages`
            // has a byte for each of its pages.
            let done =
                unsafe { libc::mincore(region.as_ptr().add(at).cast(), len, pages.as_mut_ptr()) };
            if done == 0 {
                resident += pages[..len.div_ceil(PAGE)]
                    .iter()
                    .filter(|page| **page & 1 != 0)
                    .count() as u64
                    * PAGE as u64;
            }
            at += len;
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn spec(size: u64) -> Spec {
        Spec {
            size,
            backing: Backing::Small,
            shared: false,
        }
    }

    #[test]
    fn anonymous_and_shared_memory_hold_what_is_written() {
        for shared in [false, true] {
            let ram = build(&Spec {
                shared,
                ..spec(32 << 20)
            })
            .unwrap();
            ram.write_obj(0x1234_5678u32, GuestAddress(31 << 20))
                .unwrap();
            assert_eq!(
                ram.read_obj::<u32>(GuestAddress(31 << 20)).unwrap(),
                0x1234_5678
            );
            let file = ram.iter().next().unwrap().file_offset().is_some();
            assert_eq!(file, shared);
        }
    }

    #[test]
    fn populated_memory_is_resident_and_keeps_what_it_holds() {
        for shared in [false, true] {
            let ram = build(&Spec {
                shared,
                ..spec(32 << 20)
            })
            .unwrap();
            ram.write_obj(0x1234u16, GuestAddress(9 << 20)).unwrap();
            assert!(touched_bytes(&ram) < 5 << 20);
            // Neither end on a page's boundary.
            populate(&ram, GuestAddress((8 << 20) + 1), 5 << 20);
            assert!(touched_bytes(&ram) > 5 << 20);
            assert_eq!(ram.read_obj::<u16>(GuestAddress(9 << 20)).unwrap(), 0x1234);
        }
    }

    #[test]
    fn populating_what_is_no_memory_does_nothing() {
        let ram = build(&spec(32 << 20)).unwrap();
        populate(&ram, GuestAddress(31 << 20), 2 << 20);
        assert_eq!(touched_bytes(&ram), 0);
    }

    #[test]
    fn memory_lies_so_that_huge_pages_can_back_it() {
        // Other mappings in between move the next one about.
        for shared in [false, true] {
            let mut held = Vec::new();
            for i in 1..20u64 {
                held.push(Filler::new(4096 * i as usize));
                let size = (8 << 20) + 4096 * i;
                let ram = build(&Spec {
                    shared,
                    ..spec(size)
                })
                .unwrap();
                for region in ram.iter() {
                    assert_eq!(region.as_ptr() as usize % HUGE, 0, "{size} bytes");
                }
            }
        }
    }

    #[test]
    fn only_touched_pages_count() {
        let ram = build(&spec(64 << 20)).unwrap();
        assert_eq!(touched_bytes(&ram), 0);
        ram.write_obj(1u8, GuestAddress(0)).unwrap();
        ram.write_obj(1u8, GuestAddress(63 << 20)).unwrap();
        assert_eq!(touched_bytes(&ram), 2 * 4096);
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_a_remedy() {
        let error = build(&spec(1 << 46)).unwrap_err().to_string();
        assert!(error.contains("--memory"), "{error}");
    }

    #[test]
    fn huge_pages_that_nobody_reserved_are_refused_with_the_command() {
        let spec = Spec {
            backing: Backing::Hugetlb { shift: 30 },
            ..spec(2 << 30)
        };
        match build(&spec) {
            Err(error) => assert!(error.to_string().contains("nr_hugepages"), "{error}"),
            Ok(ram) => assert_eq!(ram.iter().map(GuestMemoryRegion::len).sum::<u64>(), 2 << 30),
        }
    }

    #[test]
    fn a_size_that_huge_pages_do_not_divide_is_refused() {
        let spec = Spec {
            backing: Backing::Hugetlb { shift: 21 },
            ..spec(33 << 20)
        };
        assert!(matches!(build(&spec), Err(Error::Unaligned { .. })));
    }
}
