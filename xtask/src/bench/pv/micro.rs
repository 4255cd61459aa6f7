//! System calls, faults, processes and pipes: `guest-check bench`, in guests
//! and outside.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use blanket_system_tests::{Vm, native_with, provider_with};
use blanket_testbed::Client;
use serde_json::Value;

use super::RUNS;
use crate::bench::floor::Floors;
use crate::bench::row::Row;
use crate::progress::Progress;

/// The measurements' names there, and what they are called here.
const METRICS: [(&str, &str); 9] = [
    ("getppid", "getppid"),
    ("fresh_page_fault", "fault on a fresh page"),
    ("mmap_touch_munmap", "mmap, touch, munmap of one page"),
    ("mprotect_twice_and_touch", "mprotect twice, touch"),
    ("fork_exit_wait", "fork, exit, wait"),
    ("vfork_exec_wait", "vfork, exec, wait"),
    ("pipe_round_trip", "pipe round trip"),
    ("clock_gettime", "clock_gettime"),
    ("compute", "compute-bound code"),
];

/// The results of all runs in one place.
struct Runs(Vec<Value>);

impl Runs {
    /// In a guest.
    fn guest(guest: &Client, count: usize) -> Result<Self> {
        let run = |_| -> Result<Value> {
            Ok(serde_json::from_str(
                &guest.sh("guest-check bench").text()?,
            )?)
        };
        (0..count).map(run).collect::<Result<_>>().map(Self)
    }

    /// On this machine.
    fn here(check: &Path) -> Result<Self> {
        let run = |_| -> Result<Value> {
            let output = Command::new(check).arg("bench").output()?;
            ensure!(output.status.success(), "guest-check: {}", output.status);
            Ok(serde_json::from_slice(&output.stdout)?)
        };
        (0..RUNS).map(run).collect::<Result<_>>().map(Self)
    }

    /// The medians of one measurement's batches, in microseconds.
    fn of(&self, name: &str) -> Vec<f64> {
        let median = |run: &Value| run[name]["median"].as_f64();
        self.0
            .iter()
            .filter_map(median)
            .map(|ns| ns / 1000.0)
            .collect()
    }

    /// A row for each measurement, beside those of `peer`.
    fn rows(&self, place: &str, peer_name: &str, peer: &Self) -> Result<Vec<Row>> {
        METRICS
            .iter()
            .map(|(name, title)| {
                let row = Row::new(&format!("{title}, {place}"), "us", &self.of(name));
                let row = row.with_context(|| format!("no {name}"))?;
                Ok(row.against(peer_name, &peer.of(name)))
            })
            .collect()
    }
}

impl Runs {
    /// Rows beside the least that is possible: the floors of this KVM, and what
    /// Linux itself takes, as it does `here` outside of guests.
    fn above(&self, place: &str, floors: &Floors, here: &Self) -> Vec<Row> {
        let known = [
            ("getppid", floors.system_call),
            ("fresh_page_fault", floors.page_fault),
            ("mmap_touch_munmap", floors.one_page),
            ("fork_exit_wait", floors.fork),
            ("pipe_round_trip", floors.pipe),
        ];
        let row = |(name, floor): (&str, f64)| {
            let (_, title) = METRICS.iter().find(|(known, _)| *known == name)?;
            let row = Row::new(&format!("{title}, {place}"), "us", &self.of(name))?;
            let own = here.of(name);
            let least: Vec<_> = own.iter().map(|own| own + floor / 1000.0).collect();
            Some(row.against("floor of this KVM, and Linux's own time", &least))
        };
        known.into_iter().filter_map(row).collect()
    }
}

/// Natively: beside the same program outside of guests, and beside the least
/// that this KVM lets them cost.
pub(super) fn native_rows(
    programs: &Path,
    check: &Path,
    floors: &Floors,
    progress: &Progress,
) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?.open()?;
    let step = progress.step("system calls, faults and processes on this machine");
    let here = Runs::here(check)?;
    step.done("");
    let mut rows = Vec::new();
    for (place, flags) in [("isolated", ""), ("users trusted", "--trust-guest-user")] {
        let step = progress.step(&format!("the same in a pv guest, {place}"));
        let all = format!("--memory 512M --on-reboot exit {flags}");
        let vm = Vm::pv(&host, "micro", "", &all)?;
        let runs = Runs::guest(&vm.guest()?, RUNS)?;
        vm.blanket("rm", "--force")?;
        rows.extend(runs.rows(place, "this machine", &here)?);
        if flags.is_empty() {
            rows.extend(runs.above(place, floors, &here));
        }
        step.done("");
    }
    Ok(rows)
}

/// On a node with SVM: beside the same kernel in an `hvm` machine there.
pub(super) fn node_rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("a node boots");
    let node = provider_with("bench", programs)?.boot()?;
    step.done("");
    let step = progress.step("the same in an hvm guest there");
    let vm = Vm::linux(&node, "hvm", "", "--memory 512M --on-reboot exit")?;
    let hvm = Runs::guest(&vm.guest()?, RUNS)?;
    vm.blanket("rm", "--force")?;
    step.done("");
    let mut rows = Vec::new();
    for (place, flags) in [("isolated", ""), ("users trusted", "--trust-guest-user")] {
        let step = progress.step(&format!("the same in a pv guest there, {place}"));
        let flags = format!("--memory 512M --on-reboot exit {flags}");
        let vm = Vm::pv(&node, "pv", "", &flags)?;
        let runs = Runs::guest(&vm.guest()?, RUNS)?;
        vm.blanket("rm", "--force")?;
        let place = format!("{place}, on a node with SVM");
        rows.extend(runs.rows(&place, "hvm machine there", &hvm)?);
        step.done("");
    }
    Ok(rows)
}
