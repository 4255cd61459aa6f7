//! Default-deny system call filters, one per class of thread.

use std::io;

use blanket_devices::{char as char_device, vhost_user};
use blanket_drivers::jail::seccomp::{
    self as jail, ASSERTIONS, Argument, BASE, Filter, Program, Refusal,
};
use blanket_drivers::{store, tap};
use blanket_memory::uffd;

pub use blanket_drivers::jail::seccomp::REFUSED_STATUS;

use crate::snapshot::pager;
use crate::vcpu::KICK_SYSCALLS;

/// A class of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The main thread until the machine is built: opens files, makes the
    /// other threads. All others inherit this filter under their own.
    Setup,
    /// The main thread afterwards: the API and the life of the machine.
    Main,
    /// A vCPU.
    Vcpu,
    /// An event loop that serves virtqueues and character devices.
    Worker,
    /// A thread of a block store that has no io_uring.
    Store,
    /// The thread of a pv machine's xenstore: it connects devices.
    XenBus,
    /// A thread that keeps the connection to a vhost-user backend.
    VhostUser,
    /// A thread that populates guest memory.
    Populate,
    /// The thread that moves guest memory while the guest runs.
    Pager,
    /// The thread that migrates the guest, and those that it makes for it.
    Migrate,
}

/// What the main thread needs besides while it serves the API.
const MAIN: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_enter,
    // A ring lets go of its image when the machine halts.
    libc::SYS_io_uring_register,
    libc::SYS_lseek,
    libc::SYS_mincore,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_unlink,
    libc::SYS_writev,
];

/// What building a machine needs besides: files, sockets, KVM, taps, threads
/// and giving up privileges.
const SETUP: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_access,
    libc::SYS_bind,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_chmod,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_geteuid,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_getgid,
    libc::SYS_getpgrp,
    libc::SYS_getuid,
    libc::SYS_io_uring_setup,
    libc::SYS_ioctl,
    libc::SYS_kill,
    libc::SYS_listen,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_pipe2,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_sysinfo,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_userfaultfd,
];

/// What moving a guest takes.
const MIGRATE: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_membarrier,
    libc::SYS_poll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    // Records and what is in them.
    libc::SYS_writev,
];

/// Type byte of KVM's ioctls.
const KVM_TYPE: u64 = 0xae;

/// Which ioctls a class may use.
enum Ioctls {
    All,
    /// KVM's, and those listed.
    Kvm(Vec<libc::Ioctl>),
    /// Those listed.
    Only(Vec<libc::Ioctl>),
}

impl Class {
    fn syscalls(self) -> Vec<libc::c_long> {
        let lists: &[&[libc::c_long]] = match self {
            // Threads inherit it: it must allow whatever any class does.
            Self::Setup => &[
                SETUP,
                MAIN,
                MIGRATE,
                KICK_SYSCALLS,
                store::RING_SYSCALLS,
                store::THREAD_SYSCALLS,
                tap::SYSCALLS,
                char_device::SYSCALLS,
                vhost_user::SYSCALLS,
                pager::SYSCALLS,
            ],
            Self::Main => &[MAIN],
            // A vCPU that sets up or resets a device works on its queues.
            Self::Vcpu => &[
                KICK_SYSCALLS,
                store::RING_SYSCALLS,
                // The last: for how long the thread waited for a processor.
                &[libc::SYS_eventfd2, libc::SYS_fcntl, libc::SYS_pread64],
            ],
            Self::Worker => &[
                &[
                    libc::SYS_epoll_ctl,
                    libc::SYS_epoll_wait,
                    libc::SYS_epoll_pwait,
                ],
                store::RING_SYSCALLS,
                tap::SYSCALLS,
                char_device::SYSCALLS,
            ],
            Self::Store => &[store::THREAD_SYSCALLS],
            Self::XenBus => &[
                &[
                    libc::SYS_epoll_ctl,
                    libc::SYS_epoll_wait,
                    libc::SYS_epoll_pwait,
                    libc::SYS_eventfd2,
                    libc::SYS_fcntl,
                ],
                store::RING_SYSCALLS,
                tap::SYSCALLS,
                char_device::SYSCALLS,
            ],
            // With Unix sockets: see `program`.
            Self::VhostUser => &[vhost_user::SYSCALLS],
            // madvise is everybody's.
            Self::Populate => &[],
            // With Unix sockets: see `program`. Memory follows its guest.
            Self::Pager => &[pager::SYSCALLS],
            // Threads, and Unix sockets: see `program`. Disks are copied.
            Self::Migrate => &[MIGRATE, store::THREAD_SYSCALLS],
        };
        [BASE, ASSERTIONS]
            .iter()
            .chain(lists)
            .copied()
            .flatten()
            .copied()
            .collect()
    }

