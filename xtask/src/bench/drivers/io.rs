//! Disk and network of a `pv` guest beside the same I/O on this machine: the
//! same fio on the same file, past the same caches, and the same iperf3 to a
//! network namespace behind the same kind of interface.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use blanket_system_tests::{Vm, native_with};
use blanket_testbed::{Client, workloads};
use serde_json::Value;

use super::RUNS;
use crate::bench::row::Row;
use crate::progress::Progress;

/// Seconds of each run.
const SECONDS: u32 = 2;
const LIMIT: Duration = Duration::from_secs(120);

/// What fio does: name, direction, block, depth, field of its report, unit,
/// and what a unit is of it.
const LOADS: [(&str, &str, &str, u32, &str, &str, f64); 4] = [
    (
        "sequential reads, 256 KiB, depth 8",
        "read",
        "256k",
        8,
        "bw_bytes",
        "MiB/s",
        1_048_576.0,
    ),
    (
        "sequential writes, 256 KiB, depth 8",
        "write",
        "256k",
        8,
        "bw_bytes",
        "MiB/s",
        1_048_576.0,
    ),
    (
        "random reads, 4 KiB, depth 32",
        "randread",
        "4k",
        32,
        "iops",
        "IOPS",
        1.0,
    ),
    (
        "random writes, 4 KiB, depth 32",
        "randwrite",
        "4k",
        32,
        "iops",
        "IOPS",
        1.0,
    ),
];

/// Where the tools are, on the node and in the guest.
const TOOLS: &str = "mount --bind /dev /mnt/dev; mount -t proc proc /mnt/proc; \
                     mount -t tmpfs tmpfs /mnt/tmp";

/// Figures of several runs, by name: ours and the node's.
type Runs = BTreeMap<&'static str, (Vec<f64>, Vec<f64>)>;

pub(super) fn rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?
        .inject(workloads()?, "/payload/workloads.ext4")
        .open()?;
    host.sh(format!(
        "mount -o ro,loop /payload/workloads.ext4 /mnt; {TOOLS}; \
         dd if=/dev/urandom of=/disk bs=1M count=512 2>/dev/null; \
         touch /mnt/tmp/disk; mount --bind /disk /mnt/tmp/disk"
    ))
    .timeout(LIMIT)
    .text()?;
    // Past this machine's page cache, as fio's own I/O on it.
    let flags = "--memory 512M --on-reboot exit --disk path=/payload/workloads.ext4,readonly=on \
                 --disk path=/disk,direct=on --net tap,host_ip=10.9.0.1/24";
    let vm = Vm::pv(&host, "io", "blanket.ip=10.9.0.2/24", flags)?;
    let guest = vm.guest()?;
    guest
        .sh(format!(
            "modprobe ext4; mount -o ro /dev/xvda /mnt; {TOOLS}"
        ))
        .text()?;
    // The node's own peer: another network namespace.
    host.sh(
        "ip netns add far; ip link add v0 type veth peer name v1 netns far; \
         ip addr add 10.8.0.1/24 dev v0; ip link set v0 up; \
         ip netns exec far sh -c 'ip addr add 10.8.0.2/24 dev v1; ip link set v1 up; iperf3 -s -D'",
    )
    .text()?;
    guest.sh("chroot /mnt iperf3 -s -D").text()?;
    let mut runs = Runs::new();
    for number in 1..=RUNS {
        let step = progress.step(&format!("guest and node, run {number} of {RUNS}"));
        disk(&host, &guest, &mut runs)?;
        network(&host, &mut runs)?;
        step.done("");
    }
    vm.blanket("rm", "--force")?;
    host.sh("pkill -x iperf3 || true; ip netns del far")
        .text()?;
    Ok(table(&runs))
}

