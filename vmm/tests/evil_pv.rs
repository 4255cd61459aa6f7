//! A malicious kernel in a pv machine, on this machine's own `/dev/kvm`. What
//! it does to itself is its own affair; the monitor goes on or ends as it says
//! it does, keeps to its memory, and can be stopped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot be set up fails"
)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::client::{Client, Error};

/// Within this, what is asked of a monitor is done.
const LIMIT: Duration = Duration::from_secs(60);
/// So long a guest may run that does not end by itself.
const RUN: Duration = Duration::from_secs(2);
/// MiB of guest memory, and all that a monitor may ever have in memory: that,
/// the hypervisor's area, and what it needs itself.
const GUEST_MIB: u64 = 64;
const MOST_MIB: u64 = GUEST_MIB + 32 + 64;

/// The payload, or `None` after saying why there is none.
fn payload() -> Option<PathBuf> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped, because /dev/kvm cannot be used: {error}");
        return None;
    }
    let Some(folder) = std::env::var_os("BLANKET_FIRMWARE_DIR") else {
        println!("skipped, because the payloads are not built: run `cargo xtask test`");
        return None;
    };
    Some(Path::new(&folder).join("evil-pv"))
}

/// A monitor with the malicious guest, and what it leaves.
struct Run {
    child: Child,
    folder: tempfile::TempDir,
    /// The most MiB that were seen in memory.
    peak: u64,
}

impl Run {
    fn start(payload: &Path, command_line: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let disk = fs::File::create(path("disk")).unwrap();
        disk.set_len(1 << 20).unwrap();
        let errors = fs::File::create(path("errors")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_blanket-vmm"))
            .args(["--machine", "pv", "--cpus", "2"])
            .arg(format!("--memory={GUEST_MIB}M"))
            .arg(format!("--kernel={}", payload.display()))
            .arg(format!("--cmdline={command_line}"))
            .arg(format!("--serial=log={}", path("serial").display()))
            .arg(format!(
                "--disk=path={},engine=sync",
                path("disk").display()
            ))
            .arg(format!("--api-socket={}", path("api").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .unwrap();
        Self {
            child,
            folder,
            peak: 0,
        }
    }

    fn read(&self, name: &str) -> String {
        let bytes = fs::read(self.folder.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for its end, for so long at most.
    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
            let peak = status.unwrap_or_default().lines().find_map(|line| {
                let kib = line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?;
                Some(kib.parse::<u64>().unwrap() >> 10)
            });
            self.peak = self.peak.max(peak.unwrap_or(0));
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Leads a monitor through what can be asked of it, and to its end.
    fn stop(&mut self) -> ExitStatus {
        let asked = self.ask();
        // The guest may have come to its end just now, and its monitor with it; nothing else may
        // fail.
        if let Err(error) = &asked {
            assert!(
                matches!(error, Error::Connect { .. } | Error::Protocol { .. }),
                "{error}"
            );
        }
        let status = self.wait(LIMIT);
        status.unwrap_or_else(|| panic!("the monitor does not end: {asked:?}"))
    }

    fn ask(&self) -> Result<(), Error> {
        let api = Client::new(self.folder.path().join("api"))?;
        assert_eq!(api.act(Action::Pause)?.state, VmState::Paused);
        assert_eq!(api.act(Action::Resume)?.state, VmState::Running);
        api.metrics()?;
        api.act(Action::Poweroff).map(drop)
    }

    /// It ended as monitors end: with success, or one line that says why not.
    fn check(&self, status: ExitStatus, what: &str) {
        let errors = self.read("errors");
        assert_eq!(status.signal(), None, "{what}: {status}\n{errors}");
        assert!(!errors.contains("panicked"), "{what}: {errors}");
        if !status.success() {
            let lines = errors.lines();
            let said = lines.filter(|line| line.starts_with("blanket-vmm: "));
            assert_eq!(
                (status.code(), said.count()),
                (Some(1), 1),
                "{what}: {errors:?}"
            );
        }
        assert!(self.peak <= MOST_MIB, "{what}: {} MiB", self.peak);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs that may harm the guest: each ends by itself or is stopped.
fn survive(mode: &str) {
    let Some(payload) = payload() else {
        return;
    };
    for seed in 1..=16 {
        let line = format!("mode={mode} seed={seed} steps=1000");
        let mut run = Run::start(&payload, &line);
        let status = run.wait(RUN).unwrap_or_else(|| run.stop());
        run.check(status, &line);
    }
}

/// Runs that do the guest no harm: it gets to its end.
fn unharmed(mode: &str) {
    let Some(payload) = payload() else {
        return;
    };
    for seed in 1..=4 {
        let line = format!("mode={mode} seed={seed} steps=2000");
        let mut run = Run::start(&payload, &line);
        let status = run.wait(LIMIT).expect("the guest does not end");
        run.check(status, &line);
        // What a kernel writes early is for whoever started the monitor.
        let said = run.read("serial") + &run.read("errors");
        let survived = said.contains("evil-pv: survived 2000 steps");
        assert!(
            status.success() && survived,
            "{line}: {}",
            run.read("errors")
        );
    }
}

#[test]
fn hypercalls_with_garbage_get_errors() {
    unharmed("calls");
}

#[test]
fn garbage_in_shared_pages_and_rings_harms_nobody() {
    unharmed("shared");
}

#[test]
fn any_hypercall_with_any_address_leaves_the_monitor_in_control() {
    survive("wild");
}

#[test]
fn garbage_in_the_shim_leaves_the_monitor_in_control() {
    survive("shim");
}

#[test]
fn garbage_in_page_tables_leaves_the_monitor_in_control() {
    survive("tables");
}
