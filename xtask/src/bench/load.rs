//! fio, iperf3 and ping, in guests and on the node, from the image of workloads.

use std::time::Duration;

use anyhow::{Context, Result};
use blanket_testbed::Client;
use serde_json::Value;

/// Seconds of each run.
const SECONDS: u32 = 2;

pub(super) const LIMIT: Duration = Duration::from_secs(120);

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
    title: "4 KiB random reads, in batches of 8",
    queue: "32 --iodepth_batch=8 --iodepth_batch_complete_min=8 --iodepth_batch_complete_max=32",
    ..RANDOM_READS
};

/// As the reads.
pub(super) const RANDOM_WRITES: Access = Access {
    title: "4 KiB random writes, depth 32",
    rw: "randwrite",
    ..RANDOM_READS
};

/// As the reads.
pub(super) const BATCHED_WRITES: Access = Access {
    title: "4 KiB random writes, in batches of 8",
    rw: "randwrite",
    ..BATCHED_READS
};

/// In a row, with the longest requests.
pub(super) const SEQUENTIAL_READS: Access = Access {
    title: "1 MiB sequential reads, depth 16",
    rw: "read",
    block: "1m",
    queue: "16",
    unit: "MiB/s",
};

/// As the reads.
pub(super) const SEQUENTIAL_WRITES: Access = Access {
    title: "1 MiB sequential writes, depth 16",
    rw: "write",
    ..SEQUENTIAL_READS
};

/// Long requests.
pub(super) const LONG_READS: Access = Access {
    title: "256 KiB reads, depth 8",
    rw: "read",
    block: "256k",
    queue: "8",
    unit: "MiB/s",
};

/// As the long reads.
pub(super) const LONG_WRITES: Access = Access {
    title: "256 KiB writes, depth 8",
    rw: "write",
    ..LONG_READS
};

/// The guest's second disk.
pub(super) const DISK: &str = "/dev/xvdb";

/// Makes the programs usable in a guest, from its first disk.
pub(super) fn prepare(guest: &Client) -> Result<()> {
    guest.sh("modprobe ext4").text()?;
    mount(guest, "/dev/xvda")
}

/// Makes the programs of an image usable.
pub(super) fn mount(client: &Client, image: &str) -> Result<()> {
    client
        .sh(format!(
            "mount -o ro {image} /mnt; mount --bind /dev /mnt/dev; \
             mount -t proc proc /mnt/proc; mount -t tmpfs tmpfs /mnt/tmp"
        ))
        .text()?;
    Ok(())
}

/// One run of fio on a file or device, in the access's unit.
pub(super) fn fio(client: &Client, file: &str, access: &Access) -> Result<f64> {
    let Access {
        rw, block, queue, ..
    } = access;
    let text = client
        .sh(format!(
            "chroot /mnt fio --name=x --filename={file} --rw={rw} --bs={block} \
             --iodepth={queue} --ioengine=libaio --direct=1 --time_based --size=100% \
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

/// One run of iperf3 with the server at an address, in Gb/s: from the server if
/// `flag` is `-R`. `iperf3` is the command that runs it.
pub(super) fn iperf(client: &Client, iperf3: &str, address: &str, flag: &str) -> Result<f64> {
    // The server takes a moment to start, and to be done with a run.
    const TRIES: u32 = 50;
    let run = format!(
        "for n in $(seq {TRIES}); do {iperf3} -J -t {SECONDS} -c {address} {flag} >/tmp/iperf && \
         ! grep -q '\"error\":' /tmp/iperf && break; sleep 0.2; done; cat /tmp/iperf"
    );
    let text = client.sh(run).timeout(LIMIT).text()?;
    let report: Value = serde_json::from_str(&text)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 says {text}"))? / 1e9)
}

/// Round trips that are measured at once.
pub(super) const PINGS: u32 = 300;

/// The mean round trip to an address, in microseconds. `pace` is ping's flag.
pub(super) fn ping(host: &Client, address: &str, pace: &str) -> Result<f64> {
    let command = format!("ping -c {PINGS} {pace} -q {address}");
    let text = host.sh(command).timeout(LIMIT).text()?;
    average_us(&text).with_context(|| format!("ping says {text}"))
}

/// The mean of ping's summary, in microseconds.
fn average_us(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.contains("min/avg/max"))?;
    let times = line.split(" = ").nth(1)?;
    let mean: f64 = times.split('/').nth(1)?.trim().parse().ok()?;
    Some(mean * 1e3)
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
}
