//! `cargo xtask test`.

mod checks;
mod fuzzing;
pub mod report;
mod suites;

use std::process::ExitCode;

use anyhow::Result;

use crate::build;
use crate::progress::Progress;
use crate::run::{Output, checked};
use crate::setup;
use crate::workspace::Workspace;
use report::{Report, Status};

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Also what takes long: tests marked as ignored, and the fuzz targets for
    /// some seconds each.
    #[arg(long)]
    all: bool,
    /// Leave out the whole-system tests.
    #[arg(long)]
    unit: bool,
    /// Run only the tests whose names, or whose suites' names, contain this, and no lints.
    filter: Option<String>,
}

/// Runs everything and prints the summary. The exit code tells whether
/// anything failed.
///
/// # Errors
/// What the tests need cannot be installed, or a program cannot be started.
pub fn run(workspace: &Workspace, progress: &Progress, options: &Options) -> Result<ExitCode> {
    setup::run(progress)?;
    let mut session = Session {
        workspace,
        progress,
        options,
        report: Report::default(),
    };
    session.checks()?;
    session.suites()?;
    session.fuzzing()?;
    println!("\n{}", session.report);
    Ok(if session.report.failures() != 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// One run of `cargo xtask test`.
struct Session<'a> {
    workspace: &'a Workspace,
    progress: &'a Progress,
    options: &'a Options,
    report: Report,
}

impl Session<'_> {
    /// Runs a command that is one test by itself. Returns whether it passed.
    fn check(&mut self, name: &str, mut command: std::process::Command) -> bool {
        self.attempt(name, |_, step| {
            checked(step, &mut command, Output::IfItFails).map(drop)
        })
    }

    /// Runs a step that is one test by itself. Returns whether it passed.
    fn attempt(
        &mut self,
        name: &str,
        work: impl FnOnce(&Workspace, &crate::progress::Step) -> Result<()>,
    ) -> bool {
        let step = self.progress.step(name);
        let result = work(self.workspace, &step);
        let status = match &result {
            Ok(()) => Status::Passed,
            Err(error) => Status::Failed(format!("{error:#}")),
        };
        self.report.add(name, status);
        match &result {
            Ok(()) => step.done(""),
            Err(error) => step.failed(&format!("{error:#}")),
        }
        result.is_ok()
    }

    fn skip(&mut self, name: &str, reason: &str) {
        self.progress.step(name).skipped(reason);
        self.report.add(name, Status::Skipped(reason.to_owned()));
    }

    fn build_payloads(&mut self) -> bool {
        self.attempt("guest payloads build", build::payloads)
    }

    fn build_programs(&mut self) -> bool {
        self.attempt("programs build", |workspace, step| {
            build::programs(workspace, step, build::TESTING)
        })
    }
}
