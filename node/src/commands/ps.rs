//! `blanket ps`.

use std::process::ExitCode;

use anyhow::Result;

use super::{print, print_json};
use crate::home::Home;
use crate::table;
use crate::vm::{Status, Summary};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also list VMs that are stopped or failed, and why.
    #[arg(long, short)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn ps(home: &Home, args: &Args) -> Result<ExitCode> {
    let mut summaries = Vec::new();
    for vm in home.vms()? {
        let status = match vm.status() {
            Ok(status) => status,
            // It was removed while the list was made.
            Err(_) if home.existing(&vm.name).is_err() => continue,
            Err(error) => return Err(error),
        };
        if args.all || !matches!(status, Status::Ended(_)) {
            summaries.push(Summary::of(&vm, &status));
        }
    }
    if args.json {
        print_json(&summaries)?;
    } else {
        print(&table(&summaries, args.all))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(summaries: &[Summary], all: bool) -> String {
    fn cell<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
        value.map_or_else(|| "-".to_owned(), text)
    }
    let mut head = vec![
        "NAME", "STATE", "MACHINE", "CPUS", "MEMORY", "UPTIME", "PID",
    ];
    if all {
        head.push("REASON");
    }
    let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
    rows.extend(summaries.iter().map(|vm| {
        let mut row = vec![
            vm.name.clone(),
            vm.state.clone(),
            vm.describe_machine(),
            cell(vm.cpus, |n| n.to_string()),
            cell(vm.memory_bytes, table::bytes),
            cell(vm.uptime_ms, table::duration),
            cell(vm.pid, |pid| pid.to_string()),
        ];
        if all {
            row.push(vm.reason.clone().unwrap_or_default());
        }
        row
    }));
    table::render(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_figures_are_dashes_and_reasons_come_with_all() {
        let failed = Summary {
            name: "web".into(),
            state: "failed".into(),
            machine: Some("pv".into()),
            trust_guest_user: false,
            cpus: Some(2),
            memory_bytes: Some(512 << 20),
            uptime_ms: None,
            pid: None,
            reason: Some("no kernel".into()),
        };
        let lines = |all| table(std::slice::from_ref(&failed), all);
        assert_eq!(
            lines(true),
            "NAME  STATE   MACHINE  CPUS  MEMORY   UPTIME  PID  REASON\n\
             web   failed  pv       2     512 MiB  -       -    no kernel\n"
        );
        assert!(!lines(false).contains("no kernel"));
        let trusting = Summary {
            trust_guest_user: true,
            ..failed
        };
        assert_eq!(trusting.describe_machine(), "pv, trusts its users");
    }
}
