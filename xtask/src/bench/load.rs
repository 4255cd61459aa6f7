//! fio and iperf3 in guests, from the image of workloads on `xvda`.

use std::time::Duration;

use anyhow::{Context, Result};
use blanket_testbed::Client;
use serde_json::Value;

/// Seconds of each run.
const SECONDS: u32 = 3;

const LIMIT: Duration = Duration::from_secs(120);

/// A kind of disk access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    /// For people.
    pub(super) title: &'static str,
    rw: &'static str,
    block: &'static str,
    queue: &'static str,
    /// What is told of it.
    pub(super) unit: &'static str,
}

/// One request at a time is submitted and reaped.
pub(super) const RANDOM_READS: Access = Access {
    title: "4 KiB random reads, depth 32",
    rw: "randread",
    block: "4k",
    queue: "32",
    unit: "IOPS",
};

/// Without the system calls of each request: what the ring can do.
pub(super) const BATCHED_READS: Access = Access {
    title: "the same in batches of 8",
    queue: "32 --iodepth_batch=8 --iodepth_batch_complete_min=8 --iodepth_batch_complete_max=32",
    ..RANDOM_READS
};

/// As the reads.
pub(super) const RANDOM_WRITES: Access = Access {
    title: "4 KiB random writes, depth 32",
    rw: "randwrite",
    ..RANDOM_READS
};

/// Long requests.
pub(super) const LONG_READS: Access = Access {
    title: "256 KiB reads, depth 8",
    rw: "read",
    block: "256k",
    queue: "8",
    unit: "MiB/s",
};

/// Makes the programs usable in a guest.
pub(super) fn prepare(guest: &Client) -> Result<()> {
    guest
        .sh(
            "modprobe ext4; mount -o ro /dev/xvda /mnt; mount --bind /dev /mnt/dev; \
             mount -t proc proc /mnt/proc; mount -t tmpfs tmpfs /mnt/tmp",
        )
        .text()?;
    Ok(())
}

/// One run of fio on the guest's `xvdb`, in the access's unit.
pub(super) fn fio(guest: &Client, access: &Access) -> Result<f64> {
    let Access {
        rw, block, queue, ..
    } = access;
    let text = guest
        .sh(format!(
            "chroot /mnt fio --name=x --filename=/dev/xvdb --rw={rw} --bs={block} \
             --iodepth={queue} --ioengine=libaio --direct=1 --time_based \
             --runtime={SECONDS} --output-format=json"
        ))
        .timeout(LIMIT)
        .text()?;
    let report: Value = serde_json::from_str(&text)?;
    let direction = if rw.contains("write") {
        "write"
    } else {
        "read"
    };
    let (field, divisor) = match access.unit {
        "IOPS" => ("iops", 1.0),
        _ => ("bw_bytes", f64::from(1 << 20)),
    };
    let value = report["jobs"][0][direction][field].as_f64();
    Ok(value.with_context(|| format!("fio says {text}"))? / divisor)
}

/// Lets the guest answer [`iperf`].
pub(super) fn serve_iperf(guest: &Client) -> Result<()> {
    guest.sh("chroot /mnt iperf3 -s -D").text()?;
    Ok(())
}

/// One run of iperf3 between the host and a guest, in Gb/s: from the guest if
/// `flag` is `-R`.
pub(super) fn iperf(host: &Client, address: &str, flag: &str) -> Result<f64> {
    // The server takes a moment to start, and to be done with a run.
    const TRIES: u32 = 50;
    let run = format!(
        "for n in $(seq {TRIES}); do iperf3 -J -t {SECONDS} -c {address} {flag} >/tmp/iperf && \
         ! grep -q '\"error\":' /tmp/iperf && break; sleep 0.2; done; cat /tmp/iperf"
    );
    let text = host.sh(run).timeout(LIMIT).text()?;
    let report: Value = serde_json::from_str(&text)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 says {text}"))? / 1e9)
}
