//! The overlay between two nodes, in network namespaces with a cable between
//! them, against the kernel's VXLAN and bridge on the same cable in the same
//! run.
//!
//! The cable has an MTU of 1500 and no offloads, as a network card without
//! them: what is large is cut up by the kernel before it.
//!
//! Beside them: a process that only carries frames between the TAPs as they
//! are, which is the least that an overlay in a process can cost; the tenants
//! joined by nothing but a cable, which is what they themselves cost; others'
//! encrypted overlays ([`peers`]); guests' ports ([`guests`]); guests of one node
//! ([`local`]); and what more of everything costs ([`scale`]).

mod guests;
mod local;
mod peers;
mod scale;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blanket_system_tests::native_with;
use blanket_testbed::{Host, ensure_packages};
use serde_json::Value;

use super::row::{Row, median};
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
# The tenants alone.
ip link add name b netns t1 type veth peer name b netns t2
for i in 1 2; do
  ip -n t$i addr add 10.6.0.$i/24 dev b
  ip -n t$i link set dev b mtu 1450 up
done
"#;

/// The overlay between the same tenants (`10.2.0.x`).
const OVERLAY: &str = r#"set -e
for i in 1 2; do
  mkdir -p /run/h$i
  ip netns exec n$i blanket-switch --socket /run/h$i/blanket-switch.sock --state /run/h$i/switch \
    --listen 192.0.2.$i:4790 --interface u$i >/run/switch$i.log 2>&1 &
  echo $! > /run/switch$i.pid
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

/// The least between the same tenants (`10.3.0.x`).
const LEAST: &str = r#"set -e
for i in 1 2; do
  ip netns exec n$i least l$i u$i 192.0.2.$i:4791 192.0.2.$((3 - i)):4791 >/run/least$i.log 2>&1 &
  echo $! >> /run/others
done
for i in 1 2; do
  timeout 10 sh -c "until ip -n n$i link show l$i; do sleep 0.1; done" >/dev/null 2>&1
  ip -n n$i link set dev l$i netns t$i
  ip -n t$i addr add 10.3.0.$i/24 dev l$i
  ip -n t$i link set dev l$i mtu 1450 up
done
timeout 10 sh -c "until ip netns exec t1 ping -c 1 -W 1 10.3.0.2; do sleep 0.2; done" >/dev/null
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

/// A TCP stream between the tenants' addresses in `10.NUMBER.0.0`.
fn stream(host: &Host, number: u32, figures: &mut Figures) -> Result<()> {
    let before = busy()?;
    let tcp = report(host, &format!("-c 10.{number}.0.2 -t {SECONDS}"))?;
    let used = busy()? - before;
    let sum = &tcp["end"]["sum_received"];
    let mut add = |name, value| figures.entry(name).or_default().push(value);
    add("gbps", field(sum, "bits_per_second")? / 1e9);
    add("cpu", used / (field(sum, "bytes")? / 1e9));
    Ok(())
}

