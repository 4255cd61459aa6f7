//! Filters, tried out in children.

use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixListener;

use super::*;

const ALL: [Class; 4] = [
    Class::Main,
    Class::Resolver,
    Class::Worker,
    Class::VhostUser,
];

#[test]
fn every_filter_compiles_and_none_allows_to_run_or_trace_programs() {
    for class in ALL {
        class.filter().unwrap().allowing(Refusal::End).unwrap();
        let calls = class.calls();
        for never in [
            libc::SYS_bpf,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_process_vm_writev,
            libc::SYS_ptrace,
            libc::SYS_setns,
            libc::SYS_unshare,
        ] {
            assert!(!calls.contains(&never), "{class:?} {never}");
        }
    }
    newer_clone().unwrap();
    executable().unwrap();
}

#[test]
fn what_threads_may_do_the_filter_that_they_inherit_allows_too() {
    let main = Class::Main.calls();
    for class in ALL {
        for call in class.calls() {
            assert!(main.contains(&call), "{class:?} {call}");
        }
        for request in class.ioctls() {
            assert!(Class::Main.ioctls().contains(request), "{class:?}");
        }
    }
}

#[test]
fn threads_that_parse_what_strangers_send_open_no_files() {
    for class in [Class::Worker, Class::VhostUser] {
        let calls = class.calls();
        for never in [libc::SYS_openat, libc::SYS_connect, libc::SYS_unlink] {
            assert!(!calls.contains(&never), "{class:?} {never}");
        }
        assert!(class.ioctls().is_empty());
    }
}

/// The exit status of a child that does this under the filter of a class, which
/// it inherits from the main thread's as in the switch.
fn status(class: Class, act: impl FnOnce()) -> i32 {
    let chosen = Confinement {
        seccomp: Seccomp::On,
        ..Confinement::default()
    };
    // SAFETY: the child ends by _exit. It was made by a thread that holds none
    // of the run time's locks; others' are not taken.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::close(2);
            CHOSEN.get_or_init(|| chosen);
            let ready = privileges::no_new_privileges().is_ok()
                && seccomp::report_refusals("test").is_ok()
                && enter(Class::Main).is_ok()
                && (class == Class::Main || enter(class).is_ok());
            if !ready {
                libc::_exit(1);
            }
            act();
            libc::_exit(0);
        }
        let mut status = 0;
        libc::waitpid(pid, &raw mut status, 0);
        libc::WEXITSTATUS(status)
    }
}

const ENDED: i32 = seccomp::REFUSED_STATUS;

#[test]
fn each_class_has_its_sockets_and_no_others() {
    let raw = |family, kind, protocol| {
        move || {
            // SAFETY: socket takes integers.
            unsafe { libc::socket(family, kind, protocol) };
        }
    };
    for class in ALL {
        let all = [
            raw(libc::AF_PACKET, libc::SOCK_RAW, 0),
            raw(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
            raw(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_AUDIT),
            raw(libc::AF_VSOCK, libc::SOCK_STREAM, 0),
            raw(libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        ];
        for socket in all {
            assert_eq!(status(class, socket), ENDED, "{class:?}");
        }
    }
    let tcp = || drop(TcpStream::connect("127.0.0.1:1"));
    let udp = || drop(UdpSocket::bind("127.0.0.1:0"));
    assert_eq!(status(Class::Main, tcp), 0);
    assert_eq!(status(Class::Resolver, tcp), 0);
    assert_eq!(status(Class::Worker, tcp), ENDED);
    assert_eq!(status(Class::Worker, udp), 0);
    assert_eq!(status(Class::VhostUser, udp), ENDED);
    let routes = raw(libc::AF_NETLINK, libc::SOCK_DGRAM, libc::NETLINK_ROUTE);
    assert_eq!(status(Class::Worker, routes), 0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    assert_eq!(status(Class::Main, || drop(UnixListener::bind(&path))), 0);
}

#[test]
fn files_are_the_main_threads() {
    let read = || drop(std::fs::read("/etc/hosts"));
    assert_eq!(status(Class::Main, read), 0);
    assert_eq!(status(Class::Resolver, read), 0);
    assert_eq!(status(Class::Worker, read), ENDED);
    assert_eq!(status(Class::VhostUser, read), ENDED);
    let remove = || drop(std::fs::remove_file("/nowhere/none"));
    assert_eq!(status(Class::Main, remove), 0);
    assert_eq!(status(Class::Resolver, remove), ENDED);
}

fn map(protection: libc::c_int) -> bool {
    // SAFETY: a new mapping wherever there is room, which nobody uses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    at != libc::MAP_FAILED
}

#[test]
fn no_memory_is_executable() {
    let plain = libc::PROT_READ | libc::PROT_WRITE;
    let either = |protection| {
        move || {
            let code = if map(protection) { 7 } else { 8 };
            // SAFETY: ends the child.
            unsafe { libc::_exit(code) };
        }
    };
    for class in ALL {
        assert_eq!(status(class, either(plain)), 7, "{class:?}");
    }
    let executable = libc::PROT_READ | libc::PROT_EXEC;
    assert_eq!(status(Class::Main, either(executable)), 8);
    assert_eq!(status(Class::Resolver, either(executable)), 8);
    assert_eq!(status(Class::Worker, either(executable)), ENDED);
    assert_eq!(status(Class::VhostUser, either(executable)), ENDED);
}

#[test]
fn threads_are_made_but_no_processes_and_no_namespaces() {
    let thread = || {
        let made = std::thread::Builder::new().name("thread".to_owned());
        let made = made.spawn(|| enter(Class::Worker).is_ok());
        let done = made.is_ok_and(|thread| thread.join().is_ok_and(|entered| entered));
        // SAFETY: ends the child.
        unsafe { libc::_exit(if done { 7 } else { 8 }) };
    };
    assert_eq!(status(Class::Main, thread), 7);
    let clone = |flags: libc::c_int| {
        move || {
            // SAFETY: without a stack of its own, a process of its own; it ends.
            unsafe {
                if libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) == 0 {
                    libc::_exit(0);
                }
            }
        }
    };
    assert_eq!(status(Class::Main, clone(0)), ENDED);
    assert_eq!(status(Class::Main, clone(libc::CLONE_NEWUSER)), ENDED);
    // Nor does it signal others.
    let signal = || {
        // SAFETY: plain numbers; signal 0 is none.
        unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
    };
    for class in ALL {
        assert_eq!(status(class, signal), ENDED, "{class:?}");
    }
}
