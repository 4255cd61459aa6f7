//! Default-deny system call filters.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// A compiled filter.
pub use seccompiler::BpfProgram as Program;

/// What any thread's run time needs: memory, locks, time, its own end.
pub const BASE: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
];

/// What the standard library does where it checks itself: it looks whether a
/// descriptor is open before it closes it.
pub const ASSERTIONS: &[libc::c_long] = if cfg!(debug_assertions) {
    &[libc::SYS_fcntl]
} else {
    &[]
};

/// All bits of an `int`, for [`Argument`]s.
pub const INT: u64 = 0xffff_ffff;

/// What an argument of a system call has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Which, from 0.
    pub index: u8,
    /// The bits that are looked at.
    pub mask: u64,
    /// What they have to be.
    pub value: u64,
}

impl Argument {
    /// An `int` that has to be `value`.
    #[must_use]
    pub const fn is(index: u8, value: u64) -> Self {
        Self::masked(index, INT, value)
    }

    /// One whose bits in `mask` have to be `value`.
    #[must_use]
    pub const fn masked(index: u8, mask: u64, value: u64) -> Self {
        Self { index, mask, value }
    }

    fn condition(self) -> Result<SeccompCondition, seccompiler::BackendError> {
        // What is above an `int` in its register is nobody's.
        let len = if self.mask > INT {
            SeccompCmpArgLen::Qword
        } else {
            SeccompCmpArgLen::Dword
        };
        let op = SeccompCmpOp::MaskedEq(self.mask);
        SeccompCondition::new(self.index, len, op, self.value)
    }
}

/// What becomes of a system call that a filter does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It raises SIGSYS, and so ends the process: see [`report_refusals`].
    End,
    /// The kernel logs it, and does it.
    Log,
}

/// A filter in the making: system calls, with the arguments that they may have.
#[derive(Clone, Debug, Default)]
pub struct Filter(BTreeMap<i64, Vec<SeccompRule>>);

impl Filter {
    /// With these calls too, whatever their arguments are, unless [`only`]
    /// says something of them.
    ///
    /// [`only`]: Self::only
    #[must_use]
    pub fn with(mut self, calls: &[libc::c_long]) -> Self {
        for call in calls {
            self.0.entry(*call).or_default();
        }
        self
    }

    /// Without these.
    #[must_use]
    pub fn without(mut self, calls: &[libc::c_long]) -> Self {
        self.0.retain(|call, _| !calls.contains(call));
        self
    }

    /// With a call whose arguments are all as said; said several times, one of
    /// these is enough.
    ///
    /// # Errors
    /// There is no such argument: a defect of the caller.
    pub fn only(mut self, call: libc::c_long, arguments: &[Argument]) -> io::Result<Self> {
        let conditions: Result<_, _> = arguments.iter().map(|it| it.condition()).collect();
        let rule = conditions.and_then(SeccompRule::new);
        let rule = rule.map_err(io::Error::other)?;
        self.0.entry(call).or_default().push(rule);
        Ok(self)
    }

    /// With ioctls of these requests.
    ///
    /// # Errors
    /// As [`Self::only`].
    pub fn with_ioctls(self, requests: &[libc::Ioctl]) -> io::Result<Self> {
        requests.iter().try_fold(self, |filter, request| {
            filter.only(libc::SYS_ioctl, &[Argument::is(1, *request)])
        })
    }

    fn compile(self, others: SeccompAction, these: SeccompAction) -> io::Result<Program> {
        SeccompFilter::new(self.0, others, these, TargetArch::x86_64)
            .and_then(Program::try_from)
            .map_err(io::Error::other)
    }

    /// Allows these calls and no others.
    ///
    /// # Errors
    /// The rules do not compile: a defect of the caller.
    pub fn allowing(self, refusal: Refusal) -> io::Result<Program> {
        let others = match refusal {
            Refusal::End => SeccompAction::Trap,
            Refusal::Log => SeccompAction::Log,
        };
        self.compile(others, SeccompAction::Allow)
    }

    /// Has these calls fail with `errno`, and says nothing of others.
    ///
    /// # Errors
    /// As [`Self::allowing`].
    pub fn failing(self, errno: libc::c_int) -> io::Result<Program> {
        // Numbers of errors are small and positive.
        let failure = SeccompAction::Errno(errno.unsigned_abs());
        self.compile(SeccompAction::Allow, failure)
    }
}

/// Puts the calling thread, and those that it starts, under a filter besides
/// those that it has.
///
/// # Errors
/// The kernel refuses filters.
pub fn apply(program: &Program) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

/// Offset of the system call's number in the kernel's `siginfo` of SIGSYS:
/// behind signal, errno, code, padding and the call's address.
const SIGINFO_SYSCALL: usize = 24;

static PROGRAM: OnceLock<&'static str> = OnceLock::new();

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a siginfo of 128 bytes.
    let number = unsafe { *info.byte_add(SIGINFO_SYSCALL).cast::<i32>() };
    // No allocation in a signal handler: digits by hand.
    let mut line = *b": a thread made a forbidden system call: number     \n";
    let end = line.len() - 2;
    let mut rest = number.unsigned_abs();
    for place in (end - 3..=end).rev() {
        line[place] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let name = PROGRAM.get().copied().unwrap_or_default();
    // SAFETY: write and _exit are async-signal-safe, and every filter has them.
    unsafe {
        libc::write(2, name.as_ptr().cast(), name.len());
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(REFUSED_STATUS);
    }
}

/// Exit status of a process one of whose threads broke out of its filter.
pub const REFUSED_STATUS: libc::c_int = 159;

/// Has a refused system call end the process with a line that names it, and
/// `program`.
///
/// # Errors
/// The handler cannot be installed.
pub fn report_refusals(program: &'static str) -> io::Result<()> {
    PROGRAM.get_or_init(|| program);
    // SAFETY: plain data; the handler is async-signal-safe.
    let done = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = refused as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    super::privileges::check(done)
}

/// Keeps glibc to one arena: others cost memory, and to shrink them it opens a
/// file, which not every confined thread may. To be called while the process
/// has one thread.
pub fn one_arena() {
    // SAFETY: changes a setting of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
