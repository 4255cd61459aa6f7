//! The agent's program, for the machines and for the host.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::cache;
use crate::error::Result;
use crate::program;

/// The package that holds the agent.
const PACKAGE: &str = "blanket-testbed-agent";

/// Where the build goes, apart from the workspace's own build, which may be running.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent if its sources have changed, and returns the program. It is linked
/// statically, so that it runs in any machine.
pub(crate) fn program() -> Result<PathBuf> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BUILT.get() {
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
            PACKAGE,
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
    let path = target_dir.join(TARGET).join("release/blanket-agent");
    Ok(BUILT.get_or_init(|| path).clone())
}