/// All of it between these addresses.
fn measure(host: &Host, number: u32, figures: &mut Figures) -> Result<()> {
    stream(host, number, figures)?;
    let to = format!("10.{number}.0.2");
    let mut add = |name, value| figures.entry(name).or_default().push(value);
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
    let packages = [
        "dpdk-dev",
        "ethtool",
        "iperf3",
        "iproute2",
        "iputils-ping",
        "wireguard-tools",
    ];
    ensure_packages(&packages)?;
    ensure_packages(&local::PACKAGES)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let least = build::example(workspace, progress, "blanket-overlay", "least")?;
    let scale = build::example(workspace, progress, "blanket-overlay", "scale")?;
    let others = peers::install(workspace, progress)?;
    let step = progress.step("two nodes and two tenants");
    let programs = workspace.programs(build::RELEASE);
    let folder = tempfile::tempdir()?;
    let large = folder.path().join("large.pcap");
    std::fs::write(&large, guests::large_frame())?;
    let mut builder = native_with("bench", &programs)?
        .inject(programs.join("blanket-switch"), "/usr/bin/blanket-switch")
        .inject(least, "/usr/bin/least")
        .inject(large, "/payload/large.pcap");
    for (program, name) in others {
        builder = builder.inject(program, format!("/usr/bin/{name}"));
    }
    let host = local::inject(builder)?.open()?;
    host.sh(NETWORKS).text()?;
    for script in [OVERLAY, LEAST, peers::NETWORKS] {
        host.sh(script).timeout(Duration::from_secs(60)).text()?;
    }
    host.sh("ip netns exec t2 iperf3 -s -D").text()?;
    step.done("");
    let mut all: [Figures; 4] = Default::default();
    let mut others: [Figures; 2] = Default::default();
    for number in 1..=RUNS {
        let step = progress.step(&format!("tenants, run {number} of {RUNS}"));
        for (network, figures) in [1, 2, 3, 6].into_iter().zip(&mut all) {
            measure(&host, network, figures)?;
        }
        for (network, figures) in [4, 5].into_iter().zip(&mut others) {
            stream(&host, network, figures)?;
        }
        step.done("");
    }
    // They are in nobody's way any more.
    host.sh("kill $(cat /run/others)").text()?;
    guests::attach(&host)?;
    let mut ports = Figures::new();
    for number in 1..=RUNS {
        let step = progress.step(&format!("guests, run {number} of {RUNS}"));
        guests::measure(&host, &mut ports)?;
        step.done("");
    }
    let step = progress.step("a switch with nothing to do");
    let idle = guests::idle(&host)?;
    step.done("");
    // These poll, and would be in the others' way.
    host.sh("kill $(cat /run/switch1.pid /run/switch2.pid /run/idle.pid)")
        .text()?;
    let [ours, open_vswitch] = local::measure(&host, progress)?;
    let step = progress.step("many addresses, ports and nodes");
    let many = scale::measure(&step, &scale)?;
    step.done("");
    let mut rows = rows(&all, &others, &ports, &idle);
    for (name, metric, unit) in local::names() {
        let figures = |of: &Figures| of.get(name).cloned().unwrap_or_default();
        let row = Row::new(&metric, unit, &figures(&ours));
        rows.extend(row.map(|row| row.against("OVS-DPDK", &figures(&open_vswitch))));
    }
    rows.extend(many);
    Ok(rows)
}

/// What is shown: kernel, ours, the least, and the tenants alone; boringtun and
/// vpncloud; guests' ports; a switch that is idle.
fn rows(all: &[Figures; 4], others: &[Figures; 2], ports: &Figures, idle: &[f64]) -> Vec<Row> {
    let [kernel, ours, least, alone] = all;
    let [boringtun, vpncloud] = others;
    let tap = "encrypted, TAP to TAP";
    let mut rows = Vec::new();
    let mut add = |metric: String, unit, figures: &Figures, name, peer: &str, its: &Figures| {
        let row = figures
            .get(name)
            .and_then(|runs| Row::new(&metric, unit, runs));
        let its = its.get(name).map_or(&[][..], Vec::as_slice);
        rows.extend(row.map(|row| row.against(peer, its)));
    };
    for (name, what, unit) in [
        ("cpu", "processor time", "s/GB"),
        ("gbps", "one TCP stream", "Gb/s"),
        ("rtt", "round trip", "us"),
        ("packet", "processor time of a frame of 64 bytes", "us"),
        ("kpps", "frames of 64 bytes", "k/s"),
    ] {
        let vxlan = "kernel VXLAN";
        add(format!("{tap}: {what}"), unit, ours, name, vxlan, kernel);
        add(
            format!("the least: {what}"),
            unit,
            least,
            name,
            vxlan,
            kernel,
        );
        let metric = format!("tenants alone: {what}");
        add(metric, unit, alone, name, vxlan, kernel);
    }
    for (peer, its) in [("boringtun", boringtun), ("vpncloud", vpncloud)] {
        let metric = format!("{tap}: processor time");
        add(metric, "s/GB", ours, "cpu", peer, its);
    }
    // What the guests cost is in none of the two.
    let mut nodes = Figures::new();
    for name in ["cpu", "packet"] {
        let middle = |figures: &Figures| figures.get(name).and_then(|runs| median(runs));
        if let Some((both, tenants)) = middle(kernel).zip(middle(alone)) {
            nodes.insert(name, vec![both - tenants]);
        }
    }
    let peer = "kernel VXLAN without its tenants";
    let guest = "encrypted, vhost-user to vhost-user";
    for (name, what, unit) in [
        ("cpu", "processor time", "s/GB"),
        ("packet", "processor time of a frame of 64 bytes", "us"),
        ("kpps", "frames of 64 bytes", "k/s"),
    ] {
        add(format!("{guest}: {what}"), unit, ports, name, peer, &nodes);
    }
    rows.extend(Row::new("a switch with 100 idle ports", "%", idle));
    rows
}
