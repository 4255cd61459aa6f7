//! What has to go when the test ends, however it ends.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

/// What is to be ended or removed when the process is told to stop.
struct Pending {
    processes: BTreeSet<i32>,
    folders: BTreeSet<PathBuf>,
}

static PENDING: Mutex<Pending> = Mutex::new(Pending {
    processes: BTreeSet::new(),
    folders: BTreeSet::new(),
});

/// Registers a child process. It must not be waited for before [`process_ended`] is called.
pub(crate) fn process_started(pid: u32) {
    watch_signals();
    pending().processes.extend(i32::try_from(pid));
}

/// Forgets a child process.
pub(crate) fn process_ended(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        pending().processes.remove(&pid);
    }
}

/// Registers a folder to remove.
pub(crate) fn folder_made(path: &Path) {
    watch_signals();
    pending().folders.insert(path.to_owned());
}

/// Forgets a folder.
pub(crate) fn folder_removed(path: &Path) {
    pending().folders.remove(path);
}

fn pending() -> MutexGuard<'static, Pending> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs the handler for Ctrl-C, SIGTERM and SIGHUP, unless the program has its own. Then
/// the children end with the process all the same: the kernel sees to it.
fn watch_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let installed = ctrlc::try_set_handler(|| {
            end_all();
            std::process::exit(130);
        });
        match installed {
            Ok(()) | Err(ctrlc::Error::MultipleHandlers) => {}
            Err(error) => eprintln!("testbed: does not clean up on signals: {error}"),
        }
    });
}

fn end_all() {
    // Held until the end: nothing is started any more, and no number is reused meanwhile.
    let pending = pending();
    for pid in pending
        .processes
        .iter()
        .filter_map(|&pid| Pid::from_raw(pid))
    {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
    for folder in &pending.folders {
        // Nothing else can be done about it.
        let _ = fs::remove_dir_all(folder);
    }
}
