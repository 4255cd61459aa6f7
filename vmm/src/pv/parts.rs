//! What a pv machine is made of, opened while the process still may.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Mutex};

use blanket_devices::char::CharPort;
use blanket_devices::xen::blkif::INDIRECT_SEGMENTS;
use blanket_drivers::probe::Virtualization;
use blanket_memory::GuestRam;
use blanket_pv_shim::layout;
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::GuestAddress;

use super::abi::MAX_GUEST_CMDLINE;
use super::builder::Kernel;
use super::cpuid::{Source, Visible};
use super::shim::area_size;
use crate::config::{CharConfig, DiskConfig, VmConfig};
use crate::hvm;
use crate::machine::open::{self, Disk, Given, Interface, open_char, open_disk, open_interface};
use crate::machine::{Error, ahead, kvm, lock};
use blanket_drivers::cpu::{self, Shown};

/// Where the kernel's messages go before it has a console of its own.
pub(super) type EarlyConsole = Box<dyn Fn(&[u8]) + Send + Sync>;

/// Everything that needs a name in the file system or a privilege.
pub struct Parts {
    pub(super) vm: Arc<VmFd>,
    pub(super) hardware: bool,
    pub(super) cpu: Shown,
    pub(super) cpuid: Visible,
    /// What the guest reads as its identity.
    pub(super) uuid: [u8; 16],
    pub(super) kernel: Kernel,
    pub(super) ram: GuestRam,
    pub(crate) disks: Vec<(Disk, bool)>,
    pub(crate) interfaces: Vec<Interface>,
    pub(super) console: CharPort,
    pub(super) early: EarlyConsole,
}

impl Parts {
    /// Opens all that `config` names, but for what is given.
    ///
    /// # Errors
    /// The first thing that is missing, in use or not permitted, with the
    /// remedy. What was made until then (taps, sockets) goes away again.
    pub fn open(config: &VmConfig, mut given: Given) -> Result<Self, Error> {
        if u64::from(config.cpus()) > layout::MAX_VCPUS {
            return Err(Error::TooManyCpus {
                cpus: config.cpus(),
                most: layout::MAX_VCPUS as usize,
            });
        }
        let path = config.kernel.as_deref().ok_or(Error::NoKernel)?;
        let memory = config.memory();
        let open = match given.guest {
            true => Kernel::open_unread,
            false => Kernel::open,
        };
        let kernel = open(path, config.initrd.as_deref(), &cmdline(config), memory)?;
        let hardware = Virtualization::of_this_machine().is_hardware();
        let (host, cpu, cpuid) = open_kvm(config, hardware)?;
        let area = area_size(memory);
        let ram = blanket_memory::build_at(
            &open::memory(config, memory + area, false),
            &[(GuestAddress(0), memory), (GuestAddress(layout::GPA), area)],
        )?;
        let queues = config.default_queues();
        let disks = config.disk.iter().map(|disk| {
            Ok((
                open_disk(disk, queues, &mut given)?,
                disk.persistent.unwrap_or(false),
            ))
        });
        let disks = disks.collect::<Result<_, Error>>()?;
        let interfaces = config
            .net
            .iter()
            .map(|net| open_interface(net, queues, &mut given));
        let interfaces = interfaces.collect::<Result<_, _>>()?;
        let stdio = CharConfig {
            stdio: true,
            ..CharConfig::default()
        };
        // It is the guest's only console: it takes the serial port's place if
        // it has none of its own.
        let console = config
            .console
            .as_ref()
            .filter(|char| **char != CharConfig::default());
        let serial = config.serial.as_ref().unwrap_or(&stdio);
        // Last: it has had all the time until now.
        let vm = Arc::new(ahead::take(given.vm.take(), &host)?);
        Ok(Self {
            vm,
            hardware,
            cpu,
            cpuid,
            uuid: open::random_uuid()?,
            kernel,
            ram,
            disks,
            interfaces,
            console: open_char(console.unwrap_or(serial))?,
            early: early_console(console.and(Some(serial)))?,
        })
    }
}

