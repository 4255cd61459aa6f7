//! Provider machines.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blanket_testbed_agent::client::Client;

use crate::cache;
use crate::disk::Disk;
use crate::error::{Context, Error, Result};
use crate::hardware::{Hardware, Smbios};
use crate::image;
use crate::kernel::{Kernel, KernelFlavor};
use crate::network::Network;
use crate::packages;
use crate::payload::Payload;
use crate::qemu::{Accelerator, Qemu, RunFolder, Watchdog};
use crate::tree::Tree;

/// What a Linux under emulation can leave out. The clock options spare it calibrations that an
/// emulated timer fails, the random option a wait for entropy.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nokaslr \
                              tsc=reliable random.trust_cpu=1";

/// Host packages that nodes need.
const HOST_PACKAGES: [&str; 3] = ["qemu-system-x86", "seabios", "e2fsprogs"];

/// Time for an orderly end.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// A network card.
struct Nic {
    network: Network,
    mac: String,
    /// With the length of its prefix; none if empty.
    address: String,
}

impl Nic {
    fn new(network: &Network, address: &str) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mac = format!("52:54:00:00:{high:02x}:{low:02x}");
        Self {
            network: network.clone(),
            mac,
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
    hardware: Hardware,
    kernel: Option<KernelFlavor>,
    smbios: Smbios,
    disks: Vec<Disk>,
    nics: Vec<Nic>,
    payloads: Vec<Payload>,
    injected: Vec<(PathBuf, String)>,
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

    /// Sets the provider's devices: virtio otherwise.
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    /// Sets the kernel: the fastest that has the drivers otherwise.
    pub fn kernel(mut self, flavor: KernelFlavor) -> Self {
        self.kernel = Some(flavor);
        self
    }

    /// Sets what the firmware says about the machine.
    pub fn smbios(mut self, smbios: Smbios) -> Self {
        self.smbios = smbios;
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
        self.nics.push(Nic::new(network, ""));
        self
    }

    /// Adds a network card like [`NodeBuilder::nic`], with an address such as `10.0.0.1/24`.
    pub fn nic_with_address(mut self, network: &Network, address: &str) -> Self {
        self.nics.push(Nic::new(network, address));
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
    pub fn boot(self) -> Result<Node> {
        packages::ensure_packages(&HOST_PACKAGES)?;
        let folder = RunFolder::new()?;
        let arguments = self.arguments(&folder)?;
        let start = Instant::now();
        let qemu = Arc::new(Qemu::start(&folder, &arguments)?);
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
            _networks: self.nics.into_iter().map(|nic| nic.network).collect(),
            _watchdog: watchdog,
        })
    }

    fn arguments(&self, folder: &RunFolder) -> Result<Vec<OsString>> {
        let flavor = self.kernel.unwrap_or_else(|| self.hardware.kernel());
        let kernel = Kernel::get(flavor)?;
        let mut all = Vec::new();
        add(&mut all, &Accelerator::probe().arguments());
        add(
            &mut all,
            &[
                "-machine",
                "q35",
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
            ],
        );
        add(
            &mut all,
            &["-display", "none", "-serial", "file:console.log"],
        );
        let memory = format!("{}M", self.memory_mib);
        add(&mut all, &["-smp", &self.cpus.to_string(), "-m", &memory]);
        add(
            &mut all,
            &[
                "-chardev",
                "socket,id=agent,path=agent.sock,server=on,wait=off",
            ],
        );
        add(&mut all, &["-device", "virtio-serial-pci"]);
        add(
            &mut all,
            &["-device", "virtserialport,chardev=agent,name=blanket.agent"],
        );
        add(&mut all, &["-device", "virtio-rng-pci"]);
        add(
            &mut all,
            &["-monitor", "unix:monitor.sock,server=on,wait=off"],
        );
        for smbios in self.smbios.arguments() {
            add(&mut all, &["-smbios", &smbios]);
        }
        self.add_disks(&mut all);
        let addresses = self.add_nics(&mut all, folder)?;
        let disks = self.disks.len() + self.payloads.len();
        let own = format!(
            "blanket.name={} blanket.disks={disks}{addresses}",
            self.name
        );
        add(&mut all, &["-append", &format!("{KERNEL_OPTIONS} {own}")]);
        all.extend(["-kernel".into(), kernel.vmlinux().into()]);
        all.extend([
            "-initrd".into(),
            self.initrd(folder, flavor, &kernel)?.into(),
        ]);
        Ok(all)
    }

