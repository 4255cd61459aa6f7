//! The QEMU machine that a node is, or runs on.

use std::ffi::OsString;
use std::fs;
use std::io::BufWriter;
use std::path::PathBuf;

use super::{Nic, NodeBuilder};
use crate::agent;
use crate::error::{Context, Result};
use crate::image;
use crate::kernel::{Kernel, KernelFlavor};
use crate::metadata::{Api, Instance, Metadata};
use crate::qemu::{Accelerator, RunFolder};
use crate::tree::Tree;

/// What a Linux under emulation can leave out. The clock options spare it calibrations that an
/// emulated timer fails, the random option a wait for entropy. The image starts the other processors.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nokaslr \
                              tsc=reliable random.trust_cpu=1 maxcpus=1";

/// Where metadata services answer.
const METADATA_ADDRESS: &str = "169.254.169.254";

/// The rest of the network that they are in: QEMU's own addresses, which nobody uses.
const METADATA_NETWORK: &str =
    "net=169.254.0.0/16,host=169.254.0.2,dns=169.254.0.3,dhcpstart=169.254.0.15";

/// A machine that can be started.
pub(super) struct Machine {
    /// QEMU's.
    pub(super) arguments: Vec<OsString>,
    /// The service that it will reach.
    pub(super) metadata: Option<Metadata>,
}

/// A network card as the node sees it.
pub(super) struct Card {
    pub(super) mac: String,
    /// With the length of its prefix; none if empty.
    pub(super) address: String,
}

impl NodeBuilder {
    /// Prepares all that QEMU needs in the folder.
    pub(super) fn machine(&self, folder: &RunFolder) -> Result<Machine> {
        let mut all = self.board();
        if !self.profile.hardware.is_xen() {
            for smbios in self.profile.smbios.arguments() {
                add(&mut all, &["-smbios", &smbios]);
            }
            if let Some(table) = self.profile.smbios.bios_of_hardware() {
                let path = folder.path().join("bios.smbios");
                fs::write(&path, table).context(|| format!("cannot write {}", path.display()))?;
                add(&mut all, &["-smbios", "file=bios.smbios"]);
            }
        }
        self.add_disks(&mut all);
        let cards = self.cards();
        self.add_nics(&mut all, &cards, folder)?;
        let metadata = match (self.profile.metadata, cards.first()) {
            (Some(api), Some(card)) => Some(self.serve_metadata(api, card, folder)?),
            _ => None,
        };
        if self.profile.hardware.is_xen() {
            self.boot_below_xen(&mut all, &cards, folder)?;
        } else {
            self.boot_directly(&mut all, &cards, folder)?;
        }
        Ok(Machine {
            arguments: all,
            metadata,
        })
    }

    /// Processors, memory, console, and the channel to the agent.
    fn board(&self) -> Vec<OsString> {
        let mut all = Vec::new();
        for argument in Accelerator::probe().arguments(self.profile.processor) {
            all.push(argument.into());
        }
        let bare = [
            "-machine",
            "q35",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "file:console.log",
        ];
        add(&mut all, &bare);
        let memory = self.memory_mib + super::xen::own_memory_mib(self.profile.hardware);
        let memory = format!("{memory}M");
        let processors = self.cpus + u8::from(self.spares_one());
        add(&mut all, &["-smp", &processors.to_string(), "-m", &memory]);
        let channel = "socket,id=agent,path=agent.sock,server=on,wait=off";
        add(&mut all, &["-chardev", channel]);
        let monitor = "unix:monitor.sock,server=on,wait=off";
        add(&mut all, &["-monitor", monitor]);
        let port = "virtserialport,chardev=agent,name=blanket.agent";
        for device in ["virtio-serial-pci", port, "virtio-rng-pci"] {
            add(&mut all, &["-device", device]);
        }
        all
    }

    /// Whether the node has a first processor that runs no programs.
    ///
    /// While the others load floating-point state, QEMU 7.2 clears a bit (IGNNE) in a word of the
    /// first processor from their threads, without a lock. The word also says whether nested
    /// paging is on: now and then that comes or goes, and a guest that runs there meets a
    /// shutdown, or the node itself does. A first processor without guests has nothing to lose.
    fn spares_one(&self) -> bool {
        self.cpus > 1 && !self.profile.hardware.is_xen() && Accelerator::probe() == Accelerator::Tcg
    }

    fn add_disks(&self, all: &mut Vec<OsString>) {
        let hardware = self.profile.hardware;
        if let Some(controller) = hardware
            .disk_controller()
            .filter(|_| !self.disks.is_empty())
        {
            add(all, &["-device", controller]);
        }
        let disks = self
            .disks
            .iter()
            .map(|disk| (disk.clone(), hardware.disk()));
        let payloads = self
            .payloads
            .iter()
            .map(|payload| (payload.disk(), "virtio-blk-pci"));
        for (index, (disk, device)) in disks.chain(payloads).enumerate() {
            let (drive, device) = disk.arguments(device, index);
            add(all, &["-drive", &drive, "-device", &device]);
        }
    }

    fn cards(&self) -> Vec<Card> {
        let [a, b, c] = self.profile.mac;
        let card = |nic: &Nic| {
            let [high, low] = nic.number.to_be_bytes();
            Card {
                mac: format!("{a:02x}:{b:02x}:{c:02x}:00:{high:02x}:{low:02x}"),
                address: nic.address.clone(),
            }
        };
        self.nics.iter().map(card).collect()
    }

