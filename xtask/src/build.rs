//! Building what runs on nodes and in guests.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::progress::{Progress, Step};
use crate::run::{Output, checked};
use crate::setup;
use crate::workspace::{TARGET, Workspace};

/// The packages whose programs run on nodes, the testbed's agent among them.
const PACKAGES: [&str; 4] = [
    "blanket-vmm",
    "blanket-node",
    "blanket-overlay",
    "blanket-testbed-agent",
];

/// Optimised, with assertions and overflow checks.
pub const TESTING: &str = "testing";
/// As released.
pub const RELEASE: &str = "release";

/// Options of `cargo xtask build`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Build as for a release: without assertions, with whole-program
    /// optimisation.
    #[arg(long)]
    release: bool,
}

/// `cargo xtask build`.
///
/// # Errors
/// Something does not build.
pub fn run(workspace: &Workspace, progress: &Progress, options: &Options) -> Result<ExitCode> {
    setup::run(progress)?;
    let profile = if options.release { RELEASE } else { TESTING };
    let step = progress.step("programs for nodes");
    programs(workspace, &step, profile)?;
    step.done(&workspace.programs(profile).display().to_string());
    let step = progress.step("guest payloads");
    payloads(workspace, &step)?;
    step.done(&workspace.payloads().display().to_string());
    Ok(ExitCode::SUCCESS)
}

/// Builds the programs for nodes into [`Workspace::programs`]. They are
/// static: a node's libc need not be ours.
///
/// # Errors
/// They do not build.
pub fn programs(workspace: &Workspace, step: &Step, profile: &str) -> Result<()> {
    let mut command = for_nodes(workspace, profile);
    command.arg("--bins");
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    checked(step, &mut command, Output::IfItFails).map(drop)
}

/// Builds what runs on nodes.
fn for_nodes(workspace: &Workspace, profile: &str) -> Command {
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let flags = format!("{flags} -C target-feature=+crt-static");
    let mut command = workspace.cargo();
    command.env("RUSTFLAGS", flags);
    command.args(["build", "--target", TARGET, "--profile", profile]);
    command
}

/// Builds the guest payloads into [`Workspace::payloads`].
///
/// # Errors
/// They do not build.
pub fn payloads(workspace: &Workspace, step: &Step) -> Result<()> {
    let mut command = workspace.cargo_in("firmware");
    command.args(["build", "--release"]);
    checked(step, &mut command, Output::IfItFails).map(drop)
}

/// Builds a package's example as its programs for a release, for a benchmark:
/// where it is.
///
/// # Errors
/// It does not build.
pub fn example(
    workspace: &Workspace,
    progress: &Progress,
    package: &str,
    name: &str,
) -> Result<PathBuf> {
    let step = progress.step(&format!("build the example `{name}`"));
    let mut command = for_nodes(workspace, RELEASE);
    command.args(["--package", package, "--example", name]);
    checked(&step, &mut command, Output::IfItFails)?;
    step.done("");
    Ok(workspace.programs(RELEASE).join("examples").join(name))
}