/// The kernel's early messages go to the log of a serial port that is not the
/// console, else to standard error.
fn early_console(serial: Option<&CharConfig>) -> Result<EarlyConsole, Error> {
    let Some(log) = serial.and_then(|serial| serial.log.as_deref()) else {
        return Ok(Box::new(|text| {
            // Nobody is there to be told of a failure.
            let _ = std::io::stderr().write_all(text);
        }));
    };
    let file: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(|source| Error::Resource("open the log of early messages", source))?;
    let file = Mutex::new(file);
    Ok(Box::new(move |text| {
        let _ = lock(&file).write_all(text);
    }))
}

/// KVM, and what the guest's CPUID says.
fn open_kvm(config: &VmConfig, hardware: bool) -> Result<(Kvm, Shown, Visible), Error> {
    let cpus = config.cpus();
    let host = Kvm::new().map_err(|error| hvm::no_kvm(error.into()))?;
    let most = host.get_max_vcpus();
    if usize::from(cpus) > most {
        return Err(Error::TooManyCpus { cpus, most });
    }
    for (cap, name) in [
        (Cap::Irqchip, "interrupt controllers"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::SyncRegs, "shared registers"),
        (Cap::UserMemory, "user memory"),
    ] {
        if !host.check_extension(cap) {
            return Err(Error::Missing(name));
        }
    }
    let supported = cpu::supported(&host).map_err(kvm("read the supported CPUID"))?;
    let choice = config.cpu.unwrap_or_default();
    let (source, cpu) = if hardware {
        (Source::Kvm, Shown::choose(choice, &supported, false)?)
    } else {
        (Source::Native, Shown::native(choice, &supported)?)
    };
    let cpuid = Visible::new(source, &cpu.cpuid)?;
    Ok((host, cpu, cpuid))
}

/// The kernel's command line, with long requests to disks unless it says itself
/// how long they are. Linux's own limit is 128 KiB, which is less than a
/// provider's volume needs to be at its best.
fn cmdline(config: &VmConfig) -> String {
    const LONG: &str = "xen_blkfront.max_indirect_segments";
    let asked = config.pv_cmdline();
    // With persistent grants a guest keeps pages for as many requests as there
    // may be.
    let keeps = |disk: &DiskConfig| disk.persistent == Some(true);
    if asked.contains(LONG) || config.disk.is_empty() || config.disk.iter().any(keeps) {
        return asked.to_owned();
    }
    // What follows `--` is for init.
    let (kernel, init) = asked
        .find(" -- ")
        .map_or((asked, ""), |at| asked.split_at(at));
    let long = format!("{kernel} {LONG}={INDIRECT_SEGMENTS}{init}");
    if long.len() < MAX_GUEST_CMDLINE {
        long
    } else {
        asked.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_to_disks_are_long_unless_the_guest_is_told_otherwise() {
        let line = |cmdline: &str, persistent: &[Option<bool>]| {
            let disk = |persistent: &Option<bool>| {
                let disk = serde_json::json!({ "path": "/d", "persistent": persistent });
                serde_json::from_value(disk).unwrap()
            };
            super::cmdline(&VmConfig {
                cmdline: Some(cmdline.into()),
                disk: persistent.iter().map(disk).collect(),
                ..VmConfig::default()
            })
        };
        const LONG: &str = "quiet xen_blkfront.max_indirect_segments=256";
        assert_eq!(line("quiet", &[None, Some(false)]), LONG);
        assert_eq!(
            line("quiet -- single", &[None]),
            format!("{LONG} -- single")
        );
        assert_eq!(line("quiet", &[]), "quiet");
        assert_eq!(line("quiet", &[None, Some(true)]), "quiet");
        let own = "xen_blkfront.max_indirect_segments=64";
        assert_eq!(line(own, &[None]), own);
        let full = "x".repeat(1000);
        assert_eq!(line(&full, &[None]), full);
    }
}
