//! Nothing is left of a node, however the program that booted it ends.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(300);

fn until<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "nothing happens");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A program with a node, and the process of the node's QEMU.
fn with_node() -> (Child, String) {
    let child = Command::new(env!("CARGO_BIN_EXE_blanket-testbed"))
        .args(["sleep", "300"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let threads = format!("/proc/{}/task", child.id());
    let qemu = until(|| {
        let children = fs::read_dir(&threads)
            .unwrap()
            .flatten()
            .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
        let children = children.collect::<String>();
        let mut children = children.split_whitespace();
        children
            .find(|child| {
                fs::read_to_string(format!("/proc/{child}/comm"))
                    .is_ok_and(|name| name.starts_with("qemu-system"))
            })
            .map(str::to_owned)
    });
    (child, qemu)
}

fn has_ended(process: &str) -> bool {
    // An orphan may remain as a zombie until init looks after it.
    fs::read_to_string(format!("/proc/{process}/stat")).map_or(true, |stat| {
        stat.rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z')
    })
}

fn end_with(signal: Signal) -> (Child, String) {
    let (mut child, qemu) = with_node();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
    assert!(!child.wait().unwrap().success());
    (child, qemu)
}

#[test]
fn signals_end_qemu_and_remove_its_folder() {
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/testbed/run");
    for signal in [Signal::TERM, Signal::INT] {
        let (child, qemu) = end_with(signal);
        until(|| has_ended(&qemu).then_some(()));
        let ours = format!("{}-", child.id());
        let left = fs::read_dir(&run).unwrap().flatten();
        let left = left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours));
        assert_eq!(left.count(), 0);
    }
}

#[test]
fn qemu_ends_with_a_program_that_is_killed() {
    let (_, qemu) = end_with(Signal::KILL);
    until(|| has_ended(&qemu).then_some(()));
}
