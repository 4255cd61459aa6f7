//! Memory whose file a front end may cut short at any time.
//!
//! Touching what is no longer there raises SIGBUS, and a file can only be
//! sealed by its owner, which few are. So a handler puts zeros where memory of
//! a front end is missing: the access goes on, and the port learns of it. What
//! is nobody's memory raises SIGBUS as before.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};

/// Mappings that are watched at most, of all ports.
const MOST: usize = 8192;

/// A watched mapping; nobody's if it ends at 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of its pages.
    page: AtomicUsize,
    faults: AtomicU64,
}

static SLOTS: [Slot; MOST] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        faults: AtomicU64::new(0),
    }
}; MOST];

/// Slots that have been in use: the first so many.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Taken by those who change slots.
static CHANGE: Mutex<()> = Mutex::new(());
/// Faults of all mappings.
static FAULTS: AtomicU64 = AtomicU64::new(0);
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn change() -> MutexGuard<'static, ()> {
    CHANGE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapping of a front end's memory, watched.
#[derive(Debug)]
pub(super) struct Mapping {
    start: usize,
    len: usize,
    slot: usize,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, to be read and written;
    /// both are multiples of `page`, the bytes of the file's pages.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or there are too many mappings.
    pub(super) fn new(
        file: &impl std::os::fd::AsRawFd,
        offset: u64,
        len: usize,
        page: usize,
    ) -> io::Result<Self> {
        install()?;
        let _change = change();
        let is_free = |slot: &Slot| slot.end.load(Ordering::Relaxed) == 0;
        let slot = SLOTS.iter().position(is_free);
        let slot = slot.ok_or_else(|| io::Error::other("too many mappings"))?;
        // SAFETY: a new mapping wherever there is room.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset.try_into().map_err(io::Error::other)?,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start as usize;
        // Guest memory is of no use in a core file, and not for children.
        // SAFETY: the mapping is ours.
        unsafe { libc::madvise(start as *mut _, len, libc::MADV_DONTDUMP) };
        SLOTS[slot].start.store(start, Ordering::Relaxed);
        SLOTS[slot].page.store(page, Ordering::Relaxed);
        SLOTS[slot].faults.store(0, Ordering::Relaxed);
        SLOTS[slot].end.store(start + len, Ordering::Release);
        USED.fetch_max(slot + 1, Ordering::Release);
        Ok(Self { start, len, slot })
    }

    /// Where it is.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start as *mut u8
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether its owner took memory away.
    pub(super) fn is_cut(&self) -> bool {
        SLOTS[self.slot].faults.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _change = change();
        SLOTS[self.slot].end.store(0, Ordering::Release);
        // SAFETY: the mapping is ours, and whoever has a pointer into it has
        // it, too.
        unsafe { libc::munmap(self.start as *mut _, self.len) };
    }
}

/// Faults so far: when there are more than before, some mapping is cut.
pub(super) fn count() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeros are a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: the handler only does what a handler may: atomics and system
        // calls.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) } == 0 {
            let _ = BEFORE.set(before);
        }
    });
    let installed = BEFORE.get().map(drop);
    installed.ok_or_else(|| io::Error::other("SIGBUS cannot be handled"))
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid pointer, and SIGBUS has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    // SAFETY: errno is this thread's; what was interrupted must find it as it was.
    let errno = unsafe { &mut *libc::__errno_location() };
    let saved = *errno;
    if replace(at) {
        *errno = saved;
        return;
    }
    // Not ours: as before. The default needs no call: it comes when the
    // access is made again.
    let before = BEFORE.get();
    match before.map_or(libc::SIG_DFL, |before| before.sa_sigaction) {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default action for a signal that exists.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        other if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) => {
            // SAFETY: it was installed as a handler of this kind.
            let other: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(other) };
            other(signal, info, context);
        }
        other => {
            // SAFETY: as above.
            let other: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(other) };
            other(signal);
        }
    }
}

/// Puts zeros at `at` if that is in a watched mapping.
fn replace(at: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(MOST);
    for slot in &SLOTS[..used] {
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Relaxed);
        if end == 0 || !(start..end).contains(&at) {
            continue;
        }
        let page = slot.page.load(Ordering::Relaxed).max(1);
        let base = at - at % page;
        // SAFETY: whole pages of a mapping that is somebody's here: he faulted
        // in it, so he has it. Its bytes are volatile, and missing.
        let made = unsafe {
            libc::mmap(
                base as *mut _,
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if made == libc::MAP_FAILED {
            return false;
        }
        slot.faults.fetch_add(1, Ordering::Relaxed);
        FAULTS.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}
