//! This machine itself as a place for guests: its own kernel and its own `/dev/kvm`.

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blanket_testbed_agent::client::Client;

use crate::agent;
use crate::cleanup;
use crate::error::{Context, Result};
use crate::packages;
use crate::payload;
use crate::qemu::RunFolder;

/// Host packages that build the enclosure, and that tests use in it as on a node.
const HOST_PACKAGES: [&str; 8] = [
    "iproute2",
    "mount",
    "util-linux",
    "ethtool",
    "curl",
    "iperf3",
    "iputils-ping",
    "tcpreplay",
];

/// Time until the enclosure takes commands.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes the enclosure's root of this machine's, then serves the agent. The shell stays, as the
/// first process: it waits for whatever loses its parent.
///
/// Disks that are measured go to `/srv`, which is no overlay: of an overlay's files, Linux does
/// not say at once whether it would have to wait, so that each request of an `io_uring` takes
/// another thread.
const ENTER: &str = r#"set -e
cd "$1"
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p var/lib/blanket left
mount -t tmpfs tmpfs var/lib/blanket
mkdir -p srv
mount --bind ../srv srv
hostname "$2"
pivot_root . left
cd /
umount -l /left
ip link set lo up
HOME=/root blanket-agent serve -
true
"#;

/// Describes an enclosure on this machine, then opens it.
#[must_use = "nothing happens until it is opened"]
pub struct HostBuilder {
    name: String,
    injected: Vec<(PathBuf, String)>,
}

impl HostBuilder {
    /// Puts a copy of a file, such as a program just built or a disk, under this path.
    pub fn inject(mut self, file: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.injected.push((file.into(), path.into()));
        self
    }

    /// Opens it.
    ///
    /// # Errors
    /// When this machine has no overlay file system or no namespaces, or a file cannot be
    /// copied.
    pub fn open(self) -> Result<Host> {
        packages::ensure_packages(&HOST_PACKAGES)?;
        let folder = RunFolder::new()?;
        for name in ["upper", "work", "root", "srv"] {
            payload::subfolder(folder.path(), name)?;
        }
        let upper = folder.path().join("upper");
        let agent = (agent::program()?, "/usr/bin/blanket-agent".to_owned());
        for (file, path) in self.injected.iter().chain([&agent]) {
            let target = upper.join(path.trim_start_matches('/'));
            let parent = target.parent().unwrap_or(&upper);
            fs::create_dir_all(parent).context(|| format!("cannot make {}", parent.display()))?;
            payload::copy(file, &target)?;
        }
        let mut enclosure = Enclosure::start(&folder, &self.name)?;
        let (input, output) = enclosure.streams()?;
        let agent = Client::connect(output, input, LIMIT)?;
        Ok(Host {
            agent,
            _enclosure: enclosure,
            _folder: folder,
        })
    }
}

/// Namespaces on this machine in which programs run as on a node of their own, but natively:
/// with this machine's `/dev/kvm`, its file system (what is written is gone in the end), and a
/// network of their own. It is also the [`Client`] of the agent in it.
///
/// When this is dropped, or its process ends, everything in it is killed.
pub struct Host {
    agent: Client,
    _enclosure: Enclosure,
    _folder: RunFolder,
}

impl Host {
    /// Describes an enclosure.
    pub fn builder(name: impl Into<String>) -> HostBuilder {
        HostBuilder {
            name: name.into(),
            injected: Vec::new(),
        }
    }

    /// Why guests cannot run natively on this machine, if they cannot.
    pub fn obstacle() -> Option<String> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            return Some(format!("/dev/kvm cannot be used: {error}"));
        }
        if !rustix::process::geteuid().is_root() {
            return Some("namespaces for native guests need root".to_owned());
        }
        None
    }
}

impl Deref for Host {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.agent
    }
}

/// The first process of the namespaces. All others end with it.
struct Enclosure(Child);

impl Enclosure {
    fn start(folder: &RunFolder, name: &str) -> Result<Self> {
        let child = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--uts", "--fork"])
            .args(["--kill-child=KILL", "sh", "-c", ENTER, "enter"])
            .arg(folder.path())
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| "cannot run unshare".to_owned())?;
        cleanup::process_started(child.id());
        Ok(Self(child))
    }

    fn streams(&mut self) -> Result<(std::process::ChildStdin, std::process::ChildStdout)> {
        let streams = self.0.stdin.take().zip(self.0.stdout.take());
        streams
            .ok_or_else(|| std::io::Error::other("it has no standard streams"))
            .context(|| "cannot talk to unshare".to_owned())
    }
}

impl Drop for Enclosure {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        cleanup::process_ended(self.0.id());
        let _ = self.0.wait();
    }
}
