//! What Blanket wants of a machine, and why.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use blanket_drivers::probe::Virtualization;
use blanket_drivers::uplink::{Interface, interfaces};
use blanket_drivers::volume::list;

use super::change::{Target, is_loaded};
use super::record::Options;
use super::system::System;
use crate::failure::failure;
use crate::table;

const MODULES_FILE: &str = "/etc/modules-load.d/blanket.conf";
const SYSCTL_FILE: &str = "/etc/sysctl.d/90-blanket.conf";
const TMPFILES_FILE: &str = "/etc/tmpfiles.d/blanket.conf";
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// Brings guests back at boot, and saves them when the machine ends.
pub(crate) const SERVICE: &str = "blanket.service";
/// Saves them when the provider is about to take the machine away.
pub(crate) const WATCH: &str = "blanket-watch.service";
/// Talks to the other nodes.
pub(crate) const DAEMON: &str = "blanketd.service";
/// Has guests' networks, also with those on other nodes.
pub(crate) const SWITCH: &str = "blanket-switch.service";

/// Something that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// The heading that it belongs under.
    pub(crate) area: &'static str,
    pub(crate) target: Target,
    pub(crate) why: String,
}

/// What the wants depend on.
#[derive(Debug)]
pub(crate) struct Node<'a> {
    pub(crate) system: &'a System,
    pub(crate) kvm: Virtualization,
    pub(crate) options: &'a Options,
    /// Settings that an earlier `blanket up` has changed.
    pub(crate) ours: Vec<PathBuf>,
    /// Whether the provider tells when it takes machines away.
    pub(crate) notices: bool,
    /// This program.
    pub(crate) program: PathBuf,
    /// The program `blanketd`, if it is here.
    pub(crate) daemon: Option<PathBuf>,
    /// The program `blanket-switch`, if it is here.
    pub(crate) switch: Option<PathBuf>,
    /// The interface by which other nodes most likely reach this one, and its
    /// address there.
    pub(crate) outside: Option<(String, IpAddr)>,
    /// Where guests are saved.
    pub(crate) evacuated: PathBuf,
    /// Where the uplinks' self-tests are kept.
    pub(crate) uplinks: PathBuf,
    /// Where the volumes' are.
    pub(crate) stores: PathBuf,
}

impl Node<'_> {
    /// Whether an earlier `blanket up` has changed a setting.
    fn changed(&self, path: &str) -> bool {
        self.ours.iter().any(|ours| ours == Path::new(path))
    }
}

/// Everything, in the order in which it is done.
pub(crate) fn wants(node: &Node) -> Result<Vec<Want>> {
    let mut all = Vec::new();
    let modules = modules(node);
    if !modules.is_empty() {
        let why = "modprobe loads kernel modules";
        let target = Target::Package {
            name: "kmod".into(),
            program: "modprobe".into(),
        };
        all.push(want("packages", target, why));
    }
    let mut text = "# Written by blanket up; blanket down removes it.\n".to_owned();
    for (name, sign, why) in &modules {
        text.push_str(&format!("# {why}\n{name}\n"));
        let target = Target::Module {
            name: (*name).to_owned(),
            sign: sign.into(),
        };
        all.push(want("modules", target, why));
    }
    if !modules.is_empty() {
        let why = "the modules are loaded at boot";
        all.push(want("modules", file(MODULES_FILE, text), why));
    }
    all.extend(huge_pages(node)?);
    all.extend(transparent_huge_pages(node)?);
    all.extend(uplinks(node)?);
    all.extend(stores(node));
    if node.system.has_systemd() {
        all.extend(units(node));
    }
    Ok(all)
}

fn want(area: &'static str, target: Target, why: &str) -> Want {
    Want {
        area,
        target,
        why: why.to_owned(),
    }
}

fn file(path: &str, content: String) -> Target {
    Target::File {
        path: path.into(),
        content,
    }
}

/// Modules by name, with what is there once they are loaded, and their use.
/// Those that are built into the kernel are not among them.
fn modules(node: &Node) -> Vec<(&'static str, &'static str, &'static str)> {
    let vendor = match node.kvm {
        Virtualization::Vmx => "kvm_intel",
        Virtualization::Svm => "kvm_amd",
        Virtualization::Pvm => "kvm_pvm",
    };
    let all = [
        (vendor, "/sys/class/misc/kvm", "virtual machines"),
        ("tun", "/sys/class/misc/tun", "guests' network interfaces"),
    ];
    let needed = all.into_iter();
    needed
        .filter(|(name, sign, _)| !node.system.has(sign) || is_loaded(node.system, name))
        .collect()
}

