//! `blanket provider`.

use std::fmt::Display;
use std::process::ExitCode;

use anyhow::Result;
use blanket_drivers::provider::{Asking, Machine, MetadataState, Notice, Report, report};

use super::{print, print_json};
use crate::table;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON, with all that the machine shows.
    #[arg(long)]
    json: bool,
    /// Do not ask the provider's metadata service.
    #[arg(long)]
    no_metadata: bool,
}

pub(crate) fn provider(args: &Args) -> Result<ExitCode> {
    let asking = (!args.no_metadata).then(Asking::default);
    let report = report(&Machine::this(), asking.as_ref());
    if args.json {
        print_json(&report)?;
    } else {
        print(&table::render(&rows(&report)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(report: &Report) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |key: &str, value: String| rows.push(vec![format!("{key}:"), value]);
    row("provider", describe(report));
    row("platform", report.platform.to_owned());
    let known = report.provider != "unknown";
    let (key, facts) = if known {
        ("told by", &report.evidence)
    } else {
        ("found", &report.facts)
    };
    for fact in facts {
        row(key, fact.to_string());
    }
    for doubt in &report.doubts {
        row("doubt", doubt.clone());
    }
    let instance = &report.instance;
    for (key, value) in [
        ("instance", &instance.id),
        ("type", &instance.kind),
        ("name", &instance.name),
        ("region", &instance.region),
        ("zone", &instance.zone),
    ] {
        if let Some(value) = value {
            row(key, value.clone());
        }
    }
    if let Some(spot) = instance.spot {
        row("spot", if spot { "yes" } else { "no" }.to_owned());
    }
    if let Some(mtu) = instance.mtu {
        row("mtu", mtu.to_string());
    }
    for (key, addresses) in [
        ("addresses", &instance.addresses),
        ("public", &instance.public_addresses),
    ] {
        if !addresses.is_empty() {
            row(key, joined(addresses));
        }
    }
    for notice in &report.notices {
        row("notice", describe_notice(notice));
    }
    row("metadata", describe_metadata(report));
    for problem in &report.metadata.problems {
        row("problem", problem.clone());
    }
    if let Some(remedy) = &report.metadata.remedy {
        row("remedy", remedy.clone());
    }
    rows
}

fn describe(report: &Report) -> String {
    if report.provider == report.title {
        report.provider.to_owned()
    } else {
        format!("{} ({})", report.provider, report.title)
    }
}

fn describe_metadata(report: &Report) -> String {
    let text = match report.metadata.state {
        MetadataState::Answered => "answered",
        MetadataState::Unusable => "something answers, but not as the provider's service does",
        MetadataState::Unanswered => "nothing answers",
        MetadataState::NotAsked => "not asked",
    };
    text.to_owned()
}

pub(crate) fn describe_notice(notice: &Notice) -> String {
    let mut text = notice.action.clone();
    if let Some(at) = notice.at {
        text.push_str(&format!(" not before {at}"));
    }
    for part in [&notice.description, &notice.id].into_iter().flatten() {
        text.push_str(&format!(", {part}"));
    }
    text
}

fn joined(values: &[impl Display]) -> String {
    let values: Vec<_> = values.iter().map(ToString::to_string).collect();
    values.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use blanket_drivers::provider::{Instance, Metadata, NoticeKind};

    fn example() -> Report {
        Report {
            provider: "gce",
            title: "Google Compute Engine",
            platform: "kvm",
            evidence: Vec::new(),
            doubts: vec!["two names".into()],
            instance: Instance {
                kind: Some("n2-standard-4".into()),
                mtu: Some(1460),
                addresses: vec!["10.128.0.2".parse().unwrap(), "fe80::1".parse().unwrap()],
                ..Instance::default()
            },
            notices: vec![Notice {
                kind: NoticeKind::Maintenance,
                action: "migrate".into(),
                at: None,
                id: Some("e1".into()),
                description: None,
            }],
            metadata: Metadata {
                state: MetadataState::Answered,
                problems: Vec::new(),
                remedy: None,
            },
            facts: Vec::new(),
            took_ms: 7,
        }
    }

    #[test]
    fn what_is_not_known_has_no_line() {
        assert_eq!(
            table::render(&rows(&example())),
            "provider:   gce (Google Compute Engine)\n\
             platform:   kvm\n\
             doubt:      two names\n\
             type:       n2-standard-4\n\
             mtu:        1460\n\
             addresses:  10.128.0.2, fe80::1\n\
             notice:     migrate, e1\n\
             metadata:   answered\n"
        );
    }

    #[test]
    fn an_unknown_providers_machine_shows_all_that_was_found() {
        let mut report = report(&Machine::this(), None);
        (report.provider, report.title) = ("unknown", "unknown");
        let rows = rows(&report);
        assert_eq!(rows[0], ["provider:", "unknown"]);
        let found = rows.iter().filter(|row| row[0] == "found:").count();
        assert_eq!(found, report.facts.len());
        assert!(found > 0);
    }
}
