//! Disk and network of `pv` guests beside the same I/O on this machine: the same
//! fio on a file of the same size, past the same caches, and the same iperf3 to
//! a network namespace behind the same kind of interface.
//!
//! And what keeps a guest from it, whatever its devices do: the same fio on a
//! device of the guest's own kernel that does nothing, the same iperf3 from the
//! guest to itself, and through a process that does nothing but carry frames.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use blanket_system_tests::{Vm, native_with};
use blanket_testbed::{Client, workloads};

use super::RUNS;
use crate::bench::floor::{Answerer, answers};
use crate::bench::load::{
    self, Access, BATCHED_READS, BATCHED_WRITES, LONG_READS, LONG_WRITES, PINGS, RANDOM_READS,
    RANDOM_WRITES, SEQUENTIAL_READS, SEQUENTIAL_WRITES,
};
use crate::bench::row::Row;
use crate::progress::Progress;

const LIMIT: Duration = Duration::from_secs(120);

/// What moves so much data that the device is what counts.
const LONG: [Access; 4] = [SEQUENTIAL_READS, SEQUENTIAL_WRITES, LONG_READS, LONG_WRITES];

/// What is tried on the device that does nothing, too.
const SHORT: [Access; 4] = [RANDOM_READS, RANDOM_WRITES, BATCHED_READS, BATCHED_WRITES];

/// Titles, ping's flags, and what they mean.
const ROUND_TRIPS: [(&str, &str, Duration); 2] = [
    (
        "round trip, each after 2 ms",
        "-i 0.002",
        Duration::from_millis(2),
    ),
    ("round trip, one after the other", "-f", Duration::ZERO),
];

/// The guests: what rows say of them, and their flags.
const GUESTS: [(&str, &str); 2] = [("isolated", ""), ("users trusted", "--trust-guest-user")];

/// The device that does nothing: completions come by an interrupt's other half,
/// as those of a disk.
const NOTHING: &str = "/dev/nullb0";

/// The guest's own tools.
const GUESTS_IPERF: &str = "chroot /mnt iperf3";

/// Figures of several runs, by title: the node's, and each guest's.
#[derive(Default)]
struct Runs {
    node: BTreeMap<String, Vec<f64>>,
    /// Of the process that does nothing but carry frames.
    cable: BTreeMap<String, Vec<f64>>,
    guests: [BTreeMap<String, Vec<f64>>; GUESTS.len()],
}

fn add(figures: &mut BTreeMap<String, Vec<f64>>, title: &str, figure: f64) {
    figures.entry(title.to_owned()).or_default().push(figure);
}

/// A guest, and where it is.
struct Guest<'a> {
    vm: Vm<'a>,
    client: Client,
    address: String,
}

impl<'a> Guest<'a> {
    fn start(host: &'a Client, number: usize) -> Result<Self> {
        let address = format!("10.9.{number}.2");
        // Past this machine's page cache, as fio's own I/O on it.
        let flags = format!(
            "--memory 512M --on-reboot exit --disk path=/payload/workloads.ext4,readonly=on \
             --disk path=/srv/disk{number},direct=on --net tap,host_ip=10.9.{number}.1/24 {}",
            GUESTS[number].1
        );
        let cmdline = format!("blanket.ip={address}/24");
        let vm = Vm::pv(host, &format!("io{number}"), &cmdline, &flags)?;
        let client = vm.guest()?;
        load::prepare(&client)?;
        load::serve_iperf(&client)?;
        client
            .sh("modprobe null_blk gb=1 queue_mode=2 irqmode=1 hw_queue_depth=256")
            .text()?;
        Ok(Self {
            vm,
            client,
            address,
        })
    }
}

/// `cable` carries frames between two TAPs, and `payloads` are the guests that
/// measure what the least is.
pub(super) fn rows(
    programs: &Path,
    cable: &Path,
    payloads: &Path,
    progress: &Progress,
) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?
        .inject(cable, "/usr/bin/cable")
        .inject(workloads()?, "/payload/workloads.ext4")
        .open()?;
    load::mount(&host, "-o loop /payload/workloads.ext4")?;
    // The last one is the node's own.
    host.sh(
        "for n in 0 1 2; do dd if=/dev/urandom of=/srv/disk$n bs=1M count=512 2>/dev/null; done; \
         touch /mnt/tmp/disk; mount --bind /srv/disk2 /mnt/tmp/disk",
    )
    .timeout(LIMIT)
    .text()?;
    // The node's own peer: another network namespace.
    host.sh(
        "ip netns add far; ip link add v0 type veth peer name v1 netns far; \
         ip addr add 10.8.0.1/24 dev v0; ip link set v0 up; \
         ip netns exec far sh -c 'ip addr add 10.8.0.2/24 dev v1; ip link set v1 up; iperf3 -s -D'",
    )
    .text()?;
    // The same namespace once more, behind a process.
    host.sh(
        "cable c0 c1 >/run/cable.log 2>&1 & echo $! >/run/cable.pid; \
         for n in $(seq 50); do [ -e /sys/class/net/c1 ] && break; sleep 0.1; done; \
         ip link set dev c1 netns far; ip addr add 10.7.0.1/24 dev c0; ip link set dev c0 up; \
         ip -n far addr add 10.7.0.2/24 dev c1; ip -n far link set dev c1 up",
    )
    .text()?;
    let guests: Vec<_> = (0..GUESTS.len())
        .map(|number| Guest::start(&host, number))
        .collect::<Result<_>>()?;
    let mut runs = Runs::default();
    for number in 1..=RUNS {
        let step = progress.step(&format!("guests and node, run {number} of {RUNS}"));
        disk(&host, &guests, &mut runs)?;
        network(&host, &guests, &mut runs)?;
        step.done("");
    }
    for guest in guests {
        guest.vm.blanket("rm", "--force")?;
    }
    host.sh("kill $(cat /run/cable.pid); pkill -x iperf3 || true; ip netns del far")
        .text()?;
    let mut rows = table(&runs);
    rows.extend(least(payloads)?);
    Ok(rows)
}