/// A figure of `/proc/meminfo` in bytes.
fn meminfo(system: &System, name: &str) -> Result<u64> {
    let text = system.read("/proc/meminfo")?.unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let figure = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    figure
        .map(|kib| kib << 10)
        .ok_or_else(|| anyhow!("/proc/meminfo has no {name}"))
}

/// The pages for what was asked for, if the machine has room.
fn huge_pages(node: &Node) -> Result<Vec<Want>> {
    let Some(bytes) = node.options.hugepages.filter(|bytes| *bytes > 0) else {
        return Ok(Vec::new());
    };
    let system = node.system;
    let Some(now) = system.read(HUGE_PAGES)? else {
        return Err(failure(
            "this kernel has no huge pages",
            "leave out --hugepages",
        ));
    };
    let now: u64 = now.trim().parse()?;
    let size = meminfo(system, "Hugepagesize")?.max(1);
    let pages = bytes.div_ceil(size);
    if now > pages && !node.changed(HUGE_PAGES) {
        // Somebody has use for more; there are enough.
        return Ok(Vec::new());
    }
    let (total, available) = (
        meminfo(system, "MemTotal")?,
        meminfo(system, "MemAvailable")?,
    );
    // The node itself and the monitors need some too.
    let room = available.saturating_sub(total / 8);
    let more = pages.saturating_sub(now).saturating_mul(size);
    if more > room {
        let most = (room / size + now) * size;
        return Err(failure(
            format!(
                "{} of huge pages are too many: {} of memory are available, an eighth of all stays \
                 for the node",
                table::bytes(bytes),
                table::bytes(available)
            ),
            format!("blanket up --hugepages {}M at the most", most >> 20),
        ));
    }
    let why = format!(
        "{} for guests with --hugepages 2m, in pages of {}",
        table::bytes(pages * size),
        table::bytes(size)
    );
    let content = format!(
        "# Written by blanket up; blanket down removes it.\n# {why}\nvm.nr_hugepages = {pages}\n"
    );
    let value = Target::Setting {
        path: HUGE_PAGES.into(),
        value: pages.to_string(),
    };
    Ok(vec![
        want("hugepages", file(SYSCTL_FILE, content), &why),
        want("hugepages", value, &why),
    ])
}

/// Guests ask for transparent huge pages; they shall get them.
fn transparent_huge_pages(node: &Node) -> Result<Vec<Want>> {
    let Some(now) = node.system.read(TRANSPARENT)? else {
        return Ok(Vec::new());
    };
    if !now.contains("[never]") && !node.changed(TRANSPARENT) {
        return Ok(Vec::new());
    }
    let why = "guests' memory in huge pages: fewer TLB misses";
    let value = Target::Setting {
        path: TRANSPARENT.into(),
        value: "madvise".into(),
    };
    let content = format!(
        "# Written by blanket up; blanket down removes it.\n# {why}\nw {TRANSPARENT} - - - - madvise\n"
    );
    Ok(vec![
        want("settings", file(TMPFILES_FILE, content), why),
        want("settings", value, why),
    ])
}

/// The interfaces that can be uplinks.
pub(crate) fn usable(all: Vec<Interface>) -> impl Iterator<Item = Interface> {
    all.into_iter()
        .filter(|it| it.up && it.carrier && !it.addresses.is_empty())
}

fn uplinks(node: &Node) -> Result<Vec<Want>> {
    let all = usable(interfaces()?).filter_map(|it| {
        let address = *it.addresses.first()?;
        let target = Target::Uplink {
            interface: it.name,
            address,
            folder: node.uplinks.clone(),
        };
        Some(want(
            "uplink",
            target,
            "the best way to other nodes is used",
        ))
    });
    Ok(all.collect())
}

fn stores(node: &Node) -> impl Iterator<Item = Want> {
    list(Path::new("/"), "").into_iter().map(|volume| {
        let target = Target::Store {
            volume: volume.name,
            folder: node.stores.clone(),
        };
        want("store", target, "guests' disks on it are served best")
    })
}

/// A path as systemd reads it in a unit (systemd.syntax(7)).
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", text.replace('%', "%%"))
}

