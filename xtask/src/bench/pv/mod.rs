//! What the `pv` machine costs: natively on this machine's `/dev/kvm`, and on
//! a node whose KVM has SVM.

mod boot;
mod io;
mod micro;

use anyhow::{Result, bail};
use blanket_testbed::{BootImages, GuestImages, Host, KernelFlavor, guest_check, workloads};

use super::floor;
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
    build::payloads(workspace, &step)?;
    step.done("");
    let step = progress.step("images of the guests, from Debian's packages");
    GuestImages::get()?;
    let boot = BootImages::get(KernelFlavor::Cloud)?;
    let check = guest_check()?;
    workloads()?;
    step.done("");
    let programs = workspace.programs(build::RELEASE);
    let mut rows = boot::rows(&programs, &boot, progress)?;
    let step = progress.step("the least that this KVM lets a guest cost");
    let floors = floor::measure(&workspace.payloads())?;
    step.done("");
    rows.extend(micro::native_rows(&programs, &check, &floors, progress)?);
    rows.extend(io::rows(&programs, progress)?);
    rows.extend(micro::node_rows(&programs, progress)?);
    Ok(rows)
}
