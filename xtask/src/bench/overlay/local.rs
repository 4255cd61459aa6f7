//! Guests of one node: frames from a port to another and back, beside Open
//! vSwitch with DPDK, with the same processors: one for the switch, and one for
//! the guests (DPDK's virtio-user, which sends each frame back that it gets).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blanket_testbed::{Host, HostBuilder, downloaded};

use super::{Figures, RUNS};
use crate::progress::Progress;

/// What Open vSwitch needs, and what is not to run on this machine: it is unpacked in the
/// namespaces only.
pub(super) const PACKAGES: [&str; 4] =
    ["openvswitch-common", "libunbound8", "libxdp1", "libcap-ng0"];
const UNPACKED: [&str; 2] = ["openvswitch-switch", "openvswitch-switch-dpdk"];

/// Bytes of frames, without their checksums.
const SIZES: [(u32, &str, &str); 2] = [(60, "small", "64"), (1496, "large", "1500")];

/// Open vSwitch with two ports to which it connects. Its memory is not of huge pages, as is the
/// guests'.
const OPEN_VSWITCH: &str = r#"set -e
mkdir -p /run/openvswitch /run/ovs
cd /run/ovs
for package in /payload/openvswitch/*.deb; do dpkg-deb -x $package root; done
ln -s /run/ovs/root/usr/bin/ovs-vsctl /usr/local/bin/ovs-vsctl
ovsdb-tool create conf.db root/usr/share/openvswitch/vswitch.ovsschema
ovsdb-server conf.db --remote=punix:/run/openvswitch/db.sock --pidfile=/run/ovs/db.pid --detach --no-chdir \
  >/run/ovs/db.log 2>&1
ovs-vsctl --no-wait init
ovs-vsctl --no-wait set Open_vSwitch . other_config:dpdk-init=true other_config:pmd-cpu-mask=2 \
  'other_config:dpdk-extra=--no-huge --legacy-mem -m 3072 --no-pci --no-shconf --no-telemetry --file-prefix=ovs'
root/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk --pidfile=/run/ovs/switch.pid --detach --no-chdir \
  >/run/ovs/switch.log 2>&1
ovs-vsctl --timeout=30 add-br br0 -- set bridge br0 datapath_type=netdev
for i in 1 2; do
  ovs-vsctl --timeout=30 add-port br0 p$i -- \
    set Interface p$i type=dpdkvhostuserclient options:vhost-server-path=/run/ovs/p$i
done
"#;

/// Our switch with two ports at which it waits.
const OURS: &str = r#"set -e
mkdir -p /run/local
taskset -c 1 blanket-switch --socket /run/local/blanket-switch.sock --state /run/local/switch \
  >/run/local.log 2>&1 &
echo $! > /run/local.pid
timeout 10 sh -c 'until blanket --home /run/local net info; do sleep 0.1; done' >/dev/null 2>&1
blanket --home /run/local net create blue
for i in 1 2; do
  blanket --home /run/local net attach blue p$i --vhost-user /run/local/p$i --mac 02:00:00:00:00:0$i
done
"#;

/// Adds what Open vSwitch consists of.
///
/// # Errors
/// It cannot be downloaded.
pub(super) fn inject(mut builder: HostBuilder) -> Result<HostBuilder> {
    for (number, package) in downloaded(&UNPACKED)?.into_iter().enumerate() {
        builder = builder.inject(package, format!("/payload/openvswitch/{number}.deb"));
    }
    Ok(builder)
}

/// Frames per second that the guests get, in thousands.
fn rate(host: &Host, folder: &str, server: bool, ready: &str, bytes: u32) -> Result<f64> {
    let port = |number: u32| {
        format!(
            "--vdev=net_virtio_user{number},path={folder}/p{number},queues=1,queue_size=1024,\
             mac=02:00:00:00:00:0{number}{}",
            if server { ",server=1" } else { "" }
        )
    };
    // The first figures are from when it began.
    let said = host
        .sh(format!(
            "(sleep 1; {ready}; echo start tx_first 16; sleep 1; echo show port stats all; sleep 2; \
              echo show port stats all; echo quit) | \
             timeout 60 dpdk-testpmd --no-huge --no-shconf --no-telemetry --no-pci -m 512 \
              --file-prefix=local --lcores 0@0,1@0 {} {} \
             -- -i --forward-mode=mac --eth-peer=0,02:00:00:00:00:02 --eth-peer=1,02:00:00:00:00:01 \
              --txpkts={bytes} --total-num-mbufs=16384 --no-flush-rx --burst=32 2>&1",
            port(1),
            port(2)
        ))
        .timeout(Duration::from_secs(90))
        .text()?;
    let rates = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once("Rx-pps:")?;
        rest.split_ascii_whitespace().next()?.parse::<f64>().ok()
    });
    let rates: Vec<f64> = rates.collect();
    let [.., first, second] = rates[..] else {
        anyhow::bail!("dpdk-testpmd tells no rates:\n{said}");
    };
    let both = first + second;
    ensure!(both > 0.0, "nothing came through:\n{said}");
    Ok(both / 1e3)
}

/// All of it: ours, and Open vSwitch's.
///
/// # Errors
/// One of them does not start, or nothing comes through.
pub(super) fn measure(host: &Host, progress: &Progress) -> Result<[Figures; 2]> {
    let limit = Duration::from_secs(90);
    let mut all: [Figures; 2] = Default::default();
    let step = progress.step("Open vSwitch with DPDK, and a switch of ours");
    for script in [OPEN_VSWITCH, OURS] {
        host.sh(script).timeout(limit).text()?;
    }
    step.done("");
    // Its ports are up some time after the guests have come.
    let up = "timeout 30 sh -c 'until [ \"$(ovs-vsctl get Interface p1 link_state)$(ovs-vsctl get \
              Interface p2 link_state)\" = upup ]; do sleep 0.2; done' >/dev/null 2>&1; sleep 1";
    // Each polls when the other one is measured, or is stopped.
    let switch = |signal: &str| {
        let stop = format!("kill -{signal} $(cat /run/ovs/switch.pid)");
        host.sh(stop).text().map(drop)
    };
    for number in 1..=RUNS {
        let step = progress.step(&format!("guests of one node, run {number} of {RUNS}"));
        for (bytes, name, _) in SIZES {
            let its = rate(host, "/run/ovs", true, up, bytes).context("Open vSwitch")?;
            switch("STOP")?;
            let ours = rate(host, "/run/local", false, ":", bytes).context("Blanket")?;
            switch("CONT")?;
            for (figures, value) in all.iter_mut().zip([ours, its]) {
                figures.entry(name).or_default().push(value);
            }
        }
        step.done("");
    }
    host.sh("kill $(cat /run/local.pid /run/ovs/switch.pid /run/ovs/db.pid)")
        .text()?;
    Ok(all)
}

/// What the rows are called: figure, metric, unit.
pub(super) fn names() -> impl Iterator<Item = (&'static str, String, &'static str)> {
    SIZES.into_iter().map(|(_, name, bytes)| {
        let metric = format!("guest to guest on a node: frames of {bytes} bytes");
        (name, metric, "k/s")
    })
}
