//! `blanket doctor`.

use std::process::ExitCode;

use anyhow::Result;
use blanket_drivers::probe::{self, Level, Outcome, Report};

use super::{print, print_json};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn doctor(args: &Args) -> Result<ExitCode> {
    let report = probe::report();
    if args.json {
        print_json(&report)?;
    } else {
        print(&render(&report))?;
    }
    if let Some(obstacle) = &report.obstacle {
        eprintln!("blanket: no guest can run here: {obstacle}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn render(report: &Report) -> String {
    let mut text = String::new();
    let width = report.checks.iter().map(|check| check.name.len()).max();
    let width = width.unwrap_or(0);
    let mut area = "";
    for check in &report.checks {
        if check.area != area {
            area = check.area;
            text.push_str(&format!("{area}\n"));
        }
        text.push_str(&render_check(check, width));
    }
    let count = |level| {
        report
            .checks
            .iter()
            .filter(|c| c.finding.level == level)
            .count()
    };
    text.push_str(&format!(
        "\n{} ok, {} limited, {} missing\n",
        count(Level::Ok),
        count(Level::Limited),
        count(Level::Missing)
    ));
    text
}

fn render_check(check: &Outcome, width: usize) -> String {
    let finding = &check.finding;
    let mut text = format!(
        "  {:<7}  {:<width$}  {}\n",
        finding.level.to_string(),
        check.name,
        finding.found
    );
    let indent = " ".repeat(13 + width);
    if let Some(cost) = &finding.cost {
        text.push_str(&format!("{indent}costs: {cost}\n"));
    }
    if let Some(remedy) = &finding.remedy {
        text.push_str(&format!("{indent}get it: {remedy}\n"));
    }
    text
}
