//! Disk and network of a `pv` guest, natively.

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
const SECONDS: u32 = 3;
/// A queue's depth, submitted and reaped by eights.
const BATCHES: &str = "32 --iodepth_batch=8 --iodepth_batch_complete_min=8 \
                       --iodepth_batch_complete_max=32";
const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn rows(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let host = native_with("bench", programs)?
        .inject(workloads()?, "/payload/workloads.ext4")
        .open()?;
    // In this machine's page cache: it is the rings that are measured.
    host.sh("dd if=/dev/urandom of=/tmp/disk bs=1M count=256 2>/dev/null")
        .text()?;
    let mut rows = Vec::new();
    for (grants, option) in [("on", ""), ("off", ",persistent=off")] {
        let step = progress.step(&format!("disk and network, persistent grants {grants}"));
        let flags = format!(
            "--memory 512M --on-reboot exit --disk path=/payload/workloads.ext4,readonly=on \
             --disk path=/tmp/disk{option} --net tap,host_ip=10.9.0.1/24"
        );
        let vm = Vm::pv(&host, "io", "blanket.ip=10.9.0.2/24", &flags)?;
        let guest = vm.guest()?;
        guest
            .sh(
                "modprobe ext4; mount -o ro /dev/xvda /mnt; mount --bind /dev /mnt/dev; \
                 mount -t proc proc /mnt/proc; mount -t tmpfs tmpfs /mnt/tmp",
            )
            .text()?;
        let note = format!("persistent grants {grants}");
        rows.extend(disk(&guest, &note)?);
        if option.is_empty() {
            rows.extend(network(&host, &guest)?);
        }
        vm.blanket("rm", "--force")?;
        step.done("");
    }
    Ok(rows)
}

/// fio's figures.
fn disk(guest: &Client, note: &str) -> Result<Vec<Row>> {
    let fio = |rw: &str, block: &str, queue: &str, field: &str| -> Result<Vec<f64>> {
        let direction = if rw.contains("write") {
            "write"
        } else {
            "read"
        };
        (0..RUNS)
            .map(|_| {
                let text = guest
                    .sh(format!(
                        "chroot /mnt fio --name=x --filename=/dev/xvdb --rw={rw} --bs={block} \
                         --iodepth={queue} --ioengine=libaio --direct=1 --time_based \
                         --runtime={SECONDS} --output-format=json"
                    ))
                    .timeout(LIMIT)
                    .text()?;
                let report: Value = serde_json::from_str(&text)?;
                let value = &report["jobs"][0][direction][field];
                value.as_f64().with_context(|| format!("fio says {text}"))
            })
            .collect()
    };
    let bytes = |values: Vec<f64>| {
        values
            .iter()
            .map(|n| n / (1 << 20) as f64)
            .collect::<Vec<_>>()
    };
    let rows = [
        Row::new(
            &format!("4 KiB random reads, depth 32, {note}"),
            "IOPS",
            &fio("randread", "4k", "32", "iops")?,
        ),
        // Without the system calls of each: what the ring can do.
        Row::new(
            &format!("the same in batches of 8, {note}"),
            "IOPS",
            &fio("randread", "4k", BATCHES, "iops")?,
        ),
        Row::new(
            &format!("4 KiB random writes, depth 32, {note}"),
            "IOPS",
            &fio("randwrite", "4k", "32", "iops")?,
        ),
        Row::new(
            &format!("256 KiB reads, depth 8, {note}"),
            "MiB/s",
            &bytes(fio("read", "256k", "8", "bw_bytes")?),
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}

/// iperf3's figures.
fn network(host: &Client, guest: &Client) -> Result<Vec<Row>> {
    guest.sh("chroot /mnt iperf3 -s -D").text()?;
    let mut rows = Vec::new();
    for (direction, flag) in [("host to guest", ""), ("guest to host", "-R")] {
        let run = |_| -> Result<f64> {
            let text = host
                .sh(format!("iperf3 -J -t {SECONDS} -c 10.9.0.2 {flag}"))
                .timeout(LIMIT)
                .text()?;
            let report: Value = serde_json::from_str(&text)?;
            let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
            Ok(bits.with_context(|| format!("iperf3 says {text}"))? / 1e9)
        };
        let runs: Vec<f64> = (0..RUNS).map(run).collect::<Result<_>>()?;
        let metric = format!("TCP {direction}, 1 vCPU");
        rows.extend(Row::new(&metric, "Gb/s", &runs));
    }
    Ok(rows)
}
