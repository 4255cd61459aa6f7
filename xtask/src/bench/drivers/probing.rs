//! How long it takes to find out whose machine this is, and which volumes it has.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use super::RUNS;
use crate::bench::row::Row;
use crate::progress::Progress;
use crate::run::{Output, checked};

pub(super) fn rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("probing");
    let mut rows = Vec::new();
    for (metric, arguments) in [
        // Where no metadata service answers this is the longest it takes.
        ("probing the provider", &["provider", "--json"][..]),
        (
            "the same, without metadata",
            &["provider", "--json", "--no-metadata"],
        ),
        ("probing the volumes", &["store", "--json", "--no-test"]),
    ] {
        let run = |_| -> Result<f64> {
            let start = Instant::now();
            let mut command = Command::new(programs.join("blanket"));
            checked(&step, command.args(arguments), Output::IfItFails)?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        let runs: Vec<f64> = (0..RUNS).map(run).collect::<Result<_>>()?;
        rows.extend(Row::new(metric, "ms", &runs));
    }
    step.done("");
    Ok(rows)
}
