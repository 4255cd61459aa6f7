//! The configuration of one VM.
//!
//! [`VmConfig`] is the TOML file, the body of `PUT /vm` and the command-line
//! flags at once: the doc comments of its fields are the flags' help texts.
//! Every field is optional; the methods of the same names give the defaults.

mod size;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use blanket_drivers::tap::MacAddress;
pub use size::ByteSize;

use blanket_drivers::cpu;
pub use blanket_drivers::cpu::CpuChoice;

/// vCPUs that a machine can have.
pub const MAX_CPUS: u8 = 64;

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML or has an unknown or mistyped key.
    #[error("{path} is not a VM configuration: line {line}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Which line, from 1 on.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value that cannot work, with the remedy.
    #[error("{0}")]
    Invalid(String),
}

/// Which pages back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Ordinary pages only.
    Off,
    /// Transparent huge pages where the kernel offers them.
    #[default]
    Thp,
    /// 2 MiB pages from hugetlbfs, reserved when the VM is created.
    #[serde(rename = "2m")]
    #[value(name = "2m")]
    Hugetlb2M,
    /// 1 GiB pages from hugetlbfs, reserved when the VM is created.
    #[serde(rename = "1g")]
    #[value(name = "1g")]
    Hugetlb1G,
}

/// Which machine runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    /// `hvm` where this node has VMX or SVM, else `pv`.
    #[default]
    Auto,
    /// The guest's kernel runs in hardware virtualization.
    Hvm,
    /// The guest's kernel runs in ring 3 and speaks the Xen PV ABI.
    Pv,
}

/// How KVM tells which pages a guest writes, for a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DirtyChoice {
    /// By rings where KVM has them and works in hardware, else by its log.
    #[default]
    Auto,
    /// By a ring for each vCPU, a list of pages: does not cost more where a
    /// guest has more memory.
    Ring,
    /// By a log, a bit for each page: costs no memory before it is needed.
    Log,
}

/// What happens when the guest reboots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The VM starts again from its kernel.
    #[default]
    Restart,
    /// The monitor exits with status 0, as after a poweroff.
    Exit,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse the guest's writes. Several VMs may share a read-only disk.
    #[serde(default)]
    pub readonly: bool,
    /// `raw` or `qcow2`; told by the file's first bytes if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<blanket_drivers::store::Format>,
    /// What the guest reads as the disk's serial (20 bytes at most).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Bypass the node's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Let a qcow2 image read from the backing files that it names. Only for
    /// images from people who may read any file that the monitor can.
    #[serde(default)]
    pub backing: bool,
    /// The other volumes of a striped set (see `blanket store stripe`) of which
    /// `path` is one, in any order; separated by colons in a flag.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stripe: Vec<PathBuf>,
    /// I/O engine: `auto`, `io_uring`, `polled` or `sync`.
    #[serde(default)]
    pub engine: blanket_drivers::store::Engine,
    /// Virtqueues or rings, 1 to 16; as many as vCPUs, up to 4, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// On a `pv` machine: let the guest reuse the pages that it shares with
    /// the disk (persistent grants) [default: off, as it is slower here].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
}

