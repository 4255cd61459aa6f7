//! Nodes that are guests of a real Xen: QEMU's machine runs Xen with Debian as its host domain,
//! which starts the node and hands it the machine's disks and network cards.

use std::ffi::OsString;
use std::fs;
use std::io::BufWriter;

use super::NodeBuilder;
use super::machine::{Card, add};
use crate::disk::Disk;
use crate::error::{Context, Result};
use crate::hardware::Hardware;
use crate::image::XenHost;
use crate::qemu::RunFolder;
use crate::tree::Tree;

/// Memory of the host domain, in MiB. The node's image is in it while the node is built.
const HOST_MIB: u32 = 896;

/// Xen's own memory, in MiB.
const XEN_MIB: u32 = 256;

/// Xen prints its messages, and those of the node's kernel, on the serial port.
const XEN_OPTIONS: &str = "xen console=com1 com1=115200,8n1 dom0_max_vcpus=1 loglvl=warning \
                           guest_loglvl=all";

const HOST_KERNEL_OPTIONS: &str = "console=hvc0 quiet panic=-1 mitigations=off";

/// The kernel prints by way of Xen, since the console belongs to the agent.
const NODE_KERNEL_OPTIONS: &str = "console=tty0 earlyprintk=xen,keep quiet panic=-1 \
     mitigations=off nokaslr random.trust_cpu=1";

/// What is needed besides the node's memory, in MiB.
pub(super) fn own_memory_mib(hardware: Hardware) -> u32 {
    if hardware.is_xen() {
        HOST_MIB + XEN_MIB
    } else {
        0
    }
}

/// The address of one of the host's network cards. It is on a bridge with the node's.
pub(super) fn host_mac(index: usize) -> String {
    format!("02:00:00:00:00:{:02x}", index + 1)
}

impl NodeBuilder {
    pub(super) fn boot_below_xen(
        &self,
        all: &mut Vec<OsString>,
        cards: &[Card],
        folder: &RunFolder,
    ) -> Result<()> {
        let host = XenHost::get()?;
        let (kernel, initrd) = self.images(folder)?;
        // The host domain reads the node's kernel and image from disks behind the node's own.
        let first = self.disks.len() + self.payloads.len();
        for (index, file) in [kernel.vmlinux(), initrd].iter().enumerate() {
            let disk = Disk::read_only(file).serial(["node-kernel", "node-initrd"][index]);
            let (drive, device) = disk.arguments("virtio-blk-pci", first + index);
            add(all, &["-drive", &drive, "-device", &device]);
        }
        let mut tree = Tree::default();
        tree.file("etc/xen/node.cfg", 0o644, self.domain(cards));
        if let Some((program, script)) = &self.beside {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            tree.host_file(&format!("usr/bin/{name}"), program)?;
            let script = format!("#!/usr/bin/busybox sh\n{script}\n");
            tree.file("etc/xen/beside", 0o755, script);
        }
        let initrd = folder.path().join("host.cpio");
        fs::copy(&host.initrd, &initrd)
            .and_then(|_| fs::File::options().append(true).open(&initrd))
            .and_then(|file| tree.write_cpio(BufWriter::new(file)))
            .context(|| format!("cannot write {}", initrd.display()))?;
        let bridges = (0..cards.len()).map(host_mac).collect::<Vec<_>>().join(",");
        let options = format!("{XEN_OPTIONS} dom0_mem={HOST_MIB}M,max:{HOST_MIB}M");
        add(all, &["-append", &options]);
        all.extend(["-kernel".into(), host.hypervisor.into()]);
        // Multiboot modules are separated by commas, and followed by their options.
        let modules = format!(
            "{} {HOST_KERNEL_OPTIONS} blanket.bridges={},host.cpio",
            host.kernel.display().to_string().replace(',', ",,"),
            bridges.replace(',', ",,"),
        );
        add(all, &["-initrd", &modules]);
        Ok(())
    }

    /// The node in the form that `xl create` takes (xl.cfg(5)).
    fn domain(&self, cards: &[Card]) -> String {
        let list = |items: Vec<String>| format!("[{}]", items.join(", "));
        let letters = || ('a'..='z').map(|letter| letter.to_string());
        let count = self.disks.len() + self.payloads.len();
        let disks = letters().take(count).map(|letter| {
            format!("\"format=raw,vdev=xvd{letter},backendtype=phy,target=/dev/vd{letter}\"")
        });
        let cards_of_node = cards
            .iter()
            .enumerate()
            .map(|(index, card)| format!("\"type=vif,bridge=br{index},mac={}\"", card.mac));
        let payloads: String = self
            .payloads
            .iter()
            .zip(letters().skip(self.disks.len()))
            .map(|(payload, letter)| format!(" blanket.payload=xvd{letter}={}", payload.name()))
            .collect();
        let options = format!(
            "{NODE_KERNEL_OPTIONS} {}{payloads}",
            self.surroundings(cards)
        );
        let smbios = &self.profile.smbios;
        let nested = u8::from(self.profile.hardware == Hardware::XenNested);
        let uuid = smbios.uuid.as_ref();
        let uuid = uuid.map_or(String::new(), |uuid| format!("uuid = \"{uuid}\"\n"));
        format!(
            "name = \"node\"\ntype = \"pvh\"\nnestedhvm = {nested}\n{uuid}memory = {}\nvcpus = {}\ntsc_mode = \"native\"\n\
             kernel = \"/run/node-kernel\"\nramdisk = \"/run/node-initrd\"\n\
             cmdline = \"{options}\"\ndisk = {}\nvif = {}\n\
             on_poweroff = \"destroy\"\non_reboot = \"destroy\"\non_crash = \"destroy\"\n",
            self.memory_mib,
            self.cpus,
            list(disks.collect()),
            list(cards_of_node.collect()),
        )
    }
}
