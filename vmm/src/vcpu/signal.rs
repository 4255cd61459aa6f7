//! The signal that takes a vCPU out of the guest.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_ioctls::VcpuFd;

/// System calls that consuming the signal and returning from its handler need.
pub const KICK_SYSCALLS: &[libc::c_long] = &[libc::SYS_rt_sigreturn, libc::SYS_rt_sigtimedwait];

/// Bytes of the kernel's signal set.
const SIGSET_SIZE: usize = 8;

#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; SIGSET_SIZE],
}

vmm_sys_util::ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, kvm_bindings::KVMIO, 0x8b, u32);

/// The signal's number.
#[must_use]
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: libc::c_int) {}

/// Gives the signal a handler that does nothing: its arrival is the message.
pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: the structure is plain data, the handler is async-signal-safe.
    let done = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
    };
    check(done)
}

fn kick_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), kick_signal());
        set.assume_init()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Blocks the signal on this thread.
pub(super) fn block() -> io::Result<()> {
    let set = kick_set();
    // SAFETY: the set is valid; pthread_sigmask returns an error number.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Has KVM unblock the signal (and block no other) while the guest runs.
pub(super) fn unblock_in_guest(fd: &VcpuFd) -> io::Result<()> {
    let mask = SignalMask {
        len: SIGSET_SIZE as u32,
        set: [0; SIGSET_SIZE],
    };
    // SAFETY: the structure is `struct kvm_signal_mask` with its 8-byte set.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SIGNAL_MASK() as _, &raw const mask) })
}

/// Takes a pending signal away.
pub(super) fn consume() {
    wait_for_kick(Duration::ZERO);
}

/// Waits for the signal, on a vCPU's thread, and takes it away.
pub fn wait_for_kick(most: Duration) {
    let set = kick_set();
    let now = libc::timespec {
        tv_sec: most.as_secs().cast_signed(),
        tv_nsec: most.subsec_nanos().into(),
    };
    // SAFETY: the set and the timeout are valid; no information is asked for.
    unsafe {
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now);
    }
}
