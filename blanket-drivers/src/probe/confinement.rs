//! What keeps a monitor that was taken over by its guest inside its jail.

use std::io;

use super::{Finding, read};
use crate::jail::landlock;

pub(super) fn seccomp() -> Finding {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads the 32 bits of `action`, which outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    if result == 0 {
        return Finding::ok("filters that end the process");
    }
    Finding::missing(
        format!("not available: {}", io::Error::last_os_error()),
        "monitors refuse to start: they do not run without their filter",
        "use a kernel with CONFIG_SECCOMP_FILTER, 4.14 or newer",
    )
}

pub(super) fn landlock() -> Finding {
    const COST: &str = "a monitor's view of the file system is limited by its user alone";
    let error = match landlock::abi() {
        Ok(abi) => return Finding::ok(format!("ABI {abi}")).fact("abi", u64::from(abi)),
        Err(error) => error,
    };
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
        return Finding::missing(
            "switched off at boot",
            COST,
            "add landlock to the kernel's lsm= parameter",
        );
    }
    Finding::missing(
        "not in this kernel",
        COST,
        "use a kernel with CONFIG_SECURITY_LANDLOCK (5.13 or newer; Debian's has it)",
    )
}

/// Makes a user namespace in a child process. `Err` says why not.
fn try_user_namespace() -> io::Result<()> {
    // SAFETY: the child calls only unshare and _exit, both async-signal-safe,
    // so it does not matter what other threads of this process held.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: as above; errno is this thread's own.
        unsafe {
            let code = if libc::unshare(libc::CLONE_NEWUSER) == 0 {
                0
            } else {
                *libc::__errno_location()
            };
            libc::_exit(code);
        }
    }
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int, which `status` is.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match libc::WEXITSTATUS(status) {
        _ if !libc::WIFEXITED(status) => Err(io::Error::other("not allowed")),
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

pub(super) fn user_namespaces() -> Finding {
    const COST: &str = "monitors of users who are not root share the node's namespaces";
    match try_user_namespace() {
        Ok(()) => Finding::ok("can be made"),
        Err(error) => Finding::missing(
            format!("cannot be made: {error}"),
            COST,
            "sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1; a \
             container's or AppArmor's profile may forbid it too",
        ),
    }
}

pub(super) fn cgroups() -> Finding {
    let mounts = read("/proc/self/mounts").unwrap_or_default();
    let controllers =
        cgroup2_mount(&mounts).and_then(|mount| read(&format!("{mount}/cgroup.controllers")));
    judge_cgroups(controllers.as_deref(), has_cgroup1(&mounts))
}

/// Where the one hierarchy of version 2 is mounted.
fn cgroup2_mount(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let mount = fields.next()?;
        (fields.next() == Some("cgroup2")).then_some(mount)
    })
}

fn has_cgroup1(mounts: &str) -> bool {
    mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some("cgroup"))
}

fn judge_cgroups(controllers: Option<&str>, version1: bool) -> Finding {
    const COST: &str = "guests' CPU, memory and I/O cannot be limited or measured per VM";
    const UNIFIED: &str = "boot with systemd.unified_cgroup_hierarchy=1";
    let needed = ["cpu", "cpuset", "io", "memory", "pids"];
    let Some(controllers) = controllers else {
        return if version1 {
            Finding::limited("version 1 only", COST, UNIFIED).fact("version", 1_u64)
        } else {
            let remedy = "mount -t cgroup2 none /sys/fs/cgroup";
            Finding::missing("none is mounted", COST, remedy).fact("version", 0_u64)
        };
    };
    let have: Vec<_> = controllers.split_whitespace().collect();
    let lack: Vec<_> = needed
        .into_iter()
        .filter(|name| !have.contains(name))
        .collect();
    let finding = if lack.is_empty() {
        Finding::ok(format!("version 2: {controllers}"))
    } else {
        Finding::limited(
            format!("version 2 without {}", lack.join(" ")),
            COST,
            UNIFIED,
        )
    };
    finding
        .fact("version", 2_u64)
        .fact("controllers", controllers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Level;

    #[test]
    fn hierarchies_are_found_among_the_mounts() {
        let hybrid = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified"));
        assert!(has_cgroup1(hybrid));
        assert_eq!(cgroup2_mount("x /cgroup2 ext4 rw 0 0"), None);
    }

    #[test]
    fn all_controllers_are_wanted() {
        let all = judge_cgroups(Some("cpuset cpu io memory hugetlb pids"), false);
        assert_eq!(all.level, Level::Ok);
        let some = judge_cgroups(Some("cpu pids"), true);
        assert_eq!(some.found, "version 2 without cpuset io memory");
        assert_eq!(judge_cgroups(None, true).facts["version"], 1_u64.into());
        assert_eq!(judge_cgroups(None, false).level, Level::Missing);
    }
}