fn units(node: &Node) -> Vec<Want> {
    let to = quoted(&node.evacuated);
    let head = |what: &str, after: &str| {
        format!(
            "# Written by blanket up; blanket down removes it.\n\
             [Unit]\nDescription={what}\n\
             After=network.target local-fs.target systemd-modules-load.service \
             systemd-sysctl.service{after}\n\
             RequiresMountsFor={to}\n\n[Service]\n"
        )
    };
    // In command lines, `$` begins a variable (systemd.service(5)).
    let program = quoted(&node.program).replace('$', "$$");
    let place = to.replace('$', "$$");
    let install = "\n[Install]\nWantedBy=multi-user.target\n";
    // A guest that does not come back must not keep the others from being saved
    // in the end. Its monitor is in a scope of its own, which ends after this.
    let service = format!(
        "{}Type=oneshot\nRemainAfterExit=yes\n\
         ExecStart=-{program} restore --evacuated {place}\n\
         ExecStop={program} evacuate --within 840 --to {place}\n\
         TimeoutStartSec=15min\nTimeoutStopSec=15min\n{install}",
        head("Guests of Blanket: back at boot, saved at the end", "")
    );
    let mut all = vec![(SERVICE, service, "guests outlive the machine's reboot")];
    if node.notices {
        let watch = format!(
            "{}Type=exec\nExecStart={program} evacuate --watch --to {place}\n\
             Restart=on-failure\nRestartSec=5\nTimeoutStopSec=15min\n{install}",
            head(
                "Blanket: watches for the provider's notices",
                " blanket.service"
            )
        );
        let why = "guests are saved when the provider is about to take the machine away";
        all.push((WATCH, watch, why));
    }
    if let Some(daemon) = &node.daemon {
        let why = "other nodes reach this one, once it is in a cluster";
        all.push((DAEMON, daemon_unit(daemon), why));
    }
    if let Some(switch) = &node.switch {
        let why = "guests' networks, also with those on other nodes";
        all.push((SWITCH, switch_unit(switch, node.outside.as_ref()), why));
    }
    let wants = all.into_iter().flat_map(|(name, text, why)| {
        let unit = Target::Unit {
            name: name.to_owned(),
        };
        let path = format!("/etc/systemd/system/{name}");
        [
            want("service", file(&path, text), why),
            want("service", unit, why),
        ]
    });
    wants.collect()
}

/// The daemon owns what it reads; the one capability is for the sockets of
/// monitors that run as other users.
fn daemon_unit(program: &Path) -> String {
    let program = quoted(program).replace('$', "$$");
    format!(
        "# Written by blanket up; blanket down removes it.\n\
         [Unit]\nDescription=Blanket: talks to the other nodes\n\
         Wants=network-online.target\nAfter=network-online.target local-fs.target\n\n\
         [Service]\nType=exec\nExecStart={program}\nRestart=always\nRestartSec=2\n\
         NoNewPrivileges=yes\nCapabilityBoundingSet=CAP_DAC_OVERRIDE\n\
         RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK\n\
         \n[Install]\nWantedBy=multi-user.target\n"
    )
}

/// The port at which switches listen for others.
const SWITCH_PORT: u16 = 4790;

/// The switch has its sockets, its TAPs and its way to others. It is there
/// before guests come back, and has no more to do with them than any backend:
/// it can be started again at any time.
///
/// It confines itself further when it is set up: what is here is what it takes
/// until then, and what can only be had from outside. `CAP_NET_RAW` is for its
/// way to others, and `CAP_SETPCAP` to drop the others for good.
fn switch_unit(program: &Path, outside: Option<&(String, IpAddr)>) -> String {
    let program = quoted(program).replace('$', "$$");
    let remote = outside.map(|(interface, address)| {
        let listen = SocketAddr::new(*address, SWITCH_PORT);
        format!(" --listen {listen} --interface {interface}")
    });
    let remote = remote.unwrap_or_default();
    format!(
        "# Written by blanket up; blanket down removes it.\n\
         [Unit]\nDescription=Blanket: the switch of this node\n\
         Wants=network-online.target\n\
         After=network-online.target local-fs.target systemd-modules-load.service\n\
         Before={SERVICE}\n\n\
         [Service]\nType=exec\nExecStart={program}{remote}\nRestart=always\nRestartSec=1\n\
         {SWITCH_CONFINED}\n[Install]\nWantedBy=multi-user.target\n"
    )
}

/// Sockets of ports are in `/run` and `/tmp`, also those that others look for.
const SWITCH_CONFINED: &str = "\
    NoNewPrivileges=yes\n\
    CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_CHOWN CAP_SETPCAP\n\
    RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK\n\
    StateDirectory=blanket/switch\nStateDirectoryMode=0700\n\
    ProtectSystem=strict\nReadWritePaths=/run /tmp\nProtectHome=yes\n\
    ProtectControlGroups=yes\nProtectKernelLogs=yes\nProtectKernelModules=yes\n\
    ProtectKernelTunables=yes\nLockPersonality=yes\nMemoryDenyWriteExecute=yes\n\
    RestrictNamespaces=yes\nRestrictRealtime=yes\nRestrictSUIDSGID=yes\n\
    SystemCallArchitectures=native\n";
