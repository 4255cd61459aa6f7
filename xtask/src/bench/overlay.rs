//! The overlay between two nodes, in network namespaces with a cable between
//! them, against the kernel's VXLAN and bridge on the same cable in the same
//! run.
//!
//! The cable has an MTU of 1500 and no offloads, as a network card without
//! them: what is large is cut up by the kernel before it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blanket_system_tests::native_with;
use blanket_testbed::{Host, ensure_packages};
use serde_json::Value;

use super::row::Row;
use crate::build;
use crate::progress::Progress;
use crate::workspace::Workspace;

/// Runs of everything; the rows have their medians.
const RUNS: usize = 5;

/// Seconds of a TCP stream.
const SECONDS: u32 = 3;

/// Two nodes (`n1`, `n2`), two tenants (`t1`, `t2`), and the kernel's VXLAN and
/// bridge between them (`10.1.0.x`).
const NETWORKS: &str = r#"set -e
for n in n1 n2 t1 t2; do ip netns add $n; ip -n $n link set lo up; done
ip link add name u1 netns n1 type veth peer name u2 netns n2
for i in 1 2; do
  ip -n n$i addr add 192.0.2.$i/24 dev u$i
  ip netns exec n$i ethtool -K u$i tso off tx-udp-segmentation off gro on >/dev/null
  ip -n n$i link set dev u$i up
  ip -n n$i link add name vx type vxlan id 7 dstport 4788 local 192.0.2.$i remote 192.0.2.$((3 - i))
  ip -n n$i link add name br type bridge
  ip link add name k netns n$i type veth peer name k netns t$i
  ip -n n$i link set dev vx master br
  ip -n n$i link set dev k master br
  for l in vx br k; do ip -n n$i link set dev $l up; done
  ip -n t$i link set dev k mtu 1450
  ip -n t$i addr add 10.1.0.$i/24 dev k
  ip -n t$i link set dev k up
done
"#;

/// The overlay between the same tenants (`10.2.0.x`).
const OVERLAY: &str = r#"set -e
for i in 1 2; do
  mkdir -p /run/h$i
  ip netns exec n$i blanket-switch --socket /run/h$i/blanket-switch.sock --state /run/h$i/switch \
    --listen 192.0.2.$i:4790 --interface u$i >/run/switch$i.log 2>&1 &
done
key() { blanket --home /run/h$1 net info --json | sed -n 's/.*"key": "\(.*\)".*/\1/p'; }
for i in 1 2; do
  until blanket --home /run/h$i net info >/dev/null 2>&1; do sleep 0.1; done
done
for i in 1 2; do
  o=$((3 - i))
  blanket --home /run/h$i net peer add other --key "$(key $o)" --endpoint 192.0.2.$o:4790
  blanket --home /run/h$i net create blue
  ip netns exec n$i blanket --home /run/h$i net attach blue tenant --tap o$i
  ip -n n$i link set dev o$i netns t$i
  ip -n t$i addr add 10.2.0.$i/24 dev o$i
  ip -n t$i link set dev o$i up
done
until ip netns exec t1 ping -c 1 -W 1 10.2.0.2 >/dev/null; do sleep 0.2; done
"#;

/// What was measured of one system.
type Figures = BTreeMap<&'static str, Vec<f64>>;

/// Busy processor time of the whole machine, in seconds.
fn busy() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line
        .split_ascii_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    ensure!(ticks.len() >= 8, "/proc/stat: {line}");
    // All but idle, waiting for disks, and what other machines took.
    Ok((ticks.iter().take(7).sum::<f64>() - ticks[3] - ticks[4]) / 100.0)
}

fn report(host: &Host, arguments: &str) -> Result<Value> {
    let run = format!("ip netns exec t1 iperf3 -J {arguments}");
    let output = host.sh(run).timeout(Duration::from_secs(60)).text()?;
    serde_json::from_str(&output).context("iperf3's report")
}

fn field(value: &Value, name: &str) -> Result<f64> {
    value[name]
        .as_f64()
        .with_context(|| format!("iperf3: no {name}"))
}

/// One run between the tenants' addresses in `10.NUMBER.0.0`.
fn measure(host: &Host, number: u32, figures: &mut Figures) -> Result<()> {
    let to = format!("10.{number}.0.2");
    let mut add = |name, value| figures.entry(name).or_default().push(value);
    let before = busy()?;
    let tcp = report(host, &format!("-c {to} -t {SECONDS}"))?;
    let used = busy()? - before;
    let sum = &tcp["end"]["sum_received"];
    let bytes = field(sum, "bytes")?;
    add("gbps", field(sum, "bits_per_second")? / 1e9);
    add("cpu", used / (bytes / 1e9));
    let pings = host.sh(format!(
        "ip netns exec t1 ping -i 0.002 -c 500 {to} | sed -n 's/.*time=\\([0-9.]*\\) ms/\\1/p'"
    ));
    let mut times: Vec<f64> = pings
        .timeout(Duration::from_secs(60))
        .text()?
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    times.sort_by(f64::total_cmp);
    let middle = times.get(times.len() / 2).context("no answer to a ping")?;
    add("rtt", middle * 1000.0);
    // 22 bytes of payload are frames of 64 with their checksum.
    let before = busy()?;
    let udp = report(host, &format!("-c {to} -u -b 0 -l 22 -t 1"))?;
    let used = busy()? - before;
    let sum = &udp["end"]["sum"];
    let got = field(sum, "packets")? - field(sum, "lost_packets")?;
    add("packet", used / got * 1e6);
    add("kpps", got / field(sum, "seconds")? / 1e3);
    Ok(())
}

/// Measures all of it.
///
/// # Errors
/// There are no namespaces here, a program is missing, or nothing comes
/// through.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    ensure_packages(&["ethtool", "iperf3", "iproute2", "iputils-ping"])?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let step = progress.step("two nodes and two tenants");
    let programs = workspace.programs(build::RELEASE);
    let host = native_with("bench", &programs)?
        .inject(programs.join("blanket-switch"), "/usr/bin/blanket-switch")
        .open()?;
    host.sh(NETWORKS).text()?;
    host.sh(OVERLAY).timeout(Duration::from_secs(20)).text()?;
    host.sh("ip netns exec t2 iperf3 -s -D").text()?;
    step.done("");
    let (mut ours, mut theirs) = (Figures::new(), Figures::new());
    for number in 1..=RUNS {
        let step = progress.step(&format!("VXLAN and the overlay, run {number} of {RUNS}"));
        measure(&host, 1, &mut theirs)?;
        measure(&host, 2, &mut ours)?;
        step.done("");
    }
    let rows = [
        ("cpu", "encrypted, TAP to TAP: processor time", "s/GB"),
        ("gbps", "encrypted, TAP to TAP: one TCP stream", "Gb/s"),
        ("rtt", "encrypted, TAP to TAP: round trip", "us"),
        (
            "packet",
            "encrypted, TAP to TAP: processor time of a frame of 64 bytes",
            "us",
        ),
        ("kpps", "encrypted, TAP to TAP: frames of 64 bytes", "k/s"),
    ];
    let rows = rows.into_iter().filter_map(|(name, metric, unit)| {
        let row = Row::new(metric, unit, ours.get(name)?)?;
        Some(row.against("kernel VXLAN", theirs.get(name)?))
    });
    Ok(rows.collect())
}
