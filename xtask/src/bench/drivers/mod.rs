//! What a guest gets of this machine's disk and network, beside what the
//! machine itself gets of them in the same run; and what persistent grants save.

mod grants;
mod io;
mod probing;

use anyhow::{Result, bail};
use blanket_testbed::{GuestImages, Host, workloads};

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
/// There are no native guests on this machine, or one of them does not do
/// what is asked.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    if let Some(obstacle) = Host::obstacle() {
        bail!("no native guests: {obstacle}");
    }
    setup::run(progress)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let cable = build::example(workspace, progress, "blanket-drivers", "cable")?;
    let step = progress.step("images of the guests, from Debian's packages");
    GuestImages::get()?;
    workloads()?;
    step.done("");
    let programs = workspace.programs(build::RELEASE);
    let mut rows = io::rows(&programs, &cable, &workspace.payloads(), progress)?;
    rows.extend(probing::rows(&programs, progress)?);
    rows.extend(grants::rows(&programs, progress)?);
    Ok(rows)
}
