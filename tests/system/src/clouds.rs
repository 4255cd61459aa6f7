//! Two unlike clouds, one cluster.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blanket_testbed::{Disk, GuestImages, Network, Node, NodeBuilder, Provider};
use tempfile::TempDir;

use crate::{Vm, provider_with};

/// Moving a guest between emulated machines takes its time.
const LONG: Duration = Duration::from_secs(300);

/// Bytes of the volume for guests' disks.
const VOLUME: u64 = 2 << 30;

/// Two machines of providers with other processors, cards and disks, both nodes of a cluster.
/// Their guests are on their network, `10.1.0.0/24`.
pub struct Clouds {
    /// Has a stock Debian on its volume, `/dev/sda`.
    pub here: Node,
    /// Has room for disks.
    pub there: Node,
    _network: Network,
    _volume: TempDir,
}

impl Clouds {
    /// Where the guest is reached.
    pub const GUEST: &'static str = "10.1.0.50";

    /// Boots both, with programs of `folder`.
    ///
    /// # Errors
    /// One does not come up, or they do not become a cluster.
    pub fn boot(folder: &Path) -> Result<Self> {
        let network = Network::new(5)?;
        let debian = GuestImages::get()?.disk;
        let place = tempfile::tempdir()?;
        let volume = place.path().join("volume");
        File::create(&volume)?.set_len(VOLUME)?;
        // virtio's network card and SCSI disks; Intel's and NVMe.
        let (here, there) = std::thread::scope(|scope| {
            let boot = |which, number, disk: PathBuf| {
                let (folder, network) = (folder.to_owned(), network.clone());
                scope.spawn(move || boot(&folder, &network, which, number, &disk))
            };
            let both = [
                boot(Provider::Gce, 1, debian),
                boot(Provider::BareMetal, 2, volume),
            ];
            let [here, there] = both.map(|one| {
                one.join()
                    .unwrap_or_else(|_| Err(anyhow!("a cloud's thread died")))
            });
            Ok::<_, anyhow::Error>((here?, there?))
        })?;
        let both = Self {
            here,
            there,
            _network: network,
            _volume: place,
        };
        both.join()?;
        let volume = "mkfs.ext4 -q -E nodiscard /dev/nvme0n1; mkdir -p /var/lib/blanket/disks; \
                      mount /dev/nvme0n1 /var/lib/blanket/disks; \
                      rmdir /var/lib/blanket/disks/lost+found";
        both.there.sh(volume).text()?;
        Ok(both)
    }

    fn join(&self) -> Result<()> {
        blanket(&self.here, "ca init --name here --address 10.1.0.1")?;
        let words = blanket(&self.here, "node token")?;
        let words = words.trim().strip_prefix("blanket ");
        let words = words.context("no words to join with")?;
        let join = format!("{words} --name there --address 10.1.0.2");
        blanket(&self.there, &join).map(drop)
    }

    /// Starts the stock Debian as `web` on the first one.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self) -> Result<Vm<'_>> {
        let cmdline = format!(
            "root=LABEL=guest blanket.ip={}/24 systemd.show_status=0",
            Self::GUEST
        );
        let flags = "--machine hvm --memory 256M --disk path=/dev/sda,serial=disk-0 \
                     --net tap,bridge=guests,mtu=1400";
        Vm::linux(&self.here, "web", &cmdline, flags)
    }

    /// Where the guest is reached that is on a network of the switches'.
    pub const ON_NETWORK: &'static str = "10.8.0.50";

    /// Waits until the two nodes' switches are joined, and makes the network `blue` on the first
    /// one, with that node itself in it at `10.8.0.1`.
    ///
    /// # Errors
    /// They are not, or it cannot be.
    pub fn make_network(&self) -> Result<()> {
        let joined = "until blanket net peer ls --json | grep -q '\"connected\": *true'; do \
                      sleep 0.5; done";
        for node in [&self.here, &self.there] {
            node.sh(joined).timeout(LONG).text()?;
        }
        blanket(&self.here, "net create blue --mtu 1400")?;
        blanket(&self.here, "net attach blue client --tap client")?;
        let address = "ip addr add 10.8.0.1/24 dev client && ip link set client mtu 1400 up";
        self.here.sh(address).text()?;
        Ok(())
    }

    /// Starts the stock Debian as `web` on the first one, on the network `blue`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_on_network(&self) -> Result<Vm<'_>> {
        let address = Self::ON_NETWORK;
        let cmdline = format!("root=LABEL=guest blanket.ip={address}/24 systemd.show_status=0");
        let flags = format!(
            "--machine hvm --memory 256M --disk path=/dev/sda,serial=disk-0 \
             --net network=blue,ip={address}"
        );
        Vm::linux(&self.here, "web", &cmdline, &flags)
    }

    /// Has the first node ping that guest, ten milliseconds apart, until [`Clouds::end_pings`]:
    /// more keeps emulated processors from all else.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn begin_pings(&self) -> Result<()> {
        let ping = format!(
            "until ping -c 1 -W 1 {0} > /dev/null; do :; done; touch /run/pings; \
             exec ping -D -i 0.01 {0}",
            Self::ON_NETWORK
        );
        self.here.sh(ping).spawn("/run/ping.log")?;
        let begun = "until [ -e /run/pings ]; do sleep 0.1; done";
        self.here.sh(begun).timeout(LONG).text()?;
        Ok(())
    }

    /// What became of the pings.
    ///
    /// # Errors
    /// There is no account of them.
    pub fn end_pings(&self) -> Result<Pings> {
        let end = "kill -INT $(pidof ping); while pidof ping > /dev/null; do sleep 0.1; done; \
                   cat /run/ping.log";
        Pings::read(&self.here.sh(end).timeout(LONG).text()?)
    }

    /// `blanket migrate web there FLAGS`: the VM there, and the report.
    ///
    /// # Errors
    /// It was not migrated: what `blanket` said.
    pub fn migrate(&self, flags: &str) -> Result<(Vm<'_>, serde_json::Value)> {
        let report = blanket(&self.here, &format!("migrate web there --json {flags}"))?;
        let report = serde_json::from_str(&report)?;
        Ok((Vm::started(&self.there, "web"), report))
    }
}

