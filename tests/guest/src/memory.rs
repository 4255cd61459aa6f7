//! Anonymous memory that is unmapped with its value.

use std::io;
use std::ptr;

/// Size of a page in bytes.
pub(crate) const PAGE: usize = 4096;

/// Private anonymous pages.
pub(crate) struct Pages {
    start: *mut u8,
    len: usize,
}

impl Pages {
    /// Maps `count` pages, fresh: the first access to each faults.
    pub(crate) fn map(count: usize) -> io::Result<Self> {
        Self::map_with(count, libc::PROT_READ | libc::PROT_WRITE, 0)
    }

    /// The same with this protection and these flags.
    pub(crate) fn map_with(count: usize, protection: i32, flags: i32) -> io::Result<Self> {
        let len = count * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast();
        // Huge pages would make one fault of many; kernels without them refuse the advice.
        // SAFETY: the range is the mapping made above.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_NOHUGEPAGE) };
        Ok(Self { start, len })
    }

    /// The address of page `index`.
    pub(crate) fn page(&self, index: usize) -> *mut u8 {
        assert!(index * PAGE < self.len);
        self.start.wrapping_add(index * PAGE)
    }

    /// All bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable memory of `len` bytes, and borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Sets what accesses are allowed.
    pub(crate) fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: the range is this mapping; nobody holds a reference into it.
        if unsafe { libc::mprotect(self.start.cast(), self.len, protection) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, to which no reference is left.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
