//! Snapshots and clones of a guest of 1 GiB that has used some of it, natively
//! in a `pv` machine: for how long it stands still, what is written, and how
//! long it takes until a guest goes on.

use anyhow::{Context, Result, bail};
use blanket_system_tests::{Vm, native_with};
use blanket_testbed::{Client, Host};
use serde_json::Value;

use super::floor::started;
use super::row::Row;
use crate::build;
use crate::progress::Progress;
use crate::setup;
use crate::workspace::Workspace;

/// Runs of everything; the rows have their medians.
const RUNS: usize = 5;
/// MiB that the guest fills with random bytes.
const FILLED: u32 = 40;

/// Measures all of it.
///
/// # Errors
/// There are no native guests on this machine, or one of them does not do
/// what is asked.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    if let Some(obstacle) = Host::obstacle() {
        bail!("no native guests: {obstacle}");
    }
    setup::run(progress)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let step = progress.step("a guest that has used some of its memory");
    let host = native_with("bench", &workspace.programs(build::RELEASE))?.open()?;
    let vm = Vm::pv(&host, "web", "", "--memory 1G")?;
    let guest = vm.guest()?;
    guest
        .sh(format!("dd if=/dev/urandom of=/run/x bs=1M count={FILLED}"))
        .text()?;
    step.done("");
    let rows = measured(&host, progress);
    host.sh("blanket rm --force web").text()?;
    let mut rows = rows?;
    rows.extend(small(&host, progress)?);
    // Beside nothing else, as the others.
    let least = (0..RUNS).map(|_| started(&workspace.payloads()));
    let least = least.map(|time| Ok(time?.as_secs_f64() * 1e3));
    let least = least.collect::<Result<Vec<f64>>>()?;
    let what = "the least: a new VM without devices until its guest goes on";
    rows.extend(Row::new(what, "ms", &least));
    Ok(rows)
}

/// Clones of a running guest that has little memory.
fn small(host: &Client, progress: &Progress) -> Result<Option<Row>> {
    let step = progress.step("clones of a small guest that runs");
    let vm = Vm::pv(host, "small", "", "--memory 128M")?;
    drop(vm.guest()?);
    let mut times = Vec::new();
    for round in 0..=RUNS {
        let clone = until_it_goes_on(host, "c", "blanket clone small --name c")?;
        // The first one warms up.
        if round > 0 {
            times.push(clone);
        }
    }
    host.sh("blanket rm --force small").text()?;
    step.done("");
    let what = "clone of a running guest of 128 MiB: exec until it goes on";
    Ok(Row::new(what, "ms", &times))
}

/// What `blanket snapshot web FLAGS` tells, and ms that it took.
fn snapshot(host: &Client, flags: &str) -> Result<(Value, f64)> {
    let start = std::time::Instant::now();
    let command = host.sh(format!("blanket snapshot web {flags} --json"));
    let told = command.text()?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    Ok((serde_json::from_str(&told)?, took))
}

/// Milliseconds from the monitor's exec until the guest goes on, of a VM that
/// `start` starts as `name`.
fn until_it_goes_on(host: &Client, name: &str, start: &str) -> Result<f64> {
    host.sh(start).text()?;
    let info = host.sh(format!("blanket info --json {name}")).text()?;
    let info: Value = serde_json::from_str(&info)?;
    host.sh(format!("blanket rm --force {name}")).text()?;
    let last = info["vm"]["boot"]
        .as_array()
        .and_then(|phases| phases.last());
    let at = last.and_then(|phase| phase["at_us"].as_u64());
    Ok(at.with_context(|| format!("no timeline: {info}"))? as f64 / 1e3)
}

fn measured(host: &Client, progress: &Progress) -> Result<Vec<Row>> {
    let (mut pause, mut bytes, mut time) = (vec![], vec![], vec![]);
    let (mut less, mut lazy, mut eager, mut clone) = (vec![], vec![], vec![], vec![]);
    for round in 0..=RUNS {
        let step = progress.step(&format!("snapshots, round {round} of {RUNS}"));
        let (told, took) = snapshot(host, "/run/web.snap")?;
        let (compressed, _) = snapshot(host, "/run/less.snap --compress")?;
        let restore = |flags: &str| {
            let start =
                format!("blanket restore /run/web.snap --name back --console stdio {flags}");
            until_it_goes_on(host, "back", &start)
        };
        let restored = [restore("")?, restore("--eager")?];
        let cloned = until_it_goes_on(host, "c", "blanket clone /run/web.snap --name c")?;
        let number = |told: &Value, field: &str| {
            let number = told[field].as_f64();
            number.with_context(|| format!("no {field}: {told}"))
        };
        // The first one warms up.
        if round > 0 {
            pause.push(number(&told, "pause_ms")?);
            bytes.push(number(&told, "bytes")? / f64::from(1 << 20));
            less.push(number(&compressed, "bytes")? / f64::from(1 << 20));
            time.push(took);
            lazy.push(restored[0]);
            eager.push(restored[1]);
            clone.push(cloned);
        }
        step.done(&format!("{:.1} ms, back after {:.1} ms", took, restored[0]));
    }
    let rows = [
        Row::new("snapshot: the guest stands still", "ms", &pause),
        Row::new("snapshot: on disk", "MiB", &bytes),
        Row::new("snapshot --compress: on disk", "MiB", &less),
        Row::new("snapshot: the whole command", "ms", &time),
        Row::new("restore: exec until the guest goes on", "ms", &lazy)
            .map(|row| row.against("--eager", &eager)),
        Row::new("clone: exec until the guest goes on", "ms", &clone),
    ];
    Ok(rows.into_iter().flatten().collect())
}
