//! Disk and network of a `pv` guest, natively.

use std::path::Path;

use anyhow::Result;
use blanket_system_tests::{Vm, native_with};
use blanket_testbed::{Client, workloads};

use super::RUNS;
use crate::bench::load::{self, BATCHED_READS, LONG_READS, RANDOM_READS, RANDOM_WRITES};
use crate::bench::row::Row;
use crate::progress::Progress;

pub(super) fn rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?
        .inject(workloads()?, "/payload/workloads.ext4")
        .open()?;
    // In this machine's page cache: it is the rings that are measured.
    host.sh("dd if=/dev/urandom of=/tmp/disk bs=1M count=256 2>/dev/null")
        .text()?;
    let step = progress.step("disk and network");
    let vm = Vm::pv(
        &host,
        "io",
        "blanket.ip=10.9.0.2/24",
        "--memory 512M --on-reboot exit --disk path=/payload/workloads.ext4,readonly=on \
         --disk path=/tmp/disk --net tap,host_ip=10.9.0.1/24",
    )?;
    let guest = vm.guest()?;
    load::prepare(&guest)?;
    let mut rows = Vec::new();
    for access in [RANDOM_READS, BATCHED_READS, RANDOM_WRITES, LONG_READS] {
        let runs = (0..RUNS).map(|_| load::fio(&guest, load::DISK, &access));
        rows.extend(Row::new(
            access.title,
            access.unit,
            &runs.collect::<Result<Vec<_>>>()?,
        ));
    }
    rows.extend(network(&host, &guest)?);
    vm.blanket("rm", "--force")?;
    step.done("");
    Ok(rows)
}

/// iperf3's figures.
fn network(host: &Client, guest: &Client) -> Result<Vec<Row>> {
    load::serve_iperf(guest)?;
    let mut rows = Vec::new();
    for (direction, flag) in [("host to guest", ""), ("guest to host", "-R")] {
        let runs = (0..RUNS).map(|_| load::iperf(host, "iperf3", "10.9.0.2", flag));
        let metric = format!("TCP {direction}, 1 vCPU");
        rows.extend(Row::new(
            &metric,
            "Gb/s",
            &runs.collect::<Result<Vec<_>>>()?,
        ));
    }
    Ok(rows)
}
