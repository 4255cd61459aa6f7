//! What guests on nodes boot: a kernel, an initramfs and a disk.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{add_busybox_commands, add_modules, add_packages};
use crate::agent;
use crate::cache::{self, Key};
use crate::error::{Context, Result};
use crate::kernel::{Kernel, KernelFlavor};
use crate::packages::{self, Set};
use crate::payload::{self, Payload};
use crate::program;
use crate::tree::Tree;

/// Host packages that build the disk.
const HOST_PACKAGES: [&str; 3] = ["mmdebstrap", "e2fsprogs", "fakeroot"];

/// What the disk has besides Debian's minimum.
const DISK_PACKAGES: [&str; 8] = [
    "systemd-sysv",
    "udev",
    "acpid",
    "kmod",
    "iproute2",
    "iperf3",
    "lighttpd",
    "iputils-ping",
];

/// Stands for Debian's minimum in the key of the disk.
const MINIMUM: [&str; 6] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dpkg",
    "util-linux",
];

/// Free space on the disk, in MiB.
const DISK_ROOM_MIB: u64 = 64;

/// Drivers of the devices that a guest may have.
const MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_scsi",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "xen_blkfront",
    "xen_netfront",
    "ext4",
    "af_packet",
    "button",
    "evdev",
    // A disk that does nothing, to compare others with.
    "null_blk",
];

const INIT: &str = include_str!("guest-init.sh");
const NET: &str = include_str!("guest-net.sh");
const INITTAB: &str = "::respawn:/usr/bin/blanket-agent serve /dev/hvc0\n\
                       ::once:/usr/bin/acpid -f -c /etc/acpi -M /etc/acpi/map -l /dev/null\n\
                       ::shutdown:/usr/bin/sync\n";

/// The page that the disk's web server has at `/`.
pub const GUEST_PAGE: &str = "Hello from a guest of Blanket\n";

/// Debian's own configuration runs Perl, which takes ten seconds under emulation.
const WEB_SERVER: &str = "server.document-root = \"/var/www/html\"\nserver.port = 80\n\
     index-file.names = (\"index.html\")\nmimetype.assign = (\".html\" => \"text/html\")\n";

/// The agent on the disk.
const AGENT_UNIT: &str = "[Unit]\nDescription=Testbed command channel\nDefaultDependencies=no\n\
     After=systemd-remount-fs.service\nConflicts=shutdown.target\nBefore=shutdown.target\n\
     StartLimitIntervalSec=0\n\
     [Service]\nExecStart=/usr/bin/blanket-agent serve /dev/hvc0\nRestart=always\n";

const NET_UNIT: &str = "[Unit]\nDescription=Addresses from the kernel command line\n\
     DefaultDependencies=no\nBefore=network.target\n\
     [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/sbin/testbed-net\n";

/// Units that do nothing in a guest but take seconds under emulation.
const MASKED: [&str; 14] = [
    // The console is the agent's.
    "serial-getty@hvc0.service",
    "getty-static.service",
    "e2scrub_reap.service",
    "e2scrub_all.timer",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "systemd-pstore.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "modprobe@.service",
    "kmod-static-nodes.service",
];

/// What a guest boots. The files lie on the host.
#[derive(Clone, Debug)]
pub struct GuestImages {
    /// The compressed kernel (bzImage).
    pub vmlinuz: PathBuf,
    /// The same kernel as an ELF with a PVH entry.
    pub vmlinux: PathBuf,
    /// The initramfs. With `root=DEVICE`, `root=LABEL=NAME` or `root=UUID=ID` on the command line
    /// it mounts this and starts its `/sbin/init`; otherwise it serves the agent itself. `blanket.ip=ADDRESS/BITS` and
    /// `blanket.gw=ADDRESS` on the command line configure the first network card.
    pub initrd: PathBuf,
    /// A raw ext4 image, labelled `guest`, with a Debian: systemd, a web server on port 80, iperf3, and the agent
    /// on `/dev/hvc0`. It powers off when the power button is pressed.
    pub disk: PathBuf,
}