/// The least that an answer takes which a guest gives, beside one of a thread.
fn least(payloads: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (title, _, pause) in ROUND_TRIPS {
        let (mut guest, mut thread) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            guest.push(answers(Answerer::Guest(payloads), PINGS, pause)?);
            thread.push(answers(Answerer::Thread, PINGS, pause)?);
        }
        let title = format!("{title}, the least: a guest without a kernel");
        let row = Row::new(&title, "us", &guest);
        rows.extend(row.map(|row| row.against("a thread of the node", &thread)));
    }
    Ok(rows)
}

/// The same in turns, on the node and in the guests.
fn disk(host: &Client, guests: &[Guest], runs: &mut Runs) -> Result<()> {
    for access in LONG.iter().chain(&SHORT) {
        let figure = load::fio(host, "/tmp/disk", access)?;
        add(&mut runs.node, access.title, figure);
        for (guest, figures) in guests.iter().zip(&mut runs.guests) {
            let figure = load::fio(&guest.client, load::DISK, access)?;
            add(figures, access.title, figure);
        }
    }
    for access in &SHORT {
        for (guest, figures) in guests.iter().zip(&mut runs.guests) {
            let figure = load::fio(&guest.client, NOTHING, access)?;
            add(figures, &on_nothing(access.title), figure);
        }
    }
    Ok(())
}

fn on_nothing(title: &str) -> String {
    format!("{title}, on a device that does nothing")
}

const TO: &str = "TCP to it";
const FROM: &str = "TCP from it";
const WITHIN: &str = "TCP from it to itself";

/// As to a guest and from it.
const CABLE: [(&str, &str); 2] = [
    (
        TO,
        "TCP through a process between two TAPs, without a guest",
    ),
    (FROM, "TCP back through that process"),
];

fn network(host: &Client, guests: &[Guest], runs: &mut Runs) -> Result<()> {
    for (title, flag) in [(TO, ""), (FROM, "-R")] {
        let figure = load::iperf(host, "iperf3", "10.8.0.2", flag)?;
        add(&mut runs.node, title, figure);
        let figure = load::iperf(host, "iperf3", "10.7.0.2", flag)?;
        add(&mut runs.cable, title, figure);
        for (guest, figures) in guests.iter().zip(&mut runs.guests) {
            let figure = load::iperf(host, "iperf3", &guest.address, flag)?;
            add(figures, title, figure);
        }
    }
    for (guest, figures) in guests.iter().zip(&mut runs.guests) {
        let figure = load::iperf(&guest.client, GUESTS_IPERF, &guest.address, "")?;
        add(figures, WITHIN, figure);
    }
    // A guest answers in its kernel, as the namespace does.
    for (title, pace, _) in ROUND_TRIPS {
        add(&mut runs.node, title, load::ping(host, "10.8.0.2", pace)?);
        for (guest, figures) in guests.iter().zip(&mut runs.guests) {
            add(figures, title, load::ping(host, &guest.address, pace)?);
        }
    }
    Ok(())
}

fn table(runs: &Runs) -> Vec<Row> {
    // What is measured in a guest, the node's figure beside it, and the unit.
    let mut lines: Vec<(String, &str, &str)> = Vec::new();
    for access in &LONG {
        lines.push((access.title.into(), access.title, access.unit));
    }
    for access in &SHORT {
        lines.push((access.title.into(), access.title, access.unit));
        lines.push((on_nothing(access.title), access.title, access.unit));
    }
    for (title, beside) in [(TO, TO), (FROM, FROM), (WITHIN, TO)] {
        lines.push((title.into(), beside, "Gb/s"));
    }
    for (title, ..) in ROUND_TRIPS {
        lines.push((title.into(), title, "us"));
    }
    let mut rows = Vec::new();
    for (beside, title) in CABLE {
        let figures = runs.cable.get(beside).map_or(&[][..], Vec::as_slice);
        let node = runs.node.get(beside).map_or(&[][..], Vec::as_slice);
        let row = Row::new(title, "Gb/s", figures);
        rows.extend(row.map(|row| row.against("the node itself", node)));
    }
    for ((place, _), figures) in GUESTS.iter().zip(&runs.guests) {
        for (title, beside, unit) in &lines {
            let ours = figures.get(title).map_or(&[][..], Vec::as_slice);
            let node = runs.node.get(*beside).map_or(&[][..], Vec::as_slice);
            let row = Row::new(&format!("{title}, {place}"), unit, ours);
            rows.extend(row.map(|row| row.against("the node itself", node)));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_a_row_with_the_nodes_beside_it() {
        let mut runs = Runs::default();
        for access in LONG.iter().chain(&SHORT) {
            add(&mut runs.node, access.title, 100.0);
        }
        for access in &SHORT {
            for figures in &mut runs.guests {
                add(figures, access.title, 80.0);
                add(figures, &on_nothing(access.title), 150.0);
            }
        }
        let rows = table(&runs);
        assert_eq!(rows.len(), 2 * 2 * SHORT.len());
        assert!(rows.iter().all(|row| row.peer == Some(100.0)));
        assert_eq!(rows[0].ratio, Some(0.8));
        assert_eq!(rows[1].ratio, Some(1.5));
    }
}
