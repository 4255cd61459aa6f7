//! The lists of system calls are complete: stores work under them.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::super::{RING_SYSCALLS, THREAD_SYSCALLS};
use super::*;

/// What every thread may do: memory, locks, signals, its own end, and the
/// panic of a failed test.
const BASE: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // This test looks at the event.
    libc::SYS_poll,
    libc::SYS_clock_nanosleep,
];

/// Allows this thread `calls` and the base; anything else fails with `EACCES`.
fn confine(calls: &[libc::c_long]) -> io::Result<()> {
    let rules: BTreeMap<_, _> = BASE.iter().chain(calls).map(|n| (*n, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EACCES as u32),
        SeccompAction::Allow,
        TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?,
    )
    .and_then(BpfProgram::try_from)
    .map_err(io::Error::other)?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

/// Every operation, in a thread that may only do what a store's owner may.
fn all_operations(spec: &Spec) {
    let image = Image::open(spec).unwrap();
    let setup = || Box::new(|| confine(THREAD_SYSCALLS)) as ThreadSetup;
    let mut store = image.queue(8, &setup).unwrap();
    std::thread::spawn(move || {
        confine(RING_SYSCALLS).unwrap();
        let store = &mut *store;
        let mut done = Vec::new();
        let mut bytes = vec![3; 300 * 1024];
        for request in [
            transfer(Operation::Write, 0, &mut bytes, &[5, 1000]),
            transfer(Operation::Read, 512, &mut bytes[512..4096], &[]),
            plain(Operation::Flush, 0, 0),
            plain(Operation::Discard, 8192, 65_536),
            plain(Operation::WriteZeroes, 65_536, 65_536),
            plain(Operation::Discard, 1 << 40, 512),
            plain(Operation::Flush, 0, 0),
        ] {
            let beyond = request.offset == 1 << 40;
            // SAFETY: `bytes` outlives the drain.
            unsafe { store.submit(request) }.unwrap();
            store.commit().unwrap();
            if beyond {
                store.drain(&mut done);
            }
            while done.is_empty() {
                wait(store);
                store.complete(&mut done);
            }
            // A thread's event may come after its completion; then no more.
            std::thread::sleep(std::time::Duration::from_millis(20));
            store.complete(&mut done);
            assert!(!event_within(store, 0), "the event cannot be cleared");
            let result = done.pop().unwrap().result;
            assert_eq!(result.is_err(), beyond, "{result:?}");
        }
    })
    .join()
    .unwrap();
}

#[test]
fn the_engines_need_no_system_call_outside_their_lists() {
    let dir = tempfile::tempdir().unwrap();
    let raw = spec(&raw_image(dir.path(), 1 << 20, 0));
    for engine in [Engine::Auto, Engine::Sync] {
        all_operations(&Spec {
            engine,
            ..raw.clone()
        });
    }
    if have_qemu_img() {
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "disk.raw",
            "-F",
            "raw",
            "top.qcow2",
            "4M",
        ];
        qemu_img(dir.path(), &args);
        all_operations(&Spec {
            format: Some(Format::Qcow2),
            ..spec(&dir.path().join("top.qcow2"))
        });
        qemu_img(dir.path(), &["check", "top.qcow2"]);
    }
}
