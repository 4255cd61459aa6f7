//! The fuzz targets, for some seconds each.

use anyhow::Result;

use super::Session;
use super::report::Status;
use crate::fuzz::{self, Verdict};
use crate::setup;

/// How long each target runs.
const SECONDS: u32 = 20;

impl Session<'_> {
    /// Runs all targets, if everything is asked for.
    pub(super) fn fuzzing(&mut self) -> Result<()> {
        if !self.options.all || self.options.filter.is_some() {
            return Ok(());
        }
        setup::cargo_fuzz(self.progress)?;
        let mut targets = Vec::new();
        self.attempt("fuzz targets build", |workspace, step| {
            targets = fuzz::build(workspace, step)?;
            Ok(())
        });
        for target in targets {
            let name = format!("fuzz {target}");
            let step = self.progress.step(&name);
            match fuzz::fuzz(self.workspace, &step, &target, SECONDS)? {
                Verdict::Clean => {
                    step.done("");
                    self.report.add(&name, Status::Passed);
                }
                Verdict::Skipped(reason) => {
                    step.skipped(&reason);
                    self.report.add(&name, Status::Skipped(reason));
                }
                Verdict::Found => {
                    step.failed("the input is in fuzz/artifacts");
                    self.report.add(&name, Status::Failed(String::new()));
                }
            }
        }
        Ok(())
    }
}
