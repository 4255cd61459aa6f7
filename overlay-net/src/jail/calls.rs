//! The system calls of each class of thread.

use libc::c_long;

/// Sockets that are there: of the API, of controllers, of tunnels.
pub(super) const SOCKETS: &[c_long] = &[
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// Waiting for several things.
pub(super) const EVENTS: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// Reading and writing in pieces.
pub(super) const PIECES: &[c_long] = &[
    // What front ends kick by is read so: see `port::vhost_user`.
    libc::SYS_preadv2,
    libc::SYS_readv,
    libc::SYS_writev,
];

/// What a file is.
pub(super) const ABOUT_FILES: &[c_long] = &[
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_statx,
];

/// Reading files, as the resolver does.
pub(super) const READING: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// What is kept, and sockets' files.
pub(super) const WRITING: &[c_long] = &[
    libc::SYS_chown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lchown,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Making sockets, but for `socket` itself.
pub(super) const MEETING: &[c_long] = &[libc::SYS_bind, libc::SYS_connect];

/// Those who connect.
pub(super) const ACCEPTING: &[c_long] = &[libc::SYS_accept, libc::SYS_accept4, libc::SYS_listen];

/// Making threads, but for `clone` itself, and what they do before they are
/// under their own filter.
pub(super) const THREADS: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
];

/// Making taps, and sockets that do not wait; what the resolver asks sockets.
pub(super) const IOCTLS: &[libc::Ioctl] = &[
    libc::FIOCLEX,
    libc::FIONBIO,
    libc::FIONREAD,
    libc::SIOCGIFFLAGS as libc::Ioctl,
    libc::SIOCGIFINDEX as libc::Ioctl,
    libc::SIOCGIFMTU as libc::Ioctl,
    libc::SIOCSIFFLAGS as libc::Ioctl,
    libc::SIOCSIFMTU as libc::Ioctl,
    libc::TUNSETIFF,
    libc::TUNSETOFFLOAD,
    libc::TUNSETVNETHDRSZ,
];