    fn add_disks(&self, all: &mut Vec<OsString>) {
        if let Some(controller) = self
            .hardware
            .disk_controller()
            .filter(|_| !self.disks.is_empty())
        {
            add(all, &["-device", controller]);
        }
        let disks = self
            .disks
            .iter()
            .map(|disk| (disk.clone(), self.hardware.disk()));
        let payloads = self
            .payloads
            .iter()
            .map(|payload| (payload.disk(), "virtio-blk-pci"));
        for (index, (disk, device)) in disks.chain(payloads).enumerate() {
            let (drive, device) = disk.arguments(device, index);
            add(all, &["-drive", &drive, "-device", &device]);
        }
    }

    /// Returns what tells the node its cards' addresses, on the kernel's command line.
    fn add_nics(&self, all: &mut Vec<OsString>, folder: &RunFolder) -> Result<String> {
        let mut addresses = String::new();
        for (index, nic) in self.nics.iter().enumerate() {
            let socket = format!("nic{index}.sock");
            nic.network.plug_in(&self.name, &folder.socket(&socket))?;
            let netdev = "stream,server=off,addr.type=unix";
            add(
                all,
                &[
                    "-netdev",
                    &format!("{netdev},id=nic{index},addr.path={socket}"),
                ],
            );
            let card = self.hardware.network_card();
            // Without a boot ROM, which is never used and takes time.
            add(
                all,
                &[
                    "-device",
                    &format!("{card},netdev=nic{index},mac={},romfile=", nic.mac),
                ],
            );
            addresses.push_str(&format!(" blanket.net={}={}", nic.mac, nic.address));
        }
        Ok(addresses)
    }

    /// The node image; with injected files a copy of it with a second archive behind it.
    fn initrd(&self, folder: &RunFolder, flavor: KernelFlavor, kernel: &Kernel) -> Result<PathBuf> {
        let image = image::node(flavor, kernel)?;
        if self.injected.is_empty() {
            return Ok(image);
        }
        let mut tree = Tree::default();
        for (file, path) in &self.injected {
            tree.host_file(path, file)?;
        }
        let path = folder.path().join("initrd.cpio");
        fs::copy(&image, &path)
            .and_then(|_| fs::File::options().append(true).open(&path))
            .and_then(|file| tree.write_cpio(std::io::BufWriter::new(file)))
            .context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

fn add(all: &mut Vec<OsString>, arguments: &[&str]) {
    all.extend(arguments.iter().map(OsString::from));
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
            hardware: Hardware::default(),
            kernel: None,
            smbios: Smbios::default(),
            disks: Vec::new(),
            nics: Vec::new(),
            payloads: Vec::new(),
            injected: Vec::new(),
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
        if thread::panicking() {
            match keep_log(&self.folder, &self.name) {
                Ok(log) => eprintln!("testbed: console of `{}`: {}", self.name, log.display()),
                Err(error) => eprintln!("testbed: console of `{}` is lost: {error}", self.name),
            }
        }
    }
}

/// Writes what QEMU knows of a running machine's processors to `state.log`, and the most of it to
/// standard error: whether it sleeps, loops, or was never told of an interrupt that is pending.
fn keep_state(folder: &RunFolder, cpus: u8) {
    let ask = || -> io::Result<()> {
        let mut monitor = UnixStream::connect(folder.socket("monitor.sock"))?;
        monitor.set_read_timeout(Some(Duration::from_secs(1)))?;
        monitor.write_all(b"info registers -a\n")?;
        for cpu in 0..cpus {
            writeln!(monitor, "info lapic {cpu}")?;
        }
        let mut state = Vec::new();
        // Ends with the time limit.
        let _ = monitor.read_to_end(&mut state);
        for line in String::from_utf8_lossy(&state).lines() {
            if ["CPU#", "RIP=", "IRR", "ISR", "Timer"]
                .iter()
                .any(|start| line.starts_with(start))
            {
                eprintln!("testbed: {line}");
            }
        }
        fs::write(folder.path().join("state.log"), state)
    };
    // A machine that is gone has nothing to tell.
    let _ = ask();
}

/// Copies the machine's console output and QEMU's messages to where they stay.
fn keep_log(folder: &RunFolder, name: &str) -> Result<PathBuf> {
    let this = thread::current();
    let test = this.name().unwrap_or("main").replace("::", "-");
    let path = cache::subfolder("logs")?.join(format!("{test}-{name}.log"));
    let collect = |path: &Path| {
        let mut log = fs::File::create(path)?;
        for part in ["qemu.log", "console.log", "state.log"] {
            // A machine that did not start has no console, one that passed no state.
            log.write_all(&fs::read(folder.path().join(part)).unwrap_or_default())?;
        }
        Ok(())
    };
    collect(&path).context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