/// The same in turns, on the node and in the guest. The guest's disk is locked
/// for its VM, which fio does not look at.
fn disk(host: &Client, guest: &Client, runs: &mut Runs) -> Result<()> {
    for (name, rw, block, depth, field, _, unit) in LOADS {
        let direction = if rw.contains("write") {
            "write"
        } else {
            "read"
        };
        let fio = |client: &Client, file: &str| -> Result<f64> {
            let command = format!(
                "chroot /mnt fio --name=x --filename={file} --rw={rw} --bs={block} \
                 --iodepth={depth} --ioengine=libaio --direct=1 --time_based --size=512m \
                 --runtime={SECONDS} --output-format=json"
            );
            let text = client.sh(command).timeout(LIMIT).text()?;
            let report: Value = serde_json::from_str(&text)?;
            let value = report["jobs"][0][direction][field].as_f64();
            Ok(value.with_context(|| format!("fio says {text}"))? / unit)
        };
        let (ours, node) = (fio(guest, "/dev/xvdb")?, fio(host, "/tmp/disk")?);
        add(runs, name, ours, node);
    }
    Ok(())
}

fn network(host: &Client, runs: &mut Runs) -> Result<()> {
    for (name, flag) in [("TCP to it", ""), ("TCP from it", "-R")] {
        let iperf = |address: &str| -> Result<f64> {
            let command = format!("iperf3 -J -t {SECONDS} -c {address} {flag}");
            let text = host.sh(command).timeout(LIMIT).text()?;
            let report: Value = serde_json::from_str(&text)?;
            let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
            Ok(bits.with_context(|| format!("iperf3 says {text}"))? / 1e9)
        };
        let (ours, node) = (iperf("10.9.0.2")?, iperf("10.8.0.2")?);
        add(runs, name, ours, node);
    }
    // The guest answers in its kernel, as the namespace does.
    let ping = |address: &str| -> Result<f64> {
        let command = format!("ping -c 200 -i 0.002 -q {address}");
        let text = host.sh(command).timeout(LIMIT).text()?;
        average_us(&text).with_context(|| format!("ping says {text}"))
    };
    let (ours, node) = (ping("10.9.0.2")?, ping("10.8.0.2")?);
    add(runs, "round trip", ours, node);
    Ok(())
}

/// The mean of ping's summary, in microseconds.
fn average_us(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.contains("min/avg/max"))?;
    let times = line.split(" = ").nth(1)?;
    let mean: f64 = times.split('/').nth(1)?.trim().parse().ok()?;
    Some(mean * 1e3)
}

fn add(runs: &mut Runs, name: &'static str, ours: f64, node: f64) {
    let (mine, its) = runs.entry(name).or_default();
    mine.push(ours);
    its.push(node);
}

fn table(runs: &Runs) -> Vec<Row> {
    let disks = LOADS.iter().map(|load| (load.0, load.5));
    let nets = [
        ("TCP to it", "Gb/s"),
        ("TCP from it", "Gb/s"),
        ("round trip", "us"),
    ];
    let rows = disks.chain(nets).filter_map(|(name, unit)| {
        let (ours, node) = runs.get(name)?;
        Some(Row::new(name, unit, ours)?.against("the node itself", node))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_a_ping_is_read_whoever_made_the_ping() {
        let iputils = "rtt min/avg/max/mdev = 0.031/0.045/0.101/0.010 ms";
        let busybox = "round-trip min/avg/max = 0.031/0.045/0.101 ms";
        for text in [iputils, busybox] {
            let mean = average_us(text).unwrap();
            assert!((mean - 45.0).abs() < 0.001, "{mean}");
        }
        assert_eq!(average_us("100% packet loss"), None);
    }

    #[test]
    fn every_load_has_a_row_with_the_nodes_beside_it() {
        let mut runs = Runs::new();
        for load in LOADS {
            add(&mut runs, load.0, 80.0, 100.0);
        }
        add(&mut runs, "round trip", 60.0, 30.0);
        let rows = table(&runs);
        assert_eq!(rows.len(), LOADS.len() + 1);
        assert!(rows.iter().all(|row| row.peer_name.is_some()));
        assert_eq!(rows[0].ratio, Some(0.8));
    }
}