    fn add_nics(&self, all: &mut Vec<OsString>, cards: &[Card], folder: &RunFolder) -> Result<()> {
        for (index, (nic, card)) in self.nics.iter().zip(cards).enumerate() {
            let backend = match &nic.network {
                Some(network) => {
                    let socket = format!("nic{index}.sock");
                    network.plug_in(&self.name, &folder.socket(&socket))?;
                    stream(&socket)
                }
                None => user_network(self.profile.metadata)?,
            };
            add(all, &["-netdev", &format!("{backend},id=nic{index}")]);
            let mac = if self.profile.hardware.is_xen() {
                super::xen::host_mac(index)
            } else {
                card.mac.clone()
            };
            let kind = self.profile.hardware.network_card();
            // Without a boot ROM, which is never used and takes time.
            let device = format!("{kind},netdev=nic{index},mac={mac},romfile=");
            add(all, &["-device", &device]);
        }
        let first = self.nics.first().and_then(|nic| nic.network.as_ref());
        if let (Some(network), Some(_)) = (first, self.profile.metadata) {
            // Two network backends without a card: they are joined to each other.
            network.plug_in_service(&self.name, &folder.socket("link.sock"))?;
            let backends = [user_network(self.profile.metadata)?, stream("link.sock")];
            for (index, backend) in backends.iter().enumerate() {
                add(all, &["-netdev", &format!("{backend},id=end{index}")]);
                let port = format!("hubport,hubid=0,id=port{index},netdev=end{index}");
                add(all, &["-netdev", &port]);
            }
        }
        Ok(())
    }

    fn serve_metadata(&self, api: Api, card: &Card, folder: &RunFolder) -> Result<Metadata> {
        let address = card.address.split('/').next().unwrap_or_default();
        let instance = Instance {
            name: self.name.clone(),
            address: address.to_owned(),
            mac: card.mac.clone(),
            mtu: self.profile.mtu,
            ..self.profile.instance.clone()
        };
        Metadata::serve(api, instance, &folder.socket("metadata.sock"))
    }

    /// What the node's kernel is told about its surroundings.
    pub(super) fn surroundings(&self, cards: &[Card]) -> String {
        let disks = self.disks.len() + self.payloads.len();
        let mut all = format!("blanket.name={} blanket.disks={disks}", self.name);
        for card in cards {
            all.push_str(&format!(" blanket.net={}={}", card.mac, card.address));
        }
        if self.profile.mtu != 0 {
            all.push_str(&format!(" blanket.mtu={}", self.profile.mtu));
        }
        if self.profile.metadata.is_some() {
            all.push_str(&format!(" blanket.metadata={METADATA_ADDRESS}"));
        }
        all
    }

    fn boot_directly(
        &self,
        all: &mut Vec<OsString>,
        cards: &[Card],
        folder: &RunFolder,
    ) -> Result<()> {
        let (kernel, initrd) = self.images(folder)?;
        let spare = if self.spares_one() {
            "blanket.spare"
        } else {
            ""
        };
        let options = format!("{KERNEL_OPTIONS} {spare} {}", self.surroundings(cards));
        add(all, &["-append", &options]);
        all.extend(["-kernel".into(), kernel.vmlinux().into()]);
        all.extend(["-initrd".into(), initrd.into()]);
        Ok(())
    }

    /// The kernel and the node image; with injected files a copy of it with a second archive
    /// behind it.
    pub(super) fn images(&self, folder: &RunFolder) -> Result<(Kernel, PathBuf)> {
        let flavor: KernelFlavor = self
            .kernel
            .unwrap_or_else(|| self.profile.hardware.kernel());
        let kernel = Kernel::get(flavor)?;
        let image = image::node(flavor, &kernel)?;
        if self.injected.is_empty() {
            return Ok((kernel, image));
        }
        let mut tree = Tree::default();
        for (file, path) in &self.injected {
            tree.host_file(path, file)?;
        }
        let path = folder.path().join("initrd.cpio");
        fs::copy(&image, &path)
            .and_then(|_| fs::File::options().append(true).open(&path))
            .and_then(|file| tree.write_cpio(BufWriter::new(file)))
            .context(|| format!("cannot write {}", path.display()))?;
        Ok((kernel, path))
    }
}

/// A backend that the switch in this process serves.
fn stream(socket: &str) -> String {
    format!("stream,server=off,addr.type=unix,addr.path={socket}")
}

/// QEMU's own network, from which nothing is reached but the metadata service if there is one.
fn user_network(api: Option<Api>) -> Result<String> {
    let alone = "user,ipv6=off,restrict=on";
    if api.is_none() {
        return Ok(alone.to_owned());
    }
    // QEMU starts it for each connection, with the connection as its standard streams, by way of
    // GLib's shell quoting.
    let agent = agent::program()?;
    let agent = agent.to_string_lossy().replace('\'', r"'\''");
    let relay = format!("'{agent}' relay metadata.sock").replace(',', ",,");
    Ok(format!(
        "{alone},{METADATA_NETWORK},guestfwd=tcp:{METADATA_ADDRESS}:80-cmd:{relay}"
    ))
}

pub(super) fn add(all: &mut Vec<OsString>, arguments: &[&str]) {
    all.extend(arguments.iter().map(OsString::from));
}
