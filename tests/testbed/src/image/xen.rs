//! A real Xen: the hypervisor, and the image of its host domain.

use std::fs::{self, File};
use std::io::{BufWriter, Read};
use std::path::{Path, PathBuf};

use super::{add_busybox_commands, add_modules, add_packages};
use crate::agent;
use crate::cache::{self, Key};
use crate::error::{Context, Result, malformed};
use crate::kernel::{Kernel, KernelFlavor};
use crate::packages::{Set, Source};
use crate::tree::Tree;

const HYPERVISOR: &str = "xen-hypervisor-4.17-amd64";

/// Where the hypervisor is in its package.
const HYPERVISOR_FILE: &str = "boot/xen-4.17-amd64.gz";

/// Xen's programs. Without the packages that they depend on: those are Python and what its
/// start scripts need.
const PROGRAMS: [&str; 1] = ["xen-utils-4.17"];

/// Libraries of Xen's programs, and what a small Debian needs.
const PACKAGES: [&str; 8] = [
    "busybox-static",
    "kmod",
    "iproute2",
    "libxenmisc4.17",
    "xenstore-utils",
    "libncurses6",
    "libc6",
    "libgcc-s1",
];

const MODULES: [&str; 15] = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xen_privcmd",
    "xenfs",
    "xen_netback",
    "xen_blkback",
    "bridge",
    "tun",
    "af_packet",
];

const INIT: &str = include_str!("xen-init.sh");
const BLOCK: &str = include_str!("xen-block.sh");
const VIF: &str = include_str!("xen-vif.sh");

/// What a machine with Xen boots.
#[derive(Clone, Debug)]
pub(crate) struct XenHost {
    /// A multiboot image.
    pub(crate) hypervisor: PathBuf,
    /// The host domain's kernel.
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

impl XenHost {
    /// Builds what is not there.
    pub(crate) fn get() -> Result<Self> {
        let kernel = Kernel::get(KernelFlavor::Generic)?;
        Ok(Self {
            hypervisor: hypervisor()?,
            kernel: kernel.vmlinux(),
            initrd: initrd(&kernel)?,
        })
    }
}

fn hypervisor() -> Result<PathBuf> {
    let package = Set::exactly(Source::Machine, &[HYPERVISOR])?;
    let key = Key::default()
        .with(package.identity())
        .with(include_bytes!("xen.rs"));
    let folder = cache::entry("xen", key, |folder| {
        let mut tree = Tree::default();
        for deb in package.download()? {
            tree.package(&deb, |path| path == HYPERVISOR_FILE)?;
        }
        let packed = folder.join("xen.gz");
        tree.extract(HYPERVISOR_FILE, &packed)?;
        unpack(&packed, &folder.join("xen"))
    })?;
    Ok(folder.join("xen"))
}

fn unpack(packed: &Path, to: &Path) -> Result<()> {
    let mut image = Vec::new();
    File::open(packed)
        .and_then(|file| flate2::read::GzDecoder::new(file).read_to_end(&mut image))
        .context(|| format!("cannot unpack {}", packed.display()))?;
    if image.is_empty() {
        return Err(malformed(packed, "is empty"));
    }
    fs::write(to, image).context(|| format!("cannot write {}", to.display()))
}

fn initrd(kernel: &Kernel) -> Result<PathBuf> {
    let programs = Set::exactly(Source::Machine, &PROGRAMS)?;
    let packages = Set::closure(&PACKAGES)?;
    let agent = agent::program()?;
    let key = Key::default()
        .with(programs.identity())
        .with(packages.identity())
        .with(kernel.identity())
        .with_file(&agent)?
        .with([INIT, BLOCK, VIF].concat())
        .with(include_bytes!("xen.rs"))
        .with(include_bytes!("mod.rs"));
    let folder = cache::entry("xen-host", key, |folder| {
        let mut tree = Tree::new();
        add_packages(&mut tree, &programs)?;
        add_packages(&mut tree, &packages)?;
        let scratch = tempfile::tempdir_in(folder).context(|| "cannot make a folder".to_owned())?;
        add_modules(&mut tree, kernel, &MODULES, scratch.path())?;
        add_busybox_commands(&mut tree, scratch.path())?;
        tree.host_file("usr/bin/blanket-agent", &agent)?;
        tree.file("init", 0o755, INIT);
        tree.file("etc/xen/xl.conf", 0o644, "");
        tree.file("etc/xen/scripts/block", 0o755, BLOCK);
        tree.file("etc/xen/scripts/vif-bridge", 0o755, VIF);
        tree.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
        tree.file("etc/group", 0o644, "root:x:0:\n");
        let path = folder.join("host.cpio");
        File::create(&path)
            .and_then(|file| tree.write_cpio(BufWriter::new(file)))
            .context(|| format!("cannot write {}", path.display()))
    })?;
    Ok(folder.join("host.cpio"))
}
