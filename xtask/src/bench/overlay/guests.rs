//! Guests' ports: vhost-user to vhost-user across the tunnel, with DPDK's
//! virtio-user as the guests; and what a switch with many of them costs when
//! nothing goes through it.
//!
//! DPDK polls all the time, so that what it costs says nothing: what counts is
//! the two switches' processor time, with what the kernel does for them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_testbed::Host;
use serde_json::Value;

use super::Figures;

/// How long each is measured.
const SECONDS: f64 = 2.0;

/// Bytes of the large frames, without their headers.
const LARGE: usize = 60_000;

/// What both guests are told.
const COMMON: &str = "--no-huge --no-shconf --no-telemetry --no-pci -m 1024";

/// Ports of the switch that has nothing to do.
const IDLE: u32 = 100;

/// A port for a guest on each node.
const PORTS: &str = r#"set -e
for i in 1 2; do
  blanket --home /run/h$i net attach blue guest$i --vhost-user /run/guest$i --mac 02:00:00:00:00:0$i
done
"#;

/// A file with one frame that has to be segmented, for the guest that sends:
/// libpcap's format.
pub(super) fn large_frame() -> Vec<u8> {
    let mut frame = Vec::new();
    // Ethernet, from the first guest to the second.
    frame.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    let total = (40 + LARGE) as u16;
    let [high, low] = total.to_be_bytes();
    // IPv4 and TCP; DPDK computes the checksums.
    frame.extend([0x45, 0, high, low, 0, 1, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([3, 232, 7, 208, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10]);
    frame.extend([255, 255, 0, 0, 0, 0]);
    frame.resize(frame.len() + LARGE, 0);
    let mut file = Vec::new();
    let len = frame.len() as u32;
    for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, 1, 0, 0, len, len] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(frame);
    file
}

/// The processor time of a switch in seconds.
fn spent(host: &Host, switch: &str) -> Result<f64> {
    let stat = host.sh(format!("cat /proc/$(cat /run/{switch}.pid)/stat"));
    let stat = stat.text()?;
    let (_, rest) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let ticks = rest.split_ascii_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.map_while(|word| word.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// The frames, and their bytes, that have come out of the tunnel.
fn arrived(host: &Host) -> Result<(f64, f64)> {
    let peers = host
        .sh("blanket --home /run/h2 net peer ls --json")
        .text()?;
    let peers: Value = serde_json::from_str(&peers)?;
    let stats = &peers[0]["status"]["stats"];
    let field = |name: &str| stats[name].as_f64().context("blanket net peer ls");
    Ok((field("frames_in")?, field("bytes_in")?))
}

/// Starts the guests: the second one receives, and the first one sends as it
/// is told. They end by themselves.
fn start(host: &Host, receive: &str, send: &str) -> Result<()> {
    for (number, options) in [(2, receive), (1, send)] {
        let port = format!(
            "--vdev=net_virtio_user0,path=/run/guest{number},queues=1,queue_size=1024,mac=02:00:00:00:00:0{number}"
        );
        let core = number - 1;
        let commands = if number == 1 {
            "csum set ip sw 0\ncsum set tcp hw 0\ntso set 1370 0\nset fwd csum\n"
        } else {
            ""
        };
        let (commands, interactive) = match options.split_once("-i ") {
            Some(_) => (
                format!("port stop all\n{commands}port start all\nstart\n"),
                "",
            ),
            None => (String::new(), "--auto-start"),
        };
        host.sh(format!(
            "(printf '{commands}'; sleep 8) | timeout 8 dpdk-testpmd {COMMON} --file-prefix=guest{number} \
             --lcores 0@0,1@{core} {port} {options} {interactive} --no-flush-rx --burst=32 \
             >/run/testpmd{number}.log 2>&1 &"
        ))
        .text()?;
    }
    Ok(())
}

/// What it costs while the guests run: seconds for a GB, microseconds for a
/// frame, frames per second.
fn during(host: &Host) -> Result<(f64, f64, f64)> {
    std::thread::sleep(Duration::from_secs(3));
    let both = || -> Result<f64> { Ok(spent(host, "switch1")? + spent(host, "switch2")?) };
    let (start, before, had) = (Instant::now(), both()?, arrived(host)?);
    std::thread::sleep(Duration::from_secs_f64(SECONDS));
    let (used, seconds) = (both()? - before, start.elapsed().as_secs_f64());
    let (frames, bytes) = arrived(host)?;
    let (frames, bytes) = (frames - had.0, bytes - had.1);
    // They end by themselves.
    std::thread::sleep(Duration::from_secs(4));
    Ok((used / bytes * 1e9, used / frames * 1e6, frames / seconds))
}

/// Makes the ports.
///
/// # Errors
/// They cannot be attached.
pub(super) fn attach(host: &Host) -> Result<()> {
    host.sh(PORTS).text()?;
    Ok(())
}

/// One run.
///
/// # Errors
/// Nothing comes through.
pub(super) fn measure(host: &Host, figures: &mut Figures) -> Result<()> {
    let mut add = |name, value| figures.entry(name).or_default().push(value);
    start(
        host,
        "-- --forward-mode=rxonly --total-num-mbufs=16384",
        "-- --forward-mode=txonly --eth-peer=0,02:00:00:00:00:02 --txpkts=60 --total-num-mbufs=16384",
    )?;
    let (_, frame, rate) = during(host)?;
    add("packet", frame);
    add("kpps", rate / 1e3);
    start(
        host,
        "-- --forward-mode=rxonly --total-num-mbufs=8000 --mbuf-size=61000",
        "--vdev=net_pcap0,rx_pcap=/payload/large.pcap,infinite_rx=1 \
         -- -i --eth-peer=0,02:00:00:00:00:02 --total-num-mbufs=8000 --mbuf-size=61000 --txd=256 --rxd=256",
    )?;
    let (cpu, _, _) = during(host)?;
    add("cpu", cpu);
    Ok(())
}

/// How much of a processor a switch takes that has 100 ports and nothing to
/// do, in percent.
///
/// # Errors
/// It does not start.
pub(super) fn idle(host: &Host) -> Result<Vec<f64>> {
    host.sh(format!(
        r#"set -e
mkdir -p /run/idle
blanket-switch --socket /run/idle/blanket-switch.sock --state /run/idle/switch >/run/idle.log 2>&1 &
echo $! > /run/idle.pid
timeout 10 sh -c 'until blanket --home /run/idle net info; do sleep 0.1; done' >/dev/null 2>&1
blanket --home /run/idle net create blue
for i in $(seq {IDLE}); do blanket --home /run/idle net attach blue p$i --vhost-user /run/idle/p$i; done
"#
    ))
    .timeout(Duration::from_secs(60))
    .text()?;
    let one = || -> Result<f64> {
        let (start, before) = (Instant::now(), spent(host, "idle")?);
        std::thread::sleep(Duration::from_secs(5));
        let used = spent(host, "idle")? - before;
        Ok(used / start.elapsed().as_secs_f64() * 100.0)
    };
    std::thread::sleep(Duration::from_secs(1));
    (0..5).map(|_| one()).collect()
}
