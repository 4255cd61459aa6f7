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

/// Signals that an instruction of the thread itself may cause.
const OWN_FAULTS: [libc::c_int; 6] = [
    libc::SIGSYS,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// Blocks the signal on this thread, and all others that are not of its own
/// making: the handlers of those belong to other threads, whose filters allow
/// what they do.
pub(super) fn block() -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigfillset initializes the set; pthread_sigmask returns an error
    // number.
    let done = unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for signal in OWN_FAULTS {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    match done {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Has KVM unblock the signal, and no other, while the guest runs.
pub(super) fn unblock_in_guest(fd: &VcpuFd) -> io::Result<()> {
    let open = OWN_FAULTS.iter().copied().chain([kick_signal()]);
    let blocked = open.fold(u64::MAX, |set, signal| set & !(1 << (signal - 1)));
    let mask = SignalMask {
        len: SIGSET_SIZE as u32,
        set: blocked.to_le_bytes(),
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
