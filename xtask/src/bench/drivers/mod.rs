//! What hides the provider's machine, against that machine itself.

mod grants;

use anyhow::Result;
use blanket_testbed::{GuestImages, workloads};

use super::row::Row;
use crate::build;
use crate::progress::Progress;
use crate::setup;
use crate::workspace::Workspace;

/// Runs of everything; the rows have their medians.
const RUNS: usize = 5;

/// Measures all of it.
///
/// # Errors
/// Something does not build, or a machine or a guest does not do what is
/// asked.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    setup::run(progress)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let step = progress.step("images of the guests, from Debian's packages");
    GuestImages::get()?;
    workloads()?;
    step.done("");
    let programs = workspace.programs(build::RELEASE);
    grants::rows(&programs, progress)
}
