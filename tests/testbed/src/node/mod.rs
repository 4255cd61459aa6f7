//! Provider machines.

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blanket_testbed_agent::client::Client;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::hardware::{Hardware, Smbios};
use crate::kernel::KernelFlavor;
use crate::metadata::Metadata;
use crate::network::Network;
use crate::packages;
use crate::payload::Payload;
use crate::provider::{Profile, Provider};
use crate::qemu::{Qemu, RunFolder, Watchdog};
use log::{keep_log, keep_state};

mod log;
mod machine;
mod xen;

/// Host packages that nodes need.
const HOST_PACKAGES: [&str; 3] = ["qemu-system-x86", "seabios", "e2fsprogs"];

/// Time for an orderly end.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// The address of a provider's card that is on no network of the test's.
const OWN_ADDRESS: &str = "10.0.0.10/24";

/// A network card.
struct Nic {
    /// The last bytes of its address.
    number: u16,
    /// None but the provider's own if `None`.
    network: Option<Network>,
    /// With the length of its prefix; none if empty.
    address: String,
}

impl Nic {
    fn new(network: Option<&Network>, address: &str) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            network: network.cloned(),
            address: address.to_owned(),
        }
    }
}

/// Describes a node, then boots it.
#[must_use = "nothing happens until it is booted"]
pub struct NodeBuilder {
    name: String,
    cpus: u8,
    memory_mib: u32,
    provider: Option<Provider>,
    profile: Profile,
    kernel: Option<KernelFlavor>,
    disks: Vec<Disk>,
    nics: Vec<Nic>,
    payloads: Vec<Payload>,
    injected: Vec<(PathBuf, String)>,
    beside: Option<(PathBuf, String)>,
    boot_limit: Duration,
    time_limit: Duration,
}

impl NodeBuilder {
    /// Sets the number of processors: 1 otherwise, which boots fastest.
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the memory in MiB: 1024 otherwise. The node's files are in it too.
    pub fn memory_mib(mut self, memory: u32) -> Self {
        self.memory_mib = memory;
        self
    }

    /// Makes it a machine of this provider: its devices, its firmware's and its processor's
    /// words, its network's MTU and its metadata service. A node without network cards gets one.
    ///
    /// The service is reached through the first card, if that has an address.
    pub fn provider(mut self, provider: Provider) -> Self {
        self.provider = Some(provider);
        self.profile = provider.profile();
        self
    }

    /// Sets the provider's devices: virtio otherwise.
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.profile.hardware = hardware;
        self
    }

    /// Sets the kernel: the fastest that has the drivers otherwise.
    pub fn kernel(mut self, flavor: KernelFlavor) -> Self {
        self.kernel = Some(flavor);
        self
    }

    /// Sets what the firmware says about the machine.
    pub fn smbios(mut self, smbios: Smbios) -> Self {
        self.profile.smbios = smbios;
        self
    }

    /// Adds a disk of the provider's kind.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card of the provider's kind, plugged into the network under the node's
    /// name. It is up, without an address.
    pub fn nic(mut self, network: &Network) -> Self {
        self.nics.push(Nic::new(Some(network), ""));
        self
    }

    /// Adds a network card like [`NodeBuilder::nic`], with an address such as `10.0.0.1/24`.
    pub fn nic_with_address(mut self, network: &Network, address: &str) -> Self {
        self.nics.push(Nic::new(Some(network), address));
        self
    }

    /// Adds a payload, on a virtio disk whatever the provider's kind is.
    pub fn payload(mut self, payload: &Payload) -> Self {
        self.payloads.push(payload.clone());
        self
    }

    /// Puts a file of the host, such as a program just built, into the node under this path,
    /// with its permission bits. It is there from the start and costs next to nothing.
    pub fn inject(mut self, file: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        self.injected.push((file.into(), path.into()));
        self
    }

    /// Runs a shell script in the control domain of a real Xen, beside the node, with a program
    /// of the host's in `/usr/bin`. [`Node::console`] has what it prints. Without effect on nodes
    /// that are not Xen's.
    pub fn beside(mut self, program: impl Into<PathBuf>, script: impl Into<String>) -> Self {
        self.beside = Some((program.into(), script.into()));
        self
    }

    /// Sets how long the node may take until it answers: 180 seconds otherwise.
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// Sets how long the node may live: 20 minutes otherwise. Then it is killed, and whatever
    /// waits for it fails.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Boots the node and waits until it takes commands. Images that are missing are built
    /// first, which takes a minute once.
    ///
    /// # Errors
    /// [`Error::Node`] with the path of its console output when it does not come up in time,
    /// and the errors of building images.
    pub fn boot(mut self) -> Result<Node> {
        packages::ensure_packages(&HOST_PACKAGES)?;
        if self.provider.is_some() && self.nics.is_empty() {
            self.nics.push(Nic::new(None, OWN_ADDRESS));
        }
        let folder = RunFolder::new()?;
        let machine = self.machine(&folder)?;
        let start = Instant::now();
        let qemu = Arc::new(Qemu::start(&folder, &machine.arguments)?);
        let connected = qemu
            .connect(&folder.socket("agent.sock"), start + self.boot_limit)
            .map_err(|error| error.to_string())
            .and_then(|socket| {
                Client::connect_socket(socket, self.boot_limit).map_err(|error| error.to_string())
            });
        let agent = match connected {
            Ok(agent) => agent,
            Err(problem) => {
                let log = keep_log(&folder, &self.name)?;
                let problem = format!("did not come up: {problem}");
                return Err(Error::Node {
                    node: self.name,
                    problem,
                    log,
                });
            }
        };
        let (of_watchdog, name, limit) = (Arc::clone(&qemu), self.name.clone(), self.time_limit);
        let watchdog = Watchdog::new(limit, move || {
            eprintln!("testbed: node `{name}` has lived for {limit:?} and is killed");
            of_watchdog.kill();
        });
        Ok(Node {
            name: self.name,
            cpus: self.cpus,
            agent,
            boot_time: start.elapsed(),
            qemu,
            folder,
            metadata: machine.metadata,
            _networks: self
                .nics
                .into_iter()
                .filter_map(|nic| nic.network)
                .collect(),
            _watchdog: watchdog,
        })
    }
}

