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
    let ready = "until [ -S /run/blanketd.sock ]; do sleep 0.1; done";
    node.sh(ready).timeout(LONG).text()?;
    Ok(node)
}
