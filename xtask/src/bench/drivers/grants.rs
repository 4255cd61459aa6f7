//! Persistent grants against a mapping for each request: of a `pv` guest's
//! devices, natively, and by way of a real Xen.

use std::path::Path;

use anyhow::{Context, Error, Result};
use blanket_system_tests::{Vm, native_with, xen_invitation, xen_pair};
use blanket_testbed::{Client, Host, workloads};
use serde_json::Value;

use super::RUNS;
use crate::bench::load::{self, Access, BATCHED_READS, LONG_READS, RANDOM_READS, RANDOM_WRITES};
use crate::bench::row::Row;
use crate::progress::Progress;

/// The peer of the rows with persistent grants.
const PER_REQUEST: &str = "per-request grants";

/// All rows; those of the `pv` machine only where guests run natively.
pub(super) fn rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let step = progress.step("persistent and per-request grants of pv guests");
    if let Some(obstacle) = Host::obstacle() {
        step.skipped(&obstacle);
    } else {
        rows.extend(native(programs)?);
        step.done("");
    }
    let step = progress.step("mappings by way of a real Xen");
    rows.extend(xen(programs)?);
    step.done("");
    Ok(rows)
}

/// Two guests that differ in one word, measured in turns.
fn native(programs: &Path) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?
        .inject(workloads()?, "/payload/workloads.ext4")
        .open()?;
    // In this machine's page cache: it is the rings that are measured.
    host.sh("dd if=/dev/urandom of=/tmp/disk bs=1M count=256 2>/dev/null; cp /tmp/disk /tmp/disk2")
        .text()?;
    let kept = Guest::start(&host, "kept", "/tmp/disk,persistent=on", "", "")?;
    let once = Guest::start(
        &host,
        "once",
        "/tmp/disk2,persistent=off",
        "blanket.ip=10.9.0.2/24",
        "--net tap,host_ip=10.9.0.1/24",
    )?;
    let mut rows = Vec::new();
    for access in [RANDOM_READS, BATCHED_READS, RANDOM_WRITES, LONG_READS] {
        rows.extend(disk(&kept, &once, &access)?);
    }
    rows.extend(network(&host, &once)?);
    for guest in [kept, once] {
        guest.vm.blanket("rm", "--force")?;
    }
    Ok(rows)
}

/// A guest with a disk for fio.
struct Guest<'a> {
    vm: Vm<'a>,
    client: Client,
}

impl<'a> Guest<'a> {
    fn start(host: &'a Client, name: &str, disk: &str, cmdline: &str, more: &str) -> Result<Self> {
        let flags = format!(
            "--memory 512M --on-reboot exit --disk path=/payload/workloads.ext4,readonly=on \
             --disk path={disk} {more}"
        );
        let vm = Vm::pv(host, name, cmdline, &flags)?;
        let client = vm.guest()?;
        load::prepare(&client)?;
        Ok(Self { vm, client })
    }

    /// What a run does to a device's counters and the guest's.
    fn measure(&self, device: &str, run: impl FnOnce() -> Result<f64>) -> Result<Run> {
        let before = self.vm.info()?["metrics"].clone();
        let figure = run()?;
        let after = self.vm.info()?["metrics"].clone();
        let more = |name: &str| -> Result<f64> {
            let count = |metrics: &Value| metrics["devices"][device][name].as_f64();
            let grown = count(&after).zip(count(&before));
            let (after, before) = grown.with_context(|| format!("{device} has no {name}"))?;
            Ok(after - before)
        };
        let units = match device {
            "net0" => more("rx_packets")? + more("tx_packets")?,
            _ => more("reads")? + more("writes")?,
        };
        let calls = |name| Ok::<_, Error>((total(&after, name)? - total(&before, name)?) / units);
        Ok(Run {
            figure,
            maps: more("grant_maps")? / units,
            hypercalls: calls("hypercalls")?,
            flushes: calls("mmuext")?,
        })
    }
}

