//! What is kept of a machine whose test fails.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::cache;
use crate::error::{Context, Result};
use crate::qemu::RunFolder;

/// Writes what QEMU knows of a running machine's processors to `state.log`, and the most of it to
/// standard error: whether it sleeps, loops, or was never told of an interrupt that is pending.
pub(super) fn keep_state(folder: &RunFolder, cpus: u8) {
    let ask = || -> io::Result<()> {
        let mut monitor = UnixStream::connect(folder.socket("monitor.sock"))?;
        monitor.set_read_timeout(Some(Duration::from_secs(1)))?;
        monitor.write_all(b"info registers -a\n")?;
        for cpu in 0..cpus {
            writeln!(monitor, "info lapic {cpu}")?;
        }
        let mut state = Vec::new();
        // Ends with the time limit.
        let _ = monitor.read_to_end(&mut state);
        for line in String::from_utf8_lossy(&state).lines() {
            if ["CPU#", "RIP=", "IRR", "ISR", "Timer"]
                .iter()
                .any(|start| line.starts_with(start))
            {
                eprintln!("testbed: {line}");
            }
        }
        fs::write(folder.path().join("state.log"), state)
    };
    // A machine that is gone has nothing to tell.
    let _ = ask();
}

/// Copies the machine's console output and QEMU's messages to where they stay.
pub(super) fn keep_log(folder: &RunFolder, name: &str) -> Result<PathBuf> {
    let this = thread::current();
    let test = this.name().unwrap_or("main").replace("::", "-");
    let path = cache::subfolder("logs")?.join(format!("{test}-{name}.log"));
    let collect = |path: &Path| {
        let mut log = fs::File::create(path)?;
        for part in ["qemu.log", "console.log", "state.log"] {
            // A machine that did not start has no console, one that passed no state.
            log.write_all(&fs::read(folder.path().join(part)).unwrap_or_default())?;
        }
        Ok(())
    };
    collect(&path).context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