impl GuestImages {
    /// Builds the images that are not there.
    ///
    /// # Errors
    /// When packages cannot be downloaded, or a program that builds an image fails.
    pub fn get() -> Result<Self> {
        let kernel = Kernel::get(KernelFlavor::Cloud)?;
        Ok(Self {
            vmlinuz: kernel.vmlinuz(),
            vmlinux: kernel.vmlinux(),
            initrd: initrd(&kernel)?,
            disk: disk(&kernel)?,
        })
    }

    /// The files with their names in [`GuestImages::payload`].
    pub fn files(&self) -> [(&Path, &'static str); 4] {
        [
            (&self.vmlinuz, "vmlinuz"),
            (&self.vmlinux, "vmlinux"),
            (&self.initrd, "initrd.cpio"),
            (&self.disk, "disk.raw"),
        ]
    }

    /// The images as a payload for nodes, under the names `vmlinuz`, `vmlinux`, `initrd.cpio`
    /// and `disk.raw`.
    ///
    /// # Errors
    /// When the payload's file system cannot be made.
    pub fn payload(&self) -> Result<Payload> {
        let files = self.files();
        // The paths name the hashes of their contents.
        let key = files.iter().fold(Key::default(), |key, (path, _)| {
            key.with(path.as_os_str().as_encoded_bytes())
        });
        let key = key.with(include_bytes!("../payload.rs"));
        let folder = cache::entry("guest-payload", key, |folder| {
            let staged = payload::subfolder(folder, "files")?;
            for (path, name) in files {
                payload::copy(path, &staged.join(name))?;
            }
            payload::make(&staged, &folder.join("guest.ext4"))?;
            fs::remove_dir_all(&staged).context(|| format!("cannot remove {}", staged.display()))
        })?;
        Ok(Payload::new("guest", folder.join("guest.ext4")))
    }
}

/// Another kernel with an initramfs as that of [`GuestImages`].
#[derive(Clone, Debug)]
pub struct BootImages {
    /// The compressed kernel (bzImage).
    pub vmlinuz: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// What `uname -r` says.
    pub release: String,
}

impl BootImages {
    /// Builds the images that are not there.
    ///
    /// # Errors
    /// When the packages cannot be downloaded (there may be none), or a program that builds an
    /// image fails.
    pub fn get(flavor: KernelFlavor) -> Result<Self> {
        let kernel = Kernel::get(flavor)?;
        Ok(Self {
            vmlinuz: kernel.vmlinuz(),
            initrd: initrd(&kernel)?,
            release: kernel.release().to_owned(),
        })
    }
}

fn initrd(kernel: &Kernel) -> Result<PathBuf> {
    let packages = Set::closure(&["busybox-static"])?;
    let agent = agent::program()?;
    let check = agent::guest_check()?;
    let key = Key::default()
        .with(packages.identity())
        .with(kernel.identity())
        .with_file(&agent)?
        .with_file(&check)?
        .with([INIT, NET, INITTAB].concat())
        .with(include_bytes!("guest.rs"))
        .with(include_bytes!("mod.rs"));
    let folder = cache::entry("guest-initrd", key, |folder| {
        let mut tree = Tree::new();
        add_packages(&mut tree, &packages)?;
        let scratch = tempfile::tempdir_in(folder).context(|| "cannot make a folder".to_owned())?;
        add_modules(&mut tree, kernel, &MODULES, scratch.path())?;
        add_busybox_commands(&mut tree, scratch.path())?;
        // Where Linux looks for it when Xen asks for a shutdown.
        tree.link("usr/sbin/poweroff", "../bin/busybox");
        tree.host_file("usr/bin/blanket-agent", &agent)?;
        tree.host_file("usr/bin/guest-check", &check)?;
        tree.file("init", 0o755, INIT);
        tree.file("usr/sbin/testbed-net", 0o755, NET);
        tree.file("etc/inittab", 0o644, INITTAB);
        tree.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
        tree.file(
            "etc/acpi/PWRF/00000080",
            0o755,
            "#!/usr/bin/busybox sh\npoweroff\n",
        );
        let path = folder.join("initrd.cpio");
        File::create(&path)
            .and_then(|file| tree.write_cpio(BufWriter::new(file)))
            .context(|| format!("cannot write {}", path.display()))
    })?;
    Ok(folder.join("initrd.cpio"))
}

fn disk(kernel: &Kernel) -> Result<PathBuf> {
    packages::ensure_packages(&HOST_PACKAGES)?;
    let packages = Set::closure(&[&DISK_PACKAGES[..], &MINIMUM].concat())?;
    let agent = agent::program()?;
    let key = Key::default()
        .with(packages.identity())
        .with(kernel.identity())
        .with_file(&agent)?
        .with([NET, AGENT_UNIT, NET_UNIT, GUEST_PAGE].concat())
        .with(include_bytes!("guest.rs"))
        .with(include_bytes!("../payload.rs"));
    let folder = cache::entry("guest-disk", key, |folder| {
        let archive = folder.join("root.tar");
        bootstrap(&archive)?;
        let scratch = payload::subfolder(folder, "modules")?;
        let tree = additions(kernel, &agent, &scratch)?;
        let added = payload::subfolder(folder, "added")?;
        tree.write_folder(&added)?;
        make_disk(folder)
    })?;
    Ok(folder.join("disk.raw"))
}

/// Makes a Debian root file system, as a tar archive, from the machine's own package sources.
fn bootstrap(archive: &Path) -> Result<()> {
    let targets = ["Created-By: Packages", "Origin: Debian"];
    let sources = program::run(
        Command::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
            ])
            .args(targets),
    )?;
    let sources = String::from_utf8_lossy(&sources).into_owned();
    let suite = sources
        .split_whitespace()
        .nth(2)
        .unwrap_or("stable")
        .to_owned();
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase", "--skip=output/dev"]);
    command.arg(format!("--include={}", DISK_PACKAGES.join(",")));
    for unused in [
        "/usr/share/man/*",
        "/usr/share/doc/*",
        "/usr/share/locale/*",
    ] {
        command.arg(format!("--dpkgopt=path-exclude={unused}"));
    }
    // A person at the serial console needs no password.
    command.arg(r#"--customize-hook=chroot "$1" passwd -d root"#);
    command.arg(r#"--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*"#);
    command.arg(suite).arg(archive).args(sources.lines());
    program::run(&mut command).map(drop)
}

/// What the testbed adds to the Debian on the disk.
fn additions(kernel: &Kernel, agent: &Path, scratch: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    add_modules(&mut tree, kernel, &MODULES, scratch)?;
    tree.host_file("usr/bin/blanket-agent", agent)?;
    tree.file("usr/sbin/testbed-net", 0o755, NET);
    tree.file("var/www/html/index.html", 0o644, GUEST_PAGE);
    tree.file("etc/lighttpd/lighttpd.conf", 0o644, WEB_SERVER);
    tree.file("etc/hostname", 0o644, "guest\n");
    tree.file(
        "etc/hosts",
        0o644,
        "127.0.0.1 localhost guest\n::1 localhost\n",
    );
    tree.file("etc/fstab", 0o644, "");
    tree.file(
        "etc/acpi/events/powerbtn",
        0o644,
        "event=button[ /]power\naction=/sbin/poweroff\n",
    );
    let units = "etc/systemd/system";
    // Early, so that commands can be run while the rest still starts.
    for (name, text) in [("testbed-agent", AGENT_UNIT), ("testbed-net", NET_UNIT)] {
        tree.file(&format!("{units}/{name}.service"), 0o644, text);
        let wanted = format!("{units}/sysinit.target.wants/{name}.service");
        tree.link(&wanted, &format!("../{name}.service"));
    }
    for unit in MASKED {
        tree.link(&format!("{units}/{unit}"), "/dev/null");
    }
    Ok(tree)
}

/// Makes the disk of `root.tar` and `added` in the folder. Unless this is root, `fakeroot`
/// remembers the owners of the files on their way into the image.
fn make_disk(folder: &Path) -> Result<()> {
    let script = format!(
        "set -e; mkdir root; tar -xpf root.tar -C root --exclude=./dev/*; \
         mkdir -p root/dev root/proc root/sys; chown -R 0:0 added; cp -a added/. root/; \
         size=$(du -s -m --apparent-size root | cut -f1); \
         mke2fs -q -t ext4 -m 0 -L guest -d root disk.raw $((size * 5 / 4 + {DISK_ROOM_MIB}))M; \
         rm -rf root added modules root.tar"
    );
    let root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if root { "sh" } else { "fakeroot" });
    if !root {
        command.arg("sh");
    }
    program::run(command.current_dir(folder).arg("-c").arg(script)).map(drop)
}
