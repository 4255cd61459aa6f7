//! Shared pages in this process's memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::raw::c_ulong;
use std::ptr;
use std::sync::Arc;

use blanket_memory::{IoVec, iovec};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::abi::{CLEAR_BYTE, Notify, Range, SEND_EVENT, SET_UNMAP_NOTIFY};
use super::{Error, Port};
use crate::grant::PAGE;

/// Pages that another domain has, too. It may write to them at any time.
/// Dropping them unmaps them.
#[derive(Debug)]
pub struct Memory {
    all: IoVec,
    writable: bool,
    driver: Arc<File>,
    /// Which pages of the driver's they are.
    range: Range,
    /// The call that gives them back to the driver.
    end: c_ulong,
}

impl Memory {
    /// Maps `range` of the driver's pages, which `end` gives back: also if
    /// they cannot be mapped.
    pub(super) fn map(
        driver: &Arc<File>,
        range: Range,
        end: c_ulong,
        writable: bool,
    ) -> io::Result<Self> {
        let len = range.count as usize * PAGE;
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: the kernel chooses a place that nothing else has.
        let base = unsafe {
            let (fd, offset) = (driver.as_raw_fd(), range.index as libc::off_t);
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                fd,
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            give_back(driver, end, &range);
            return Err(error);
        }
        Ok(Self {
            all: IoVec::new(base.cast(), len),
            writable,
            driver: Arc::clone(driver),
            range,
            end,
        })
    }

    /// Bytes of all its pages.
    #[must_use]
    pub fn size(&self) -> usize {
        self.all.len()
    }

    /// `len` bytes from `offset` on, for vectored I/O: keep the memory until
    /// that is over, and do not write to pages mapped for reading.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn iovec(&self, offset: usize, len: usize) -> Result<IoVec, Error> {
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::Range { offset, len, size });
        }
        let mut piece = self.all;
        piece.advance(offset);
        piece.truncate(len);
        Ok(piece)
    }

    /// Copies bytes from `offset` on into `out`.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let piece = self.iovec(offset, out.len())?;
        // As many as there are in the piece.
        let _ = iovec::read_bytes(&[piece], out);
        Ok(())
    }

    /// Copies `bytes` to `offset` and on.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::ReadOnly`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        iovec::write_bytes(&[self.iovec(offset, bytes.len())?], bytes);
        Ok(())
    }

    /// Has the driver clear the byte at `offset`, and notify `port` if there is
    /// one, when the pages are unmapped or taken back: also if this process is
    /// killed.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::ReadOnly`], or the driver refuses it.
    pub fn notify_at_end(&self, offset: usize, port: Option<&Port>) -> Result<(), Error> {
        self.iovec(offset, 1)?;
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        let notify = Notify {
            index: self.range.index + offset as u64,
            action: CLEAR_BYTE | port.map_or(0, |_| SEND_EVENT),
            port: port.map_or(0, Port::number),
        };
        // SAFETY: the driver reads the struct that the call is defined with.
        let done = unsafe { ioctl_with_ref(&*self.driver, SET_UNMAP_NOTIFY(), &notify) };
        if done < 0 {
            return Err(Error::last("ask for a notification of the end"));
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `map` has mapped exactly this; the pieces that were handed
        // out are not used any more, as their takers have to see to.
        unsafe { libc::munmap(self.all.as_ptr().cast(), self.all.len()) };
        give_back(&self.driver, self.end, &self.range);
    }
}

/// The driver knows the pages until then: this cannot fail.
fn give_back(driver: &File, end: c_ulong, range: &Range) {
    // SAFETY: the driver reads the struct that the calls are defined with.
    unsafe { ioctl_with_ref(driver, end, range) };
}
