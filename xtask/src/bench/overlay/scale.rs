//! Many stations, ports and nodes: what a frame and a station cost a switch as
//! there are more of them, and how long it takes until all nodes know of a
//! station that has moved. The nodes are simulated, in one process
//! (`overlay-net/examples/scale`).

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::super::row::Row;
use super::RUNS;
use crate::progress::Step;
use crate::run::{Output, checked};

/// Stations, ports, nodes.
const SIZES: [[u32; 3]; 3] = [
    [1000, 100, 10],
    [10_000, 1000, 100],
    [100_000, 10_000, 1000],
];

/// The one that is aimed at.
const FULL: usize = 1;

fn one(step: &Step, program: &Path, size: [u32; 3], flags: &[&str]) -> Result<Value> {
    let mut command = Command::new(program);
    command.args(size.map(|number| number.to_string()));
    let said = checked(step, command.args(flags), Output::IfItFails)?;
    serde_json::from_str(&said).context("the report of what many stations cost")
}

fn figures(
    step: &Step,
    program: &Path,
    size: [u32; 3],
    flags: &[&str],
    names: [&str; 2],
) -> Result<[Vec<f64>; 2]> {
    let mut all = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        let report = one(step, program, size, flags)?;
        for (runs, name) in all.iter_mut().zip(names) {
            let figure = report[name].as_f64();
            runs.push(figure.with_context(|| format!("no {name}: {report}"))?);
        }
    }
    Ok(all)
}

fn thousands(number: u32) -> String {
    match number / 1000 {
        0 => number.to_string(),
        thousands => format!("{thousands},{:03}", number % 1000),
    }
}

/// Each size beside the one before it: a ratio of 1 says that a frame, or a
/// station, costs what it did.
///
/// # Errors
/// A frame goes the wrong way, or nothing can be started.
pub(super) fn measure(step: &Step, program: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut before: Option<(String, [Vec<f64>; 2])> = None;
    for size in SIZES {
        let [stations, ports, nodes] = size.map(thousands);
        let all = figures(step, program, size, &[], ["frame_ns", "station_bytes"])?;
        let name = format!("{stations} addresses, {ports} ports, {nodes} nodes");
        for (at, (what, unit)) in [("a frame's way", "ns"), ("memory of an address", "bytes")]
            .into_iter()
            .enumerate()
        {
            let row = Row::new(&format!("{name}: {what}"), unit, &all[at]);
            rows.extend(row.map(|row| match &before {
                Some((peer, its)) => row.against(peer, &its[at]),
                None => row,
            }));
        }
        before = Some((name, all));
    }
    let names = ["rounds", "all_ms"];
    let [rounds, times] = figures(step, program, SIZES[FULL], &["--moves"], names)?;
    let moved = "an address that moved is known to 100 nodes";
    rows.extend(Row::new(&format!("{moved}: rounds"), "", &rounds));
    let metric = format!("{moved}: their processor time, one after the other");
    rows.extend(Row::new(&metric, "ms", &times));
    Ok(rows)
}