impl DiskConfig {
    /// Every file and device that it is on.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.path).chain(&self.stripe)
    }

    /// The same, to change them.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        std::iter::once(&mut self.path).chain(&mut self.stripe)
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the tap on the node: an existing one, or one to make (the
    /// kernel picks a name if absent).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Socket of a vhost-user backend, instead of a tap.
    #[serde(
        default,
        rename = "vhost-user",
        skip_serializing_if = "Option::is_none"
    )]
    pub vhost_user: Option<PathBuf>,
    /// Network of the node's switch (see `blanket net`), instead of a tap:
    /// `blanket` makes a port of the switch for the VM, and `vhost-user` leads
    /// there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The guest's IP addresses in the network, with `+` in between: the
    /// switch answers who asks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// VLAN of the network that the guest is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The guest may send from its own MAC (and IP) addresses only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guard: bool,
    /// The security groups of the switch that the guest is in, with `+` in
    /// between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Bridge on the node that the tap joins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Address that the node takes on the tap, like `10.1.0.1/24`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<String>,
    /// The guest's hardware address; a random local one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// MTU told to the guest and set on a tap that Blanket makes (68 to 65521).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to 16; if absent as many as vCPUs, up to 4, and one with
    /// a vhost-user backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// Where a character device leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CharConfig {
    /// The monitor's own standard input and output.
    #[serde(default)]
    pub stdio: bool,
    /// A Unix socket to listen on; one client at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// A file that receives what the guest writes (started anew at 16 MiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Which machine runs the guest [default: auto].
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineChoice>,

    /// The processor that the guest sees: a level that is the same on every
    /// node that has it, or the node's own [default: auto, x86-64-v3 or less].
    #[arg(long, value_name = "MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuChoice>,

    /// Let the guest of an `hvm` machine run hypervisors of its own, where
    /// the node can [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested: Option<bool>,

    /// Do not isolate the guest's kernel from its own user space in a `pv`
    /// machine: faster system calls, for appliances that run one trusted
    /// program [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_guest_user: Option<bool>,

    /// Kernel: a bzImage, an ELF image with a PVH note, or a 64-bit ELF image.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line [default: console=ttyS0 panic=-1; in a `pv` machine
    /// console=hvc0 panic=-1].
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,

    /// Guest memory, like 512M or 4G [default: 512M].
    #[arg(long, short, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,

    /// vCPUs, 1 to 64 [default: 1].
    #[arg(long, short, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,

    /// Pages behind guest memory [default: thp].
    #[arg(long, value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugePages>,

    /// Back guest memory by a memfd, which other processes can map
    /// [default: false, anonymous memory, but for an hvm machine with a
    /// vhost-user interface].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_memory: Option<bool>,

    /// How KVM tells which pages the guest writes, for a migration [default:
    /// auto, rings where KVM has them and works in hardware].
    #[arg(long, value_name = "HOW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty: Option<DirtyChoice>,

    /// A disk: FILE, or path=FILE[,readonly=on][,format=raw|qcow2][,serial=TEXT][,direct=on][,backing=on][,engine=auto|io_uring|polled|sync][,stripe=FILE:FILE...][,queues=N].
    /// May be repeated; the first is /dev/vda.
    #[arg(long, value_name = "DISK", value_parser = parse_disk)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskConfig>,

    /// A network interface: tap, or [tap=NAME][,bridge=NAME][,host_ip=ADDR/LEN][,mac=MAC][,mtu=N][,queues=N],
    /// or vhost-user=SOCKET[,mac=MAC][,mtu=N][,queues=N].
    /// May be repeated.
    #[arg(long, value_name = "NET", value_parser = parse_net)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,

    /// The serial port ttyS0: stdio, off, or [socket=PATH][,log=FILE]
    /// [default: stdio].
    #[arg(long, value_name = "CHAR", value_parser = parse_char)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<CharConfig>,

    /// The paravirtual console hvc0 (virtio's or Xen's): stdio, off, or [socket=PATH][,log=FILE]
    /// [default: off].
    #[arg(long, value_name = "CHAR", value_parser = parse_char)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<CharConfig>,

    /// Give the guest a virtio entropy source [default: true].
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<bool>,

    /// Threads that serve virtqueues, 1 to 16 [default: 1].
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<u8>,

    /// What a guest's reboot does [default: restart].
    #[arg(long, value_name = "ACTION")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_reboot: Option<OnReboot>,
}

