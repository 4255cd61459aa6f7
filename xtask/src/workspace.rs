//! Where things are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The target that everything is built for. Naming it keeps flags for the
/// programs away from build scripts and procedural macros.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// This source tree and its build directory.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The tree that this program was built from.
    ///
    /// # Errors
    /// `cargo metadata` fails.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in a workspace")?;
        let output = Command::new("cargo")
            .args(["metadata", "--no-deps", "--format-version=1"])
            .current_dir(root)
            .output()
            .context("running cargo metadata")?;
        ensure!(
            output.status.success(),
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let target = metadata["target_directory"]
            .as_str()
            .context("cargo metadata names no target directory")?;
        Ok(Self {
            root: root.to_owned(),
            target: target.into(),
        })
    }

    /// The root of the source tree.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The build directory.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where the programs of a build with `profile` lie.
    #[must_use]
    pub fn programs(&self, profile: &str) -> PathBuf {
        self.target.join(TARGET).join(profile)
    }

    /// Where the guest payloads lie.
    #[must_use]
    pub fn payloads(&self) -> PathBuf {
        self.target.join("firmware").join(TARGET).join("release")
    }

    /// `cargo` in the root.
    #[must_use]
    pub fn cargo(&self) -> Command {
        let mut command = Command::new("cargo");
        command.current_dir(&self.root);
        command
    }

    /// `cargo` in a workspace of its own below the root, whose results go to a
    /// folder of the same name in the build directory.
    #[must_use]
    pub fn cargo_in(&self, name: &str) -> Command {
        let mut command = Command::new("cargo");
        command
            .current_dir(self.root.join(name))
            .env("CARGO_TARGET_DIR", self.target.join(name))
            // Those flags would take the place of the workspace's own.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        command
    }
}
