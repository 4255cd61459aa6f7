//! Giving up what root can do.

use std::io;
use std::str::FromStr;

use blanket_drivers::jail::privileges::{check, empty_bounding_set, keep_capabilities};

pub use blanket_drivers::jail::privileges::no_new_privileges;

/// The user that a monitor started by root becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User ID, not 0.
    pub uid: libc::uid_t,
    /// Group ID, not 0.
    pub gid: libc::gid_t,
}

impl Default for User {
    /// `nobody:nogroup`, as Debian numbers them.
    fn default() -> Self {
        Self {
            uid: 65534,
            gid: 65534,
        }
    }
}

impl FromStr for User {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        match (uid.parse(), gid.parse()) {
            (Ok(uid), Ok(gid)) if uid != 0 && gid != 0 => Ok(Self { uid, gid }),
            _ => Err(format!(
                "'{text}' is not UID[:GID] in numbers other than 0, like 65534:65534"
            )),
        }
    }
}

/// Becomes `user` if this process is root's, and drops every capability, also
/// from the bounding set. To be called while the process has one thread: the
/// IDs are a thread's own.
///
/// # Errors
/// The kernel refuses a step: the monitor must not go on.
pub fn drop_privileges(user: User) -> io::Result<()> {
    empty_bounding_set();
    // SAFETY: plain system calls on this thread.
    unsafe {
        if libc::geteuid() == 0 {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(user.gid, user.gid, user.gid))?;
            check(libc::setresuid(user.uid, user.uid, user.uid))?;
        }
    }
    keep_capabilities(&[])?;
    no_new_privileges()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` in a child process and returns its exit status.
    fn in_child(body: impl FnOnce() -> i32) -> i32 {
        // SAFETY: the child calls only system calls and formats nothing before
        // it exits.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::_exit(body());
            }
            let mut status = 0;
            libc::waitpid(pid, &raw mut status, 0);
            libc::WEXITSTATUS(status)
        }
    }

    #[test]
    fn afterwards_there_is_no_root_and_no_way_back() {
        let status = in_child(|| {
            if drop_privileges(User::default()).is_err() {
                return 1;
            }
            // SAFETY: plain system calls.
            unsafe {
                if libc::geteuid() == 0 || libc::setuid(0) == 0 {
                    return 2;
                }
                if libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1 {
                    return 3;
                }
                // CAP_NET_ADMIN (12) is neither held nor to be had.
                if libc::prctl(libc::PR_CAPBSET_READ, 12, 0, 0, 0) != 0 {
                    return 4;
                }
            }
            0
        });
        // SAFETY: reads this process's ID.
        if unsafe { libc::geteuid() } == 0 {
            assert_eq!(status, 0);
        } else {
            assert!(status == 0 || status == 4, "{status}");
        }
    }

    #[test]
    fn root_is_no_user_to_become() {
        assert!("0".parse::<User>().is_err());
        assert!("1000:0".parse::<User>().is_err());
        assert!("nobody".parse::<User>().is_err());
        assert_eq!(
            "1000".parse(),
            Ok(User {
                uid: 1000,
                gid: 1000
            })
        );
    }
}
