//! Files that live in memory.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// A file in memory that others open by its path.
pub struct MemFile(File);

impl MemFile {
    /// A file that holds `bytes` and has `len` bytes, zeros behind them.
    ///
    /// # Panics
    /// The kernel has no memory.
    #[must_use]
    pub fn new(bytes: &[u8], len: u64) -> Self {
        let make = || -> io::Result<File> {
            let name = CString::new("fuzz")?;
            // SAFETY: `name` is a string that outlives the call.
            let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the call has just made the descriptor: nobody else's.
            let file = unsafe { File::from_raw_fd(fd) };
            file.write_all_at(bytes, 0)?;
            file.set_len(len.max(bytes.len() as u64))?;
            Ok(file)
        };
        Self(make().expect("a file in memory"))
    }

    /// Where it is opened.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// Bytes that it has, holes included.
    ///
    /// # Panics
    /// The kernel does not say.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.0.metadata().expect("a file in memory").len()
    }
}