/// What became of a series of pings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pings {
    /// So many were sent.
    pub sent: u64,
    /// So many were not answered. The last one may still be on its way.
    pub lost: u64,
    /// So many of them were sent before the last one that was answered.
    pub missing: u64,
    /// So many were answered more than once.
    pub doubled: u64,
    /// The longest time between two answers, in milliseconds.
    pub gap_ms: f64,
    /// When the first answer came after which no ping is missing, by the sender's clock, in
    /// seconds since 1970.
    pub whole_since: f64,
}

impl Pings {
    /// Reads what `ping -D` has written.
    ///
    /// # Errors
    /// It has no end.
    pub fn read(log: &str) -> Result<Self> {
        let answers = log.lines().filter_map(|line| {
            let (time, rest) = line.strip_prefix('[')?.split_once(']')?;
            let (number, _) = rest.split_once("icmp_seq=")?.1.split_once(' ')?;
            Some((time.parse().ok()?, number.parse().ok()?))
        });
        let mut answers: Vec<(f64, u64)> = answers.collect();
        let gaps = answers.windows(2).map(|pair| pair[1].0 - pair[0].0);
        let gap_ms = gaps.fold(0.0, f64::max) * 1e3;
        answers.sort_by_key(|(_, number)| *number);
        answers.dedup_by_key(|(_, number)| *number);
        let last = answers.last().map_or(0, |(_, number)| *number);
        let whole = answers
            .windows(2)
            .rev()
            .find(|pair| pair[1].1 > pair[0].1 + 1);
        let whole = whole.map(|pair| pair[1]).or(answers.first().copied());
        let line = log.lines().find(|line| line.contains("transmitted"));
        let line = line.with_context(|| format!("the pings have no end: {log}"))?;
        let figure = |what: &str| -> u64 {
            let part = line.split(',').find(|part| part.contains(what));
            let digits = part.map(|part| part.chars().filter(char::is_ascii_digit).collect());
            digits
                .and_then(|it: String| it.parse().ok())
                .unwrap_or_default()
        };
        let sent = figure("transmitted");
        Ok(Self {
            sent,
            lost: sent.saturating_sub(figure("received")),
            missing: last.saturating_sub(answers.len() as u64),
            doubled: figure("duplicates"),
            gap_ms,
            whole_since: whole.map_or(f64::INFINITY, |(time, _)| time),
        })
    }
}

/// What `blanket COMMAND` says on a node.
///
/// # Errors
/// It fails.
pub fn blanket(node: &Node, command: &str) -> Result<String> {
    let line = format!("blanket {command}");
    let said = node.sh(line).timeout(LONG).run()?;
    ensure!(said.status.success(), "blanket {command}: {said}");
    Ok(String::from_utf8(said.stdout)?)
}

/// A machine of this provider on a network, with a bridge for its guests on its card.
fn boot(
    folder: &Path,
    network: &Network,
    which: Provider,
    number: u8,
    disk: &Path,
) -> Result<Node> {
    let name = format!("{which:?}").to_lowercase();
    let address = format!("10.1.0.{number}/24");
    let builder: NodeBuilder = provider_with(&name, folder)?.cpus(1).provider(which);
    let node = builder
        .disk(Disk::scratch(disk))
        .inject(folder.join("blanketd"), "/usr/bin/blanketd")
        .inject(folder.join("blanket-switch"), "/usr/bin/blanket-switch")
        .nic_with_address(network, &address)
        .boot()?;
    let bridge = format!(
        "until grep -qs 1 /sys/class/net/eth0/carrier; do sleep 0.1; done; \
         ip link add guests type bridge forward_delay 0; ip link set guests up; \
         ip link set eth0 master guests; ip addr flush dev eth0; \
         ip addr add {address} dev guests"
    );
    node.sh(bridge).text()?;
    node.sh("exec blanketd").spawn("/run/blanketd.log")?;
    let switch = format!("exec blanket-switch --listen 10.1.0.{number}:4790 --interface guests");
    node.sh(switch).spawn("/run/switch.log")?;
    let ready = "until [ -S /run/blanketd.sock ]; do sleep 0.1; done";
    node.sh(ready).timeout(LONG).text()?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_pings_is_read() {
        let log = "PING 10.8.0.50 (10.8.0.50) 56(84) bytes of data.\n\
                   [10.000] 64 bytes from 10.8.0.50: icmp_seq=1 ttl=64 time=1 ms\n\
                   [10.001] 64 bytes from 10.8.0.50: icmp_seq=3 ttl=64 time=1 ms\n\
                   [10.251] 64 bytes from 10.8.0.50: icmp_seq=4 ttl=64 time=250 ms\n\
                   [10.252] 64 bytes from 10.8.0.50: icmp_seq=4 ttl=64 time=250 ms (DUP!)\n\n\
                   5 packets transmitted, 3 received, +1 duplicates, 40% packet loss, time 9ms\n";
        let pings = Pings::read(log).unwrap();
        assert_eq!((pings.sent, pings.lost, pings.doubled), (5, 2, 1));
        assert_eq!(pings.missing, 1);
        assert!((pings.gap_ms - 250.0).abs() < 0.1, "{pings:?}");
        assert!((pings.whole_since - 10.001).abs() < 1e-6, "{pings:?}");
        assert!(Pings::read("").is_err());
    }
}
