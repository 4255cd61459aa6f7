//! What a process can see of the file system, where the kernel has Landlock
//! (Linux `Documentation/userspace-api/landlock.rst`).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::privileges::check;

/// What may be done beneath a path (`linux/landlock.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(u64);

impl Rights {
    /// Reading files, and lists of directories.
    pub const READ: Self = Self(1 << 2 | 1 << 3);
    /// Making Unix sockets, and removing files.
    pub const SOCKETS: Self = Self(1 << 5 | 1 << 9);
    /// Making files and directories, writing and removing them.
    pub const WRITE: Self = Self(1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14);
    /// Reading, writing and asking a device, which the path is.
    pub const DEVICE: Self = Self(1 << 1 | 1 << 2 | 1 << 15);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// All rights about files that a version of the ABI knows.
fn known(abi: u32) -> u64 {
    let bits = match abi {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    (1 << bits) - 1
}

/// From this version on, a domain can be kept from signals to others, and from
/// others' abstract sockets.
const SCOPES: u32 = 6;

/// `struct landlock_ruleset_attr`; older kernels take it if what they do not
/// know is 0.
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed: u64,
    parent: i32,
}

const RULESET_VERSION: u32 = 1;
const PATH_BENEATH: libc::c_int = 1;

/// The version of the kernel's Landlock.
///
/// # Errors
/// It has none (`ENOSYS`), or it is switched off (`EOPNOTSUPP`).
pub fn abi() -> io::Result<u32> {
    // SAFETY: with this flag no ruleset is read: the pointer is null and the
    // size zero, as landlock_create_ruleset(2) has it.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            RULESET_VERSION,
        )
    };
    u32::try_from(abi).map_err(|_| io::Error::last_os_error())
}

/// Leaves this thread, and those that it starts from now on, these rights at
/// most, beneath these paths; those that are not there are left out. The
/// version of the kernel's Landlock; none: it has none, and nothing has
/// changed.
///
/// # Errors
/// The kernel refuses, as without [no new
/// privileges](super::privileges::no_new_privileges).
pub fn restrict(rules: &[(PathBuf, Rights)]) -> io::Result<Option<u32>> {
    let Ok(abi) = abi() else {
        return Ok(None);
    };
    let files = known(abi);
    let ruleset = Ruleset {
        files,
        net: 0,
        scoped: if abi >= SCOPES { 0b11 } else { 0 },
    };
    // SAFETY: the kernel reads a structure of this size.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const ruleset,
            size_of::<Ruleset>(),
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made the descriptor: nobody else's.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    for (path, rights) in rules {
        let mut options = OpenOptions::new();
        let opened = options.read(true).custom_flags(libc::O_PATH).open(path);
        let parent = match opened {
            Ok(parent) => parent,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let beneath = Beneath {
            allowed: rights.0 & files,
            parent: parent.as_raw_fd(),
        };
        // SAFETY: the kernel reads one such structure, which outlives the call.
        let added = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset.as_raw_fd(),
                PATH_BENEATH,
                &raw const beneath,
                0,
            )
        };
        check(added as libc::c_int)?;
    }
    // SAFETY: plain numbers.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    check(done as libc::c_int)?;
    Ok(Some(abi))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::super::privileges::no_new_privileges;
    use super::*;

    #[test]
    fn beneath_a_path_there_is_what_was_allowed_and_elsewhere_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["read", "write", "sockets", "none"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), "old").unwrap();
        }
        let rules = [
            (path("read"), Rights::READ),
            (path("write"), Rights::READ.and(Rights::WRITE)),
            (path("sockets"), Rights::SOCKETS),
            (path("missing"), Rights::READ),
        ];
        let paths = ["read", "write", "sockets", "none"].map(&path);
        // A domain is a thread's own.
        let thread = std::thread::spawn(move || {
            no_new_privileges().unwrap();
            if restrict(&rules).unwrap().is_none() {
                return;
            }
            let [read, write, sockets, none] = paths;
            let reads = |path: &PathBuf| fs::read(path.join("file")).is_ok();
            let writes = |path: &PathBuf| fs::write(path.join("new"), "new").is_ok();
            let binds = |path: &PathBuf| UnixListener::bind(path.join("socket")).is_ok();
            assert!(reads(&read) && !writes(&read) && !binds(&read));
            assert!(reads(&write) && writes(&write) && !binds(&write));
            assert!(fs::rename(write.join("new"), write.join("file")).is_ok());
            assert!(!reads(&sockets) && !writes(&sockets) && binds(&sockets));
            assert!(fs::remove_file(sockets.join("socket")).is_ok());
            assert!(!reads(&none) && !writes(&none) && !binds(&none));
            assert!(fs::remove_file(none.join("file")).is_err());
        });
        thread.join().unwrap();
    }
}
