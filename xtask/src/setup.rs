//! What the other commands need on a fresh Debian machine.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::progress::Progress;
use crate::run::{Output, checked};

/// What building and testing need. The testbed installs what its machines
/// are made of when it makes them.
const PACKAGES: [&str; 8] = [
    "gcc",
    "libc6-dev",
    "openssl",
    "openvswitch-common",
    "python3-os-ken",
    "qemu-system-x86",
    "qemu-utils",
    "tcpdump",
];

/// A version that the workspace's Rust can build.
const NEXTEST: &str = "cargo-nextest@0.9.143";
const DENY: &str = "cargo-deny@0.20.2";
const FUZZ: &str = "cargo-fuzz@0.13.2";

/// Installs whatever is missing.
///
/// # Errors
/// Something cannot be installed; the message says what and the remedy.
pub fn run(progress: &Progress) -> Result<()> {
    let step = progress.step("packages");
    blanket_testbed::ensure_packages(&PACKAGES)?;
    step.done("");
    install(progress, "nextest", NEXTEST)
}

/// Installs `cargo deny`, which takes minutes to build.
///
/// # Errors
/// It cannot be built.
pub fn cargo_deny(progress: &Progress) -> Result<()> {
    install(progress, "deny", DENY)
}

/// Installs `cargo fuzz`, and the C++ compiler for its engine.
///
/// # Errors
/// It cannot be installed.
pub fn cargo_fuzz(progress: &Progress) -> Result<()> {
    let step = progress.step("packages for fuzzing");
    blanket_testbed::ensure_packages(&["g++"])?;
    step.done("");
    install(progress, "fuzz", FUZZ)
}

/// Whether `cargo NAME` is there.
#[must_use]
pub fn has_subcommand(name: &str) -> bool {
    Command::new("cargo")
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn install(progress: &Progress, name: &str, package: &str) -> Result<()> {
    if has_subcommand(name) {
        return Ok(());
    }
    let step = progress.step(&format!("cargo install {package}"));
    let mut command = Command::new("cargo");
    command.args(["install", "--locked", package]);
    checked(&step, &mut command, Output::IfItFails)?;
    step.done("");
    Ok(())
}
