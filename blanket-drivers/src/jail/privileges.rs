//! Giving up what root can do.

use std::io;

/// A capability's name and number (`linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// As capabilities(7) has it.
    pub name: &'static str,
    number: u32,
}

impl Capability {
    /// Changing who owns a file.
    pub const CHOWN: Self = Self {
        name: "CAP_CHOWN",
        number: 0,
    };
    /// Making interfaces and changing them.
    pub const NET_ADMIN: Self = Self {
        name: "CAP_NET_ADMIN",
        number: 12,
    };
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// Effective, permitted and inheritable.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Word([u32; 3]);

/// The outcome of a system call that returns 0 if it was done.
///
/// # Errors
/// It was not; why is in `errno`.
pub fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Forbids this thread, and those that it starts, to gain privileges by exec.
/// seccomp filters need it.
///
/// # Errors
/// The kernel refuses.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: prctl with plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// No core files with what is in memory, and no others of the same user who
/// look into it.
///
/// # Errors
/// The kernel refuses.
pub fn not_dumpable() -> io::Result<()> {
    // SAFETY: prctl with plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
}

/// Empties the bounding set, as far as this thread may.
pub fn empty_bounding_set() {
    // Until EINVAL says that there is no such capability. Without CAP_SETPCAP
    // nothing can be dropped, nor need it be.
    for capability in 0..64 {
        // SAFETY: prctl with plain numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// Drops all capabilities of this thread but these, of which it keeps those
/// that it has; which they are. The inheritable and the ambient sets are empty
/// then. To be called while the process has one thread: they are a thread's own.
///
/// # Errors
/// The kernel refuses: the process must not go on.
pub fn keep_capabilities(kept: &[Capability]) -> io::Result<Vec<Capability>> {
    // This thread's; the kernel writes to it if it does not know the version.
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut words = [Word::default(); 2];
    // SAFETY: version 3 fills two of the kernel's three-word structures in.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) };
    check(done as libc::c_int)?;
    let place = |capability: &Capability| {
        let number = capability.number;
        ((number / 32) as usize, 1_u32 << (number % 32))
    };
    let mut kept = kept.to_vec();
    kept.retain(|capability| {
        let (word, bit) = place(capability);
        words[word].0[1] & bit != 0
    });
    words = [Word::default(); 2];
    for capability in &kept {
        let (word, bit) = place(capability);
        words[word].0[0] |= bit;
        words[word].0[1] |= bit;
    }
    // SAFETY: version 3 takes two of the kernel's three-word structures.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) };
    check(done as libc::c_int)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_kept_and_nothing_else_is_to_be_had() {
        // SAFETY: reads this process's ID.
        let root = unsafe { libc::geteuid() } == 0;
        // A thread's capabilities are its own.
        let thread = std::thread::spawn(move || {
            empty_bounding_set();
            let kept = keep_capabilities(&[Capability::NET_ADMIN]).unwrap();
            no_new_privileges().unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap().trim().to_owned()
            };
            if root {
                let all = format!("{:016x}", u64::from(!kept.is_empty()) << 12);
                assert_eq!((line("CapEff:"), line("CapPrm:")), (all.clone(), all));
                assert_eq!(line("CapBnd:"), "0000000000000000");
            }
            assert_eq!(line("CapInh:"), "0000000000000000");
            assert_eq!(line("CapAmb:"), "0000000000000000");
            assert_eq!(line("NoNewPrivs:"), "1");
        });
        thread.join().unwrap();
    }
}