/// A provider's machine that runs. It is also the [`Client`] of its command channel.
///
/// It is killed when this is dropped; if the test fails, its console output is kept under
/// `target/testbed/logs`.
pub struct Node {
    name: String,
    cpus: u8,
    agent: Client,
    boot_time: Duration,
    metadata: Option<Metadata>,
    _watchdog: Watchdog,
    /// The switches work as long as something refers to them.
    _networks: Vec<Network>,
    qemu: Arc<Qemu>,
    folder: RunFolder,
}

impl Node {
    /// Describes a node. Its name is its host name too.
    pub fn builder(name: impl Into<String>) -> NodeBuilder {
        NodeBuilder {
            name: name.into(),
            cpus: 1,
            memory_mib: 1024,
            provider: None,
            profile: Profile::default(),
            kernel: None,
            disks: Vec::new(),
            nics: Vec::new(),
            payloads: Vec::new(),
            injected: Vec::new(),
            beside: None,
            boot_limit: Duration::from_secs(180),
            time_limit: Duration::from_secs(20 * 60),
        }
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How long it took from the start of QEMU until the node took commands.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// What the node has written on its serial console so far.
    pub fn console(&self) -> String {
        fs::read(self.folder.path().join("console.log"))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The provider's metadata service, if it has one.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// Whether the machine still runs.
    pub fn is_running(&self) -> bool {
        self.qemu.exited().is_none()
    }

    /// Ends the machine in an orderly way: file systems are written back.
    ///
    /// # Errors
    /// [`Error::Node`] when it has not ended after a minute; it is killed then.
    pub fn shutdown(self) -> Result<()> {
        self.agent.sh("sync; exec poweroff -f").spawn("/dev/null")?;
        if self.qemu.wait(SHUTDOWN).is_some() {
            return Ok(());
        }
        let log = keep_log(&self.folder, &self.name)?;
        let problem = format!("did not end within {SHUTDOWN:?}");
        Err(Error::Node {
            node: self.name.clone(),
            problem,
            log,
        })
    }
}

impl Deref for Node {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.agent
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            keep_state(&self.folder, self.cpus);
        }
        self.qemu.kill();
        if let Some(metadata) = &self.metadata {
            metadata.end(&self.folder.socket("metadata.sock"));
        }
        if thread::panicking() {
            match keep_log(&self.folder, &self.name) {
                Ok(log) => eprintln!("testbed: console of `{}`: {}", self.name, log.display()),
                Err(error) => eprintln!("testbed: console of `{}` is lost: {error}", self.name),
            }
        }
    }
}