/// A counter of all of a guest's vCPUs.
fn total(metrics: &Value, name: &str) -> Result<f64> {
    let vcpus = metrics["vcpus"].as_array().context("no vCPUs")?;
    let counts = vcpus.iter().map(|vcpu| vcpu[name].as_f64());
    let total = counts.sum::<Option<f64>>();
    total.with_context(|| format!("vCPUs have no {name}"))
}

/// One run's figure, and what a request or a packet has taken.
struct Run {
    figure: f64,
    maps: f64,
    hypercalls: f64,
    /// Of the hypercalls, those for page tables and TLBs.
    flushes: f64,
}

/// One figure of all runs.
fn figures(runs: &[Run], figure: impl Fn(&Run) -> f64) -> Vec<f64> {
    runs.iter().map(figure).collect()
}

/// The rows of a kind of access.
fn disk(kept: &Guest, once: &Guest, access: &Access) -> Result<Vec<Row>> {
    let run =
        |guest: &Guest| guest.measure("blk1", || load::fio(&guest.client, load::DISK, access));
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        ours.push(run(kept)?);
        peers.push(run(once)?);
    }
    let title = access.title;
    let row = |metric: &str, unit: &str, figure: fn(&Run) -> f64| {
        let row = Row::new(metric, unit, &figures(&ours, figure))?;
        Some(row.against(PER_REQUEST, &figures(&peers, figure)))
    };
    let rows = [
        row(&format!("{title}, persistent grants"), access.unit, |run| {
            run.figure
        }),
        row("mappings for each request", "", |run| run.maps),
        row("hypercalls of the guest for each", "", |run| run.hypercalls),
        row("TLB flushes and alike for each", "", |run| run.flushes),
    ];
    Ok(rows.into_iter().flatten().collect())
}

/// Linux's netfront has per-request grants only.
fn network(host: &Client, guest: &Guest) -> Result<Vec<Row>> {
    load::serve_iperf(&guest.client)?;
    let mut rows = Vec::new();
    for (direction, flag) in [("host to guest", ""), ("guest to host", "-R")] {
        let run = |_| guest.measure("net0", || load::iperf(host, "iperf3", "10.9.0.2", flag));
        let runs: Vec<Run> = (0..RUNS).map(run).collect::<Result<_>>()?;
        let title = format!("TCP {direction}, per-request grants");
        rows.extend(Row::new(&title, "Gb/s", &figures(&runs, |run| run.figure)));
        let maps = figures(&runs, |run| run.maps);
        rows.extend(Row::new("mappings for each packet", "", &maps));
        let calls = figures(&runs, |run| run.hypercalls);
        rows.extend(Row::new("hypercalls of the guest for each", "", &calls));
        let flushes = figures(&runs, |run| run.flushes);
        rows.extend(Row::new("TLB flushes and alike for each", "", &flushes));
    }
    Ok(rows)
}

/// A page of Xen's control domain, in a guest of that Xen.
fn xen(programs: &Path) -> Result<Vec<Row>> {
    let node = xen_pair("xen", programs).boot()?;
    let (mut kept, mut mapped) = (Vec::new(), Vec::new());
    for number in 0..RUNS {
        let invitation = xen_invitation(&node, number)?;
        let text = node
            .sh(format!("blanket doctor --json --accept {invitation}"))
            .text()?;
        let report: Value = serde_json::from_str(&text)?;
        for (figures, name) in [(&mut kept, "kept_ns"), (&mut mapped, "map_ns")] {
            let ns = report[name].as_f64();
            figures.push(ns.with_context(|| format!("blanket doctor says {text}"))?);
        }
    }
    let row = Row::new("use of a kept page of another domain", "ns", &kept);
    Ok(row
        .map(|row| row.against("map, use, unmap by gntdev", &mapped))
        .into_iter()
        .collect())
}
