//! What each kind of uplink carries between two network namespaces, against
//! iperf3's UDP on the same kind of cable in the same run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::row::Row;
use crate::build;
use crate::progress::{Progress, Step};
use crate::run::{Output, checked};
use crate::workspace::Workspace;

/// Runs of everything; the rows have their medians.
const RUNS: usize = 5;
/// Bytes of a datagram that fills an MTU of 1500, and of a small one, as the
/// self-test's.
const FULL: u32 = 1472;
const SMALL: u32 = 96;

/// A network namespace, as long as a process sleeps in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Result<Self> {
        let child = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .context("running unshare")?;
        let namespace = Self(child);
        let own = fs::read_link("/proc/self/ns/net")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read_link(format!("/proc/{}/ns/net", namespace.0.id()))? == own {
            ensure!(
                Instant::now() < deadline,
                "unshare made no namespace: run as root"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(namespace)
    }

    /// A program in it.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.0.id().to_string(), "--"]);
        command.arg(program);
        command
    }

    fn ip(&self, step: &Step, arguments: &str) -> Result<()> {
        let mut command = self.command("ip");
        command.args(arguments.split_whitespace());
        checked(step, &mut command, Output::IfItFails).map(drop)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// iperf3's server, until it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Figures of several runs, by name.
type Runs = BTreeMap<String, Vec<f64>>;

/// Measures all of it.
///
/// # Errors
/// There are no network namespaces here, iperf3 is missing, or an uplink that
/// opens carries nothing.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let blanket = workspace.programs(build::RELEASE).join("blanket");
    let step = progress.step("two namespaces and a cable");
    let (near, far) = (Namespace::new()?, Namespace::new()?);
    let peer = far.0.id();
    near.ip(
        &step,
        &format!("link add v0 type veth peer name v1 netns {peer}"),
    )?;
    for (namespace, name, address) in [(&near, "v0", "10.7.0.1"), (&far, "v1", "10.7.0.2")] {
        namespace.ip(&step, "link set lo up")?;
        namespace.ip(&step, &format!("addr add {address}/24 dev {name}"))?;
        namespace.ip(&step, &format!("link set {name} up"))?;
    }
    let server = far
        .command("iperf3")
        .arg("-s")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let _server = Server(server.context("running iperf3")?);
    step.done("");
    let mut runs = Runs::new();
    for number in 1..=RUNS {
        let step = progress.step(&format!("uplinks and iperf3, run {number} of {RUNS}"));
        let folder = workspace.target().join("bench").join("uplink-state");
        self_test(&near, &step, &blanket, &folder, &mut runs)?;
        iperf(&near, FULL, &mut runs)?;
        iperf(&near, SMALL, &mut runs)?;
        step.done("");
    }
    Ok(rows(&runs))
}

/// One self-test of all kinds.
fn self_test(
    near: &Namespace,
    step: &Step,
    blanket: &Path,
    folder: &Path,
    runs: &mut Runs,
) -> Result<()> {
    let mut command = near.command(blanket);
    command.arg("--home").arg(folder);
    command.args(["uplink", "--interface", "v0", "--retest", "--json"]);
    let text = checked(step, &mut command, Output::IfItFails)?;
    let report: Value = serde_json::from_str(&text)?;
    let kinds = report[0]["kinds"].as_array().context("no kinds")?;
    for kind in kinds {
        let name = kind["kind"].as_str().context("no kind")?;
        let Some(figures) = kind["figures"].as_object() else {
            step.note(&format!("{name}: {}\n", kind["obstacle"]));
            continue;
        };
        for (figure, value) in figures {
            let value = value.as_f64().context("no figure")?;
            runs.entry(format!("{name} {figure}"))
                .or_default()
                .push(value);
        }
    }
    Ok(())
}

/// One second of iperf3 with datagrams of `len` bytes, as fast as it goes.
fn iperf(near: &Namespace, len: u32, runs: &mut Runs) -> Result<()> {
    let arguments = format!("-u -b 0 -l {len} -t 1 -J -c 10.7.0.2");
    let deadline = Instant::now() + Duration::from_secs(30);
    let report: Value = loop {
        let mut command = near.command("iperf3");
        command.args(arguments.split_whitespace());
        let output = command.output().context("running iperf3")?;
        let report: Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
        match report["error"].as_str() {
            None => break report,
            // The server has not started, or not ended the run before.
            Some(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
            Some(error) => bail!("iperf3: {error}"),
        }
    };
    let sum = &report["end"]["sum"];
    let field = |name: &str| {
        sum[name]
            .as_f64()
            .with_context(|| format!("iperf3: no {name}"))
    };
    let got = field("packets")? - field("lost_packets")?;
    let seconds = field("seconds")?;
    let cpu = &report["end"]["cpu_utilization_percent"];
    let cpu =
        cpu["host_total"].as_f64().unwrap_or(0.0) + cpu["remote_total"].as_f64().unwrap_or(0.0);
    let bytes = got * f64::from(len);
    let mut add = |name: &str, value| {
        runs.entry(format!("iperf3 {name}"))
            .or_default()
            .push(value);
    };
    if len == FULL {
        add("bulk_gbps", bytes * 8.0 / seconds / 1e9);
        add("cpu_s_per_gb", cpu / 100.0 * seconds / (bytes / 1e9));
    } else {
        add("small_kpps", got / seconds / 1e3);
    }
    Ok(())
}

fn rows(runs: &Runs) -> Vec<Row> {
    let mut rows = Vec::new();
    for kind in ["udp", "af_xdp", "af_packet"] {
        for (figure, metric, unit) in [
            ("bulk_gbps", "datagrams of 1472 bytes", "Gb/s"),
            ("cpu_s_per_gb", "processor time for them", "s/GB"),
            ("small_kpps", "datagrams of 96 bytes", "k/s"),
            ("round_trip_us", "round trip", "us"),
        ] {
            let of = |who: &str| runs.get(&format!("{who} {figure}"));
            let Some(ours) = of(kind) else { continue };
            let row = Row::new(&format!("{kind}: {metric}"), unit, ours);
            rows.extend(row.map(|row| match of("iperf3") {
                Some(peer) => row.against("iperf3 -u", peer),
                None => row,
            }));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_that_ran_has_its_rows_and_iperf_beside_them() {
        let mut runs = Runs::new();
        for (name, value) in [
            ("udp bulk_gbps", 30.0),
            ("udp round_trip_us", 11.0),
            ("iperf3 bulk_gbps", 3.0),
        ] {
            runs.insert(name.to_owned(), vec![value; 3]);
        }
        let rows = rows(&runs);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].ratio, Some(10.0));
        assert_eq!(rows[0].peer_name.as_deref(), Some("iperf3 -u"));
        assert_eq!((rows[1].unit.as_str(), rows[1].peer), ("us", None));
    }
}
