//! `blanket ps`.

use std::process::ExitCode;

use anyhow::Result;
use hyper::Method;
use serde_json::{Value, json};

use super::{print, print_json};
use crate::daemon::local::{self, NodeVms};
use crate::home::Home;
use crate::table;
use crate::vm::{Summary, summaries};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also list VMs that are stopped or failed, and why.
    #[arg(short = 'a')]
    ended: bool,
    /// List all VMs of all nodes, also those that are stopped or failed.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn ps(home: &Home, args: &Args) -> Result<ExitCode> {
    // A machine on which no blanketd has ever run has no other nodes.
    if args.all && home.node().exists() {
        return everywhere(home, args.json);
    }
    let all = args.ended || args.all;
    let summaries = summaries(home, all)?;
    if args.json {
        print_json(&summaries)?;
    } else {
        print(&table::render(&rows(&summaries, all)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The VMs of all nodes. The status is 1 if a node is missing.
fn everywhere(home: &Home, json: bool) -> Result<ExitCode> {
    let nodes: Vec<NodeVms> = local::ask(home, Method::GET, "/cluster/vms", None::<&()>)?;
    if json {
        let mut all = Vec::new();
        for node in &nodes {
            for vm in node.vms.iter().flatten() {
                let mut vm = serde_json::to_value(vm)?;
                vm["node"] = json!(node.node);
                all.push(vm);
            }
        }
        print_json(&Value::Array(all))?;
    } else {
        let mut table = vec![head("NODE", true)];
        for node in &nodes {
            let rows = rows(node.vms.as_deref().unwrap_or_default(), true);
            table.extend(rows.into_iter().skip(1).map(|mut row| {
                row.insert(0, node.node.to_string());
                row
            }));
        }
        print(&table::render(&table))?;
    }
    let mut code = ExitCode::SUCCESS;
    for node in &nodes {
        if let Some(reason) = &node.reason {
            eprintln!(
                "blanket: the VMs of node {} are not known: {reason}",
                node.node
            );
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// The table's head, with something before the name.
fn head(first: &str, all: bool) -> Vec<String> {
    let names = [
        "NAME", "STATE", "MACHINE", "CPUS", "MEMORY", "UPTIME", "PID",
    ];
    let first = (!first.is_empty()).then_some(first);
    let last = all.then_some("REASON");
    let all = first.into_iter().chain(names).chain(last);
    all.map(String::from).collect()
}

fn rows(summaries: &[Summary], all: bool) -> Vec<Vec<String>> {
    fn cell<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
        value.map_or_else(|| "-".to_owned(), text)
    }
    let mut rows = vec![head("", all)];
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
    rows
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
        let lines = |all| table::render(&rows(std::slice::from_ref(&failed), all));
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
