//! `blanket doctor`.

use std::process::ExitCode;

use anyhow::Result;
use blanket_drivers::grant::xen::selftest::{self, Invitation, Offer, Report as Shared};
use blanket_drivers::probe::{self, Level, Outcome, Report};

use super::{print, print_json};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Where Xen is the provider: shares pages and events with another of your
    /// domains, by its number, and waits for its `--accept`.
    #[arg(long, value_name = "DOMAIN")]
    offer: Option<u16>,
    /// Tests what another domain shares with this one, as its `--offer` says.
    #[arg(long, value_name = "INVITATION", conflicts_with = "offer")]
    accept: Option<Invitation>,
}

pub(crate) fn doctor(args: &Args) -> Result<ExitCode> {
    if let Some(domain) = args.offer {
        let offer = Offer::new(domain)?;
        println!(
            "in domain {domain}: blanket doctor --accept {}",
            offer.invitation()
        );
        offer.serve()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(invitation) = &args.accept {
        let report = selftest::accept(invitation)?;
        if args.json {
            print_json(&report)?;
        } else {
            let Shared { map_ns, kept_ns } = report;
            print(&format!(
                "pages and events are shared; to map, use and unmap a page takes {map_ns} ns, \
                 to use one that is kept {kept_ns} ns\n"
            ))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
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
