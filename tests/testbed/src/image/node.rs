//! The image of a node: a small Debian that runs from memory.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use super::{add_busybox_commands, add_modules, add_packages};
use crate::agent;
use crate::cache::{self, Key};
use crate::error::{Context, Result};
use crate::kernel::{Kernel, KernelFlavor};
use crate::packages::Set;
use crate::tree::{Node, Tree};

/// What a node has besides busybox. The last two are for dynamically linked programs that tests
/// bring along.
const PACKAGES: [&str; 12] = [
    "busybox-static",
    // busybox's own shell prefers its `ip` to the real one.
    "dash",
    "kmod",
    "iproute2",
    "iputils-ping",
    "iperf3",
    "curl",
    "ethtool",
    "e2fsprogs",
    "util-linux",
    "libc6",
    "libgcc-s1",
];

/// Modules of every node.
const MODULES: [&str; 62] = [
    // The provider's devices.
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_scsi",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "nvme",
    "vmxnet3",
    "vmw_pvscsi",
    "sd_mod",
    "button",
    "qemu_fw_cfg",
    "xen_netfront",
    "xen_blkfront",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xen_privcmd",
    "xenfs",
    // KVM and its helpers.
    "kvm",
    "kvm_amd",
    "kvm_intel",
    "vhost_net",
    "vhost_vsock",
    "msr",
    "cpuid",
    // Networking.
    "tun",
    "tap",
    "macvtap",
    "macvlan",
    "bridge",
    "br_netfilter",
    "veth",
    "dummy",
    "ifb",
    "8021q",
    "vxlan",
    "geneve",
    "wireguard",
    "openvswitch",
    "af_packet",
    "sch_netem",
    "sch_tbf",
    "sch_htb",
    "sch_ingress",
    "cls_u32",
    "cls_matchall",
    "act_mirred",
    "act_police",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_masq",
    "nf_conntrack",
    // File systems and block devices.
    "ext4",
    "overlay",
    "squashfs",
    "loop",
    "nbd",
    "zram",
];

/// Modules that only the generic kernel has, or that the other has built in.
const METAL_MODULES: [&str; 5] = ["e1000e", "igb", "ixgbe", "ahci", "crc32c_generic"];

const INIT: &str = include_str!("node-init.sh");
const RC: &str = include_str!("node-rc.sh");
const AGENT: &str = include_str!("node-agent.sh");

/// Started by busybox's init, which also buries what other processes leave behind.
const INITTAB: &str = "::respawn:/usr/sbin/testbed-agent\n::respawn:/usr/bin/blanket-agent nudge\n\
                       ::ctrlaltdel:/usr/bin/poweroff -f\n";

/// Builds the node image for a kernel, unless it is there.
pub(crate) fn node(flavor: KernelFlavor, kernel: &Kernel) -> Result<PathBuf> {
    let packages = Set::closure(&PACKAGES)?;
    let agent = agent::program()?;
    let key = Key::default()
        .with(packages.identity())
        .with(kernel.identity())
        .with_file(&agent)?
        .with([INIT, RC, AGENT, INITTAB].concat())
        .with(include_bytes!("node.rs"))
        .with(include_bytes!("mod.rs"));
    let folder = cache::entry("node-image", key, |folder| {
        let mut tree = Tree::new();
        add_packages(&mut tree, &packages)?;
        let scratch = tempfile::tempdir_in(folder).context(|| "cannot make a folder".to_owned())?;
        let metal: &[&str] = if flavor == KernelFlavor::Generic {
            &METAL_MODULES
        } else {
            &[]
        };
        add_modules(
            &mut tree,
            kernel,
            &[&MODULES, metal].concat(),
            scratch.path(),
        )?;
        add_busybox_commands(&mut tree, scratch.path())?;
        tree.host_file("usr/bin/blanket-agent", &agent)?;
        tree.file("init", 0o755, INIT);
        tree.file("usr/sbin/testbed-rc", 0o755, RC);
        tree.file("usr/sbin/testbed-agent", 0o755, AGENT);
        tree.file("etc/inittab", 0o644, INITTAB);
        tree.file(
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        );
        tree.file(
            "etc/group",
            0o644,
            "root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n",
        );
        tree.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
        tree.file("etc/nsswitch.conf", 0o644, "hosts: files\n");
        tree.insert("tmp", 0o1777, Node::Folder);
        tree.insert("payload", 0o755, Node::Folder);
        tree.insert("newroot", 0o755, Node::Folder);
        write(&tree, &folder.join("node.cpio"))
    })?;
    Ok(folder.join("node.cpio"))
}

fn write(tree: &Tree, path: &std::path::Path) -> Result<()> {
    File::create(path)
        .and_then(|file| tree.write_cpio(BufWriter::new(file)))
        .context(|| format!("cannot write {}", path.display()))
}
