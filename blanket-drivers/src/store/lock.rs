//! Locks that keep two VMs off one image.
//!
//! Open file description locks on the whole file: they belong to the open file,
//! survive privilege drops and end with the process. QEMU and Cloud Hypervisor
//! take the same kind, so they are kept off as well.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// How often, and after which time, a lock is tried again. It may outlive its VM
/// by a moment: the kernel takes down a killed VM's ring in the background, and
/// a process that is just being forked has it until its `exec`.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// Tries until `attempt` gives something, for a moment.
///
/// # Errors
/// The first error of `attempt`.
pub(super) fn patiently<T>(
    mut attempt: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    for _ in 0..TRIES {
        if let Some(result) = attempt()? {
            return Ok(Some(result));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(None)
}

/// Locks `file`: shared for reading, or for one writer alone. `Ok(false)` if
/// somebody else's lock is in the way and stays there.
///
/// # Errors
/// The file system has no locks, or the file is not open for it.
pub fn take(file: &File, write: bool) -> io::Result<bool> {
    patiently(|| Ok(take_now(file, write)?.then_some(()))).map(|taken| taken.is_some())
}

/// Lets others lock `file`.
///
/// # Errors
/// The file system has no locks.
pub fn release(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK).map(drop)
}

fn take_now(file: &File, write: bool) -> io::Result<bool> {
    set(file, if write { libc::F_WRLCK } else { libc::F_RDLCK })
}

fn set(file: &File, kind: libc::c_int) -> io::Result<bool> {
    // The whole file, however long it gets: start 0, length 0.
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid flock that the kernel only reads.
    let status = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if status == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Another process that has `file` open, as far as this one may see that: an
/// open file description lock does not say whose it is.
pub(super) fn holder(file: &File) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    let same = |other: fs::Metadata| (other.dev(), other.ino()) == (wanted.dev(), wanted.ino());
    let own = std::process::id();
    fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .find(|pid| {
            fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten()
                .flatten()
                .any(|fd| fs::metadata(fd.path()).is_ok_and(same))
        })
}