impl VmConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or has an unknown key.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|error| {
            let before = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(before).filter(|b| *b == b'\n').count();
            Error::Parse {
                path: path.to_owned(),
                line,
                message: error.message().to_owned(),
            }
        })
    }

    /// This configuration with whatever `over` states laid over it. A list
    /// (disks, interfaces) in `over` replaces the whole list.
    #[must_use]
    pub fn overlaid(self, over: Self) -> Self {
        fn pick<T>(over: Vec<T>, base: Vec<T>) -> Vec<T> {
            if over.is_empty() { base } else { over }
        }
        Self {
            machine: over.machine.or(self.machine),
            cpu: over.cpu.or(self.cpu),
            nested: over.nested.or(self.nested),
            trust_guest_user: over.trust_guest_user.or(self.trust_guest_user),
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            memory: over.memory.or(self.memory),
            cpus: over.cpus.or(self.cpus),
            hugepages: over.hugepages.or(self.hugepages),
            shared_memory: over.shared_memory.or(self.shared_memory),
            dirty: over.dirty.or(self.dirty),
            disk: pick(over.disk, self.disk),
            net: pick(over.net, self.net),
            serial: over.serial.or(self.serial),
            console: over.console.or(self.console),
            rng: over.rng.or(self.rng),
            io_threads: over.io_threads.or(self.io_threads),
            on_reboot: over.on_reboot.or(self.on_reboot),
        }
    }

    /// The kernel command line.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        let default = match self.machine {
            Some(MachineChoice::Pv) => "console=hvc0 panic=-1",
            _ => "console=ttyS0 panic=-1",
        };
        self.cmdline.as_deref().unwrap_or(default)
    }

    /// The kernel command line for a `pv` machine.
    #[must_use]
    pub fn pv_cmdline(&self) -> &str {
        self.cmdline.as_deref().unwrap_or("console=hvc0 panic=-1")
    }

    /// Guest memory in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory.map_or(512 << 20, |size| size.0)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus.unwrap_or(1)
    }

    /// Virtqueues (disks) or queue pairs (interfaces) where none are stated.
    #[must_use]
    pub fn default_queues(&self) -> u16 {
        u16::from(self.cpus().clamp(1, 4))
    }

    /// Threads that serve virtqueues.
    #[must_use]
    pub fn io_threads(&self) -> u8 {
        self.io_threads.unwrap_or(1)
    }

    /// Checks everything that can be checked without touching the machine.
    ///
    /// # Errors
    /// The first value that cannot work, with the remedy.
    pub fn validate(&self) -> Result<(), Error> {
        let check = |ok: bool, message: &dyn Fn() -> String| {
            if ok {
                Ok(())
            } else {
                Err(Error::Invalid(message()))
            }
        };
        check(self.kernel.is_some(), &|| {
            "no kernel: name one with --kernel FILE (or `kernel = \"FILE\"`)".into()
        })?;
        check((1..=MAX_CPUS).contains(&self.cpus()), &|| {
            format!("{} vCPUs: a machine has 1 to {MAX_CPUS}", self.cpus())
        })?;
        check((1..=16).contains(&self.io_threads()), &|| {
            format!("{} I/O threads: use 1 to 16", self.io_threads())
        })?;
        check(self.memory() >= 16 << 20, &|| {
            format!(
                "{} of memory: a guest needs at least 16M",
                ByteSize(self.memory())
            )
        })?;
        check(
            self.memory() <= cpu::MOST_MEMORY || self.cpu == Some(CpuChoice::Host),
            &|| {
                format!(
                    "{} of memory: models of processors address {}; use --cpu host",
                    ByteSize(self.memory()),
                    ByteSize(cpu::MOST_MEMORY)
                )
            },
        )?;
        check(self.memory().is_multiple_of(4096), &|| {
            format!("memory of {} bytes is not a multiple of 4K", self.memory())
        })?;
        check(
            self.cmdline().len() < 2048 && !self.cmdline().contains(['\0', '\n']),
            &|| "the kernel command line must be one line of at most 2047 bytes".into(),
        )?;
        for disk in &self.disk {
            check(
                disk.serial.as_ref().is_none_or(|serial| serial.len() <= 20),
                &|| {
                    format!(
                        "disk {}: a serial has at most 20 bytes",
                        disk.path.display()
                    )
                },
            )?;
            check(disk.queues.is_none_or(|n| (1..=16).contains(&n)), &|| {
                format!("disk {}: use 1 to 16 queues", disk.path.display())
            })?;
        }
        for net in &self.net {
            check(net.queues.is_none_or(|n| (1..=16).contains(&n)), &|| {
                "a network interface has 1 to 16 queue pairs".into()
            })?;
            check(net.mtu.is_none_or(|n| (68..=65521).contains(&n)), &|| {
                "an MTU is 68 to 65521 bytes".into()
            })?;
            let of_tap = net.tap.is_some() || net.bridge.is_some() || net.host_ip.is_some();
            check(net.vhost_user.is_none() || !of_tap, &|| {
                "an interface with vhost-user has no tap, bridge or host_ip".into()
            })?;
            check(net.network.is_none() || !of_tap, &|| {
                "an interface with a network has no tap, bridge or host_ip".into()
            })?;
            check(net.network.is_none() || net.vhost_user.is_some(), &|| {
                "networks are blanket's: start the VM with blanket run, or name a socket (vhost-user=PATH)".into()
            })?;
            let of_network =
                net.ip.is_some() || net.vlan.is_some() || net.guard || net.group.is_some();
            check(net.network.is_some() || !of_network, &|| {
                "ip, vlan, guard and group are for an interface with a network".into()
            })?;
            check(net.vlan.is_none_or(|n| (1..=4094).contains(&n)), &|| {
                "a VLAN is 1 to 4094".into()
            })?;
        }
        let stdio = [&self.serial, &self.console]
            .into_iter()
            .filter(|char| char.as_ref().is_some_and(|char| char.stdio))
            .count();
        check(stdio < 2, &|| {
            "only one of --serial and --console can have stdio".into()
        })
    }
}

/// Parses `key=value,...` into one of the structs above.
fn parse_keys<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    use serde_aco::Error;
    serde_aco::from_arg(text).map_err(|error| match error {
        Error::Message(message) => message,
        Error::ExpectedMapEq => "write it as key=value,key=value".to_owned(),
        Error::ExpectedBool => "a switch is on or off".to_owned(),
        Error::ExpectedInteger | Error::Overflow => "a number is out of range".to_owned(),
        Error::Trailing(rest) => format!("what does '{rest}' belong to? write key=value"),
        other => format!("cannot be read ({other})"),
    })
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    if !text.contains('=') {
        return parse_keys(&format!("path={text}"));
    }
    // Lists have no form of their own in flags.
    let (stripe, keys): (Vec<_>, Vec<_>) = text
        .split(',')
        .partition(|part| part.starts_with("stripe="));
    let mut disk: DiskConfig = parse_keys(&keys.join(","))?;
    let volumes = stripe
        .iter()
        .filter_map(|part| part.strip_prefix("stripe="));
    disk.stripe = volumes
        .flat_map(|names| names.split(':'))
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .collect();
    Ok(disk)
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    match text {
        "" | "tap" => Ok(NetConfig::default()),
        keys => parse_keys(keys.strip_prefix("tap,").unwrap_or(keys)),
    }
}

fn parse_char(text: &str) -> Result<CharConfig, String> {
    match text {
        "off" => Ok(CharConfig::default()),
        "stdio" => Ok(CharConfig {
            stdio: true,
            ..CharConfig::default()
        }),
        keys => parse_keys(keys),
    }
}
