//! `cargo xtask fuzz`: every fuzz target for a while.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail, ensure};

use crate::progress::{Progress, Step};
use crate::run::{Output, checked, outcome};
use crate::setup;
use crate::workspace::{TARGET, Workspace};

/// What a target prints, and then exits well, where it cannot run.
const SKIPPED: &str = "skipped, because ";
/// Seconds after which one input counts as a hang.
const HANG: u32 = 10;
/// MiB that a target may take in all.
const MEMORY: u32 = 1024;
/// Bytes of an input at most.
const LONGEST: u32 = 4096;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Run only this target.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 20)]
    seconds: u32,
}

/// How a target's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It found nothing.
    Clean,
    /// It cannot run here.
    Skipped(String),
    /// It found an input; the output has been printed.
    Found,
}

/// Runs the targets, one after the other.
///
/// # Errors
/// `cargo fuzz` cannot be installed, the targets do not build, or there is no
/// such target.
pub fn run(workspace: &Workspace, progress: &Progress, options: &Options) -> Result<ExitCode> {
    setup::cargo_fuzz(progress)?;
    let step = progress.step("fuzz targets build");
    let targets = build(workspace, &step)?;
    step.done("");
    if let Some(wanted) = &options.target {
        ensure!(
            targets.contains(wanted),
            "no fuzz target '{wanted}'; there are {}",
            targets.join(", ")
        );
    }
    let mut found = Vec::new();
    for target in targets {
        if options.target.as_ref().is_some_and(|it| *it != target) {
            continue;
        }
        let step = progress.step(&format!("fuzz {target}"));
        match fuzz(workspace, &step, &target, options.seconds)? {
            Verdict::Clean => step.done(""),
            Verdict::Skipped(reason) => step.skipped(&reason),
            Verdict::Found => {
                step.failed("the input is in fuzz/artifacts");
                found.push(target);
            }
        }
    }
    if !found.is_empty() {
        bail!("found something: {}", found.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the targets and returns their names.
///
/// # Errors
/// They do not build.
pub fn build(workspace: &Workspace, step: &Step) -> Result<Vec<String>> {
    let mut command = cargo_fuzz(workspace, "build");
    checked(step, &mut command, Output::IfItFails)?;
    let mut command = workspace.cargo_in("fuzz");
    command.args(["fuzz", "list"]);
    let list = checked(step, &mut command, Output::IfItFails)?;
    Ok(list.split_whitespace().map(str::to_owned).collect())
}

/// Runs a target for so many seconds.
///
/// # Errors
/// `cargo fuzz` cannot be run.
pub fn fuzz(workspace: &Workspace, step: &Step, target: &str, seconds: u32) -> Result<Verdict> {
    let mut command = cargo_fuzz(workspace, "run");
    command.arg(target).arg("--").args([
        format!("-max_total_time={seconds}"),
        format!("-timeout={HANG}"),
        format!("-rss_limit_mb={MEMORY}"),
        format!("-max_len={LONGEST}"),
        "-len_control=0".to_owned(),
    ]);
    let outcome = outcome(step, &mut command, Output::IfItFails)?;
    Ok(verdict(outcome.success, &outcome.text))
}

fn verdict(success: bool, text: &str) -> Verdict {
    let skipped = text.lines().find_map(|line| line.strip_prefix(SKIPPED));
    match (success, skipped) {
        (false, _) => Verdict::Found,
        (true, Some(reason)) => Verdict::Skipped(reason.to_owned()),
        (true, None) => Verdict::Clean,
    }
}

/// `cargo fuzz`, on the Rust that builds everything else: the address
/// sanitizer would need another one.
fn cargo_fuzz(workspace: &Workspace, subcommand: &str) -> Command {
    let mut command = workspace.cargo_in("fuzz");
    command
        .args(["fuzz", subcommand, "--sanitizer", "none"])
        .args(["--target", TARGET]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_clean_skipped_with_its_reason_or_has_found_something() {
        assert_eq!(verdict(true, "INFO: Seed: 1\nDone"), Verdict::Clean);
        let reason = Verdict::Skipped("there is no tap".to_owned());
        let text = "INFO: Seed: 1\nskipped, because there is no tap\n";
        assert_eq!(verdict(true, text), reason);
        assert_eq!(verdict(false, text), Verdict::Found);
    }
}
