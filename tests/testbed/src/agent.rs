//! Programs of ours for the machines, linked statically, so that they run in any machine.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::cache;
use crate::error::Result;
use crate::program;

/// Where the build goes, apart from the workspace's own build, which may be running.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent if its sources have changed, and returns the program.
pub(crate) fn program() -> Result<PathBuf> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    build(&BUILT, "blanket-testbed-agent", "blanket-agent")
}

/// Builds `guest-check` if its sources have changed, and returns the program: it checks and
/// measures the machine that it runs in. Guests of [`crate::GuestImages`] have it without their
/// disk.
///
/// # Errors
/// [`crate::Error::Program`] when it does not build.
pub fn guest_check() -> Result<PathBuf> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    build(&BUILT, "blanket-guest-check", "guest-check")
}

fn build(built: &OnceLock<PathBuf>, package: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = built.get() {
        return Ok(path.clone());
    }
    let target_dir = cache::subfolder("build")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(cache::workspace())
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            package,
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        // A build that runs this one passes its own settings on.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    program::run(&mut command)?;
    let path = target_dir.join(TARGET).join("release").join(name);
    Ok(built.get_or_init(|| path).clone())
}