    fn ioctls(self) -> Ioctls {
        let list = |lists: &[&[libc::Ioctl]]| lists.concat();
        match self {
            Self::Setup => Ioctls::All,
            Self::Main => Ioctls::Kvm(list(&[tap::IOCTLS, char_device::IOCTLS])),
            // Routes and doorbells follow the guest's wishes.
            Self::Vcpu | Self::XenBus => Ioctls::Kvm(list(&[tap::IOCTLS])),
            // Sockets that do not block, besides.
            Self::Migrate => Ioctls::Kvm(vec![libc::FIONBIO]),
            Self::Worker => Ioctls::Only(list(&[tap::IOCTLS, char_device::IOCTLS])),
            Self::Pager => Ioctls::Only(list(&[uffd::IOCTLS])),
            Self::Store | Self::VhostUser | Self::Populate => Ioctls::Only(Vec::new()),
        }
    }
}

/// Compiles the filter of a class.
///
/// # Errors
/// The rules do not compile: a defect of this module.
pub fn program(class: Class) -> io::Result<Program> {
    let mut filter = Filter::default().with(&class.syscalls());
    let requests = match class.ioctls() {
        Ioctls::All => Vec::new(),
        Ioctls::Kvm(requests) => {
            let kvm = Argument::masked(1, 0xff00, KVM_TYPE << 8);
            filter = filter.only(libc::SYS_ioctl, &[kvm])?;
            requests
        }
        Ioctls::Only(requests) if requests.is_empty() => {
            filter = filter.without(&[libc::SYS_ioctl]);
            requests
        }
        Ioctls::Only(requests) => requests,
    };
    filter = filter.with_ioctls(&requests)?;
    if matches!(class, Class::VhostUser | Class::Migrate | Class::Pager) {
        let unix = Argument::is(0, libc::AF_UNIX as u64);
        filter = filter.only(libc::SYS_socket, &[unix])?;
    }
    filter.allowing(Refusal::End)
}

/// Puts the calling thread under the filter of its class.
///
/// # Errors
/// The kernel refuses filters.
pub fn confine(class: Class) -> io::Result<()> {
    jail::apply(&program(class)?)
}

/// Has a refused system call end the process with a line that names it.
///
/// # Errors
/// The handler cannot be installed.
pub fn report_refusals() -> io::Result<()> {
    jail::report_refusals("blanket-vmm")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Class; 9] = [
        Class::Migrate,
        Class::Setup,
        Class::Main,
        Class::Vcpu,
        Class::Worker,
        Class::Store,
        Class::VhostUser,
        Class::Populate,
        Class::Pager,
    ];

    #[test]
    fn every_filter_compiles_and_none_allows_to_run_or_trace_programs() {
        for class in ALL {
            program(class).unwrap();
            let calls = class.syscalls();
            for never in [
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_ptrace,
                libc::SYS_mount,
            ] {
                assert!(!calls.contains(&never), "{class:?} {never}");
            }
        }
    }

    #[test]
    fn what_threads_may_do_the_filter_that_they_inherit_allows_too() {
        let setup = Class::Setup.syscalls();
        for class in ALL {
            for call in class.syscalls() {
                assert!(setup.contains(&call), "{class:?} {call}");
            }
        }
    }

    #[test]
    fn a_confined_thread_that_opens_a_socket_ends_the_process() {
        // SAFETY: the child makes system calls only.
        let status = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::close(2);
                let ready = report_refusals().is_ok()
                    && super::super::privileges::no_new_privileges().is_ok()
                    && confine(Class::Worker).is_ok();
                if ready {
                    libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                }
                libc::_exit(i32::from(ready));
            }
            let mut status = 0;
            libc::waitpid(pid, &raw mut status, 0);
            libc::WEXITSTATUS(status)
        };
        assert_eq!(status, REFUSED_STATUS);
    }
}
