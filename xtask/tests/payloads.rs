//! The guest payloads, in a machine that is not ours: QEMU's q35, emulated.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use xtask::progress::Progress;
use xtask::workspace::Workspace;

/// Builds the payloads; they are small. Returns their folder.
fn payloads() -> PathBuf {
    let workspace = Workspace::find().unwrap();
    let step = Progress::new().step("payloads");
    xtask::build::payloads(&workspace, &step).unwrap();
    workspace.payloads()
}

/// Runs a payload until it powers the machine off. Returns what it said, or
/// nothing where there is no QEMU.
fn run(payload: &str, cmdline: &str, devices: &[&str]) -> Option<String> {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "300", "qemu-system-x86_64"])
        .args([
            "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128",
        ])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(payloads().join(payload))
        .args(["-append", cmdline])
        .args(devices)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(127) {
        println!("skipped, because qemu-system-x86_64 is not installed");
        return None;
    }
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{errors}");
    Some(said)
}

#[test]
fn hello_boots_by_pvh_and_powers_off_by_acpi() {
    if let Some(said) = run("hello", "one two=2", &[]) {
        assert_eq!(
            said.replace('\r', ""),
            "hello from a guest, command line 'one two=2'\n"
        );
    }
}

#[test]
fn evil_finds_the_devices_attacks_them_and_lives_to_tell() {
    // QEMU's chipset and its network device do not survive; others do.
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let drive = format!(
        "file={},if=none,id=disk,format=raw,cache=unsafe",
        disk.path().display()
    );
    let devices = [
        "-device",
        "virtio-rng-pci,disable-legacy=on",
        "-device",
        "virtio-serial-pci,disable-legacy=on",
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,disable-legacy=on,drive=disk",
    ];
    if let Some(said) = run("evil", "devices-only rounds=8 seed=1", &devices) {
        assert!(said.contains("3 of them virtio"), "{said}");
        assert!(said.contains("evil: survived 8 rounds"), "{said}");
    }
    // It did reach the disk: requests of the right shape were carried out.
    let content = std::fs::read(disk.path()).unwrap();
    assert!(content.iter().any(|&byte| byte != 0));
}
