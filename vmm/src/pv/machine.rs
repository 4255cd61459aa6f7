//! Wiring a pv machine together, and its life as a whole.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blanket_devices::lifecycle::{self, Lifecycle, SavedState};
use blanket_devices::net;
use blanket_devices::worker::Workers;
use blanket_devices::xen::blkif::{self, Block};
use blanket_devices::xen::bus::{self, Backend, SharedPages, XenBus};
use blanket_devices::xen::console::SharedPage;
use blanket_devices::xen::control::Shutdown;
use blanket_devices::xen::grant::GrantTable;
use blanket_devices::xen::netif::Netif;
use blanket_devices::xen::{BACKEND, EventChannels};
use blanket_memory::GuestRam;
use blanket_pv_shim::layout;
use kvm_bindings::kvm_regs;
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use vm_memory::GuestAddress;

use super::builder::{Kernel, Ports};
use super::cpu::PvCpu;
use super::cpuid::Visible;
use super::domain::{Begin, Cpu, CpuState, Domain, Online, Trap, wire_interrupts};
use super::events::{Events, Places};
use super::parts::Parts;
use super::runstate::State;
use super::saved::Suspension;
use super::shim::Area;
use super::time::Time;
use crate::api::types::{self, DeviceInfo, Metrics, Target};
use crate::config::{ByteSize, VmConfig};
use crate::jail::Class;
use crate::machine::health::{self, Health};
use crate::machine::open::{Attachment, Disk, Interface};
use crate::machine::{
    self, Error, RequestError, TargetError, dirty, furnish, kvm, lock, memory_metrics, named,
    resource, setup, spawn_workers,
};
use crate::vcpu::state::set_cpuid;
use crate::vcpu::{Brake, EventSink, Vcpu};
use blanket_drivers::cpu::Shown;
use blanket_drivers::rings::Rings;

/// Guest-physical address of `shared_info`.
pub(super) const SHARED_INFO: GuestAddress = GuestAddress(layout::GPA + layout::SHARED_INFO);

/// A pv machine.
///
/// Fields are dropped in order: first what runs, then what it runs on.
pub struct Machine {
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) bus: XenBus,
    pub(super) domain: Arc<Domain>,
    kernel: Kernel,
    cpu: Shown,
    described: Vec<DeviceInfo>,
    health: Vec<Health>,
    _workers: Workers,
    rings: Option<Arc<Rings>>,
    vm: Arc<VmFd>,
}

/// Events of `cpus`, whose vCPUs KVM interrupts and whose doorbells it hears.
fn events(vm: &Arc<VmFd>, parts: &Parts, cpus: &Arc<Vec<Cpu>>) -> Events {
    let woken = Arc::clone(cpus);
    let wake = Arc::new(move |index: usize| {
        if let Some(cpu) = woken.get(index) {
            // On its own thread it is about to look by itself.
            if !cpu.is_this_thread() {
                cpu.interrupt();
                cpu.wake();
            }
        }
    });
    let vm = Arc::clone(vm);
    let at = IoEventAddress::Pio(u64::from(layout::DOORBELL_PORT));
    let register = Arc::new(move |event: &_, port: u32, on: bool| {
        let done = if on {
            vm.register_ioevent(event, &at, port)
        } else {
            vm.unregister_ioevent(event, &at, port)
        };
        done.map_err(Into::into)
    });
    let places = Places {
        shared_info: SHARED_INFO,
        doorbells: GuestAddress(layout::GPA + layout::DOORBELLS),
    };
    Events::new(parts.ram.clone(), places, cpus.len(), wake, register)
}

impl Machine {
    /// Puts `parts` together. Threads are made here, each under its filter;
    /// the guest does not run yet.
    ///
    /// # Errors
    /// KVM or the kernel refuses something.
    pub fn build(config: &VmConfig, parts: Parts, sink: &EventSink) -> Result<Self, Error> {
        let rings = dirty::enable(&parts.vm, config)?;
        furnish(&parts.vm, &parts.ram)?;
        let count = config.cpus();
        let interrupts = wire_interrupts(&parts.vm, count.into());
        let interrupts = interrupts.map_err(resource("set up interrupts"))?;
        let cpus: Arc<Vec<Cpu>> = Arc::new(interrupts.into_iter().map(Cpu::new).collect());
        let events = Arc::new(events(&parts.vm, &parts, &cpus));
        let workers = spawn_workers(config.io_threads())?;
        let (mut described, mut health) = (Vec::new(), Vec::new());
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        for (i, (disk, persistent)) in (0..).zip(parts.disks) {
            let volumes = disk.image.devices().to_vec();
            let (backend, info) = add_disk(i, disk, persistent)?;
            health.push(Health::new(&info.name, volumes, backend.counters(), sink));
            backends.push(Box::new(backend));
            described.push(info);
        }
        for (i, interface) in (0..).zip(parts.interfaces) {
            let (backend, info) = add_interface(i, interface)?;
            backends.push(backend);
            described.push(info);
        }
        let grants = GrantTable::new(
            parts.ram.clone(),
            GuestAddress(layout::GPA + layout::GRANT_TABLE),
            layout::GRANT_FRAMES,
        );
        let bus = XenBus::new(bus::Parts {
            domain: bus::Domain {
                name: "guest".to_owned(),
                uuid: uuid_text(&parts.uuid),
                memory: config.memory(),
                cpus: u32::from(count),
            },
            memory: parts.ram.clone(),
            grants: Arc::new(grants),
            events: Arc::clone(&events) as Arc<dyn EventChannels>,
            workers: Arc::clone(&workers),
            backends,
            console: parts.console,
            setup: setup(Class::XenBus),
        })
        .map_err(resource("start the xenbus"))?;
        let fds = make_vcpus(&parts.vm, &parts.cpuid, count)?;
        let rings = dirty::map(&parts.vm, &fds, rings)?;
        let khz = fds[0]
            .get_tsc_khz()
            .map_err(kvm("tell the TSC's frequency"))?;
        let domain = Arc::new(Domain {
            ram: parts.ram,
            memory: config.memory(),
            trusted: config.trust_guest_user.unwrap_or(false),
            cpus,
            events,
            time: Arc::new(Time::new(u64::from(khz) * 1000)),
            cpuid: Arc::new(parts.cpuid),
            console: parts.early,
            given: AtomicU64::new(0),
            uuid: Mutex::new(parts.uuid),
            hardware: parts.hardware,
            suspended: Mutex::default(),
        });
        let vcpus = start_vcpus(fds, &domain, sink, rings.as_ref())?;
        Ok(Self {
            vcpus,
            bus,
            domain,
            kernel: parts.kernel,
            cpu: parts.cpu,
            described,
            health,
            _workers: workers,
            rings,
            vm: parts.vm,
        })
    }

    fn stop_vcpus(&self) {
        for vcpu in &self.vcpus {
            vcpu.pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
    }
}

/// A UUID as people write it.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let group = |range: std::ops::Range<usize>| hex[range].to_owned();
    [0..8, 8..12, 12..16, 16..20, 20..32].map(group).join("-")
}

fn make_vcpus(vm: &VmFd, cpuid: &Visible, count: u8) -> Result<Vec<VcpuFd>, Error> {
    (0..count)
        .map(|index| {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(kvm("create a vCPU"))?;
            set_cpuid(&fd, &cpuid.kvm(index.into()))?;
            Ok(fd)
        })
        .collect()
}

fn start_vcpus(
    fds: Vec<VcpuFd>,
    domain: &Arc<Domain>,
    sink: &EventSink,
    rings: Option<&Arc<Rings>>,
) -> Result<Vec<Vcpu>, Error> {
    (0..)
        .zip(fds)
        .map(|(index, fd)| {
            let processor = Box::new(PvCpu::new(Arc::clone(domain), index.into()));
            let (cpus, confine) = (Arc::clone(&domain.cpus), setup(Class::Vcpu));
            let setup = Box::new(move || {
                cpus[usize::from(index)].measure();
                confine()
            });
            Vcpu::spawn(index, fd, processor, sink.clone(), setup, rings.cloned())
                .map_err(resource("start a vCPU"))
        })
        .collect()
}

fn add_disk(index: u32, disk: Disk, persistent: bool) -> Result<(Block, DeviceInfo), Error> {
    let name = format!("blk{index}");
    let engine = health::engine(&disk.image);
    let options = blkif::Options {
        name: &name,
        position: index,
        queues: disk.queues,
        persistent,
    };
    let capacity = disk.image.capacity();
    let backend = Block::new(&options, disk.image, || setup(Class::Store))?;
    let info = DeviceInfo {
        kind: "xen-vbd".to_owned(),
        path: Some(disk.path),
        capacity: Some(capacity),
        engine: Some(engine),
        name,
        ..DeviceInfo::default()
    };
    Ok((backend, info))
}

fn add_interface(
    index: u32,
    interface: Interface,
) -> Result<(Box<dyn Backend>, DeviceInfo), Error> {
    let name = format!("net{index}");
    let failed = resource("set up a network interface");
    let mut info = DeviceInfo {
        kind: "xen-vif".to_owned(),
        mac: Some(interface.mac),
        name: name.clone(),
        ..DeviceInfo::default()
    };
    let attachment = match interface.attachment {
        Attachment::Tap(tap) => {
            info.tap = Some(tap.name().to_owned());
            net::Attachment::Tap(tap)
        }
        Attachment::VhostUser(backend) => {
            info.vhost_user = Some(backend.path().to_owned());
            let kept = backend.keep(|| setup(Class::VhostUser));
            net::Attachment::VhostUser(kept.map_err(&failed)?)
        }
    };
    let backend = Netif::new(index, name, attachment, interface.mac, interface.mtu);
    Ok((Box::new(backend.map_err(failed)?), info))
}

impl machine::Machine for Machine {
    fn cpu(&self) -> &Shown {
        &self.cpu
    }

    fn kind(&self) -> types::Machine {
        types::Machine::Pv
    }

    fn load(&mut self) -> Result<(), Error> {
        let domain = &self.domain;
        let area = Area::new(&domain.ram, domain.memory, self.vcpus.len());
        area.build(domain.trusted)?;
        domain.events.initialize();
        domain.time.restart();
        domain.given.store(0, Ordering::Relaxed);
        *lock(&domain.suspended) = None;
        let port = || {
            domain
                .events
                .alloc_unbound(BACKEND)
                .map_err(|error| Error::Resource("allocate event channels", from_errno(error)))
        };
        let ports = Ports {
            store: port()?,
            console: port()?,
        };
        let start = self.kernel.build(&domain.ram, SHARED_INFO, ports)?;
        domain.write_wall_clock()?;
        for cpu in domain.cpus.iter() {
            *cpu.state() = CpuState {
                traps: vec![Trap::default(); 256],
                ..CpuState::default()
            };
        }
        domain.cpus[0].state().online = Online::Up;
        domain.cpus[0].state().run.begin(0, State::Running);
        domain
            .set_kernel_table(0, start.l4.0)
            .map_err(|error| Error::Resource("place the first page table", from_errno(error)))?;
        domain.cpus[0].state().begin = Some(Begin {
            regs: kvm_regs {
                rip: start.entry,
                rsi: start.start_info,
                rsp: start.stack,
                ..Default::default()
            },
            cr3: start.l4.0,
            ..Begin::default()
        });
        self.bus.attach(SharedPages {
            store: SharedPage {
                address: start.store_page.0,
                port: ports.store,
            },
            console: SharedPage {
                address: start.console_page.0,
                port: ports.console,
            },
        })?;
        Ok(())
    }

    fn start(&mut self) -> Result<(), lifecycle::Error> {
        self.bus.start()?;
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), lifecycle::Error> {
        self.stop_vcpus();
        self.pass_traps();
        self.domain.time.pause();
        self.bus.pause()
    }

    fn resume(&mut self) -> Result<(), lifecycle::Error> {
        if lock(&self.domain.suspended).take().is_some() {
            self.answer_suspension(Suspension::Cancelled)?;
        }
        self.domain.resume_clocks()?;
        self.bus.resume()?;
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.bus.reset()?;
        self.load()
    }

    fn halt(&mut self) {
        self.stop_vcpus();
        self.bus.halt();
    }

    fn press_power_button(&mut self) -> Result<(), lifecycle::Error> {
        self.bus
            .control()
            .shut_down(Shutdown::PowerOff)
            .map_err(|error| lifecycle::Error::Device {
                device: "control/shutdown".to_owned(),
                message: error.to_string(),
            })
    }

    fn set_name(&mut self, name: &str) -> Result<(), lifecycle::Error> {
        self.bus.set_name(name)
    }

    fn new_generation(&mut self) -> Result<(), lifecycle::Error> {
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), RequestError> {
        let control = self.bus.control();
        if !control.can(Shutdown::Suspend) {
            return Err(RequestError::Unable);
        }
        Ok(control.shut_down(Shutdown::Suspend)?)
    }

    fn press_sysrq(&mut self, key: char) -> Result<(), RequestError> {
        Ok(self.bus.control().sysrq(key)?)
    }

    fn is_suspended(&self) -> bool {
        lock(&self.domain.suspended).is_some()
    }

    fn memory(&self) -> &GuestRam {
        &self.domain.ram
    }

    fn brakes(&self) -> Vec<Brake> {
        self.vcpus.iter().map(Vcpu::brake).collect()
    }

    fn vm(&self) -> Arc<VmFd> {
        Arc::clone(&self.vm)
    }

    fn rings(&self) -> Option<Arc<Rings>> {
        self.rings.clone()
    }

    fn likeness(&self) -> Result<SavedState, lifecycle::Error> {
        self.look()
    }

    fn is_like(&self, likeness: &SavedState) -> Result<(), lifecycle::Error> {
        self.compare(likeness)
    }

    fn save(&self) -> Result<SavedState, lifecycle::Error> {
        self.saved()
    }

    fn check(&self, state: &SavedState) -> Result<(), lifecycle::Error> {
        self.fits(state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        self.restored(state)
    }

    fn set_target(&mut self, target: &Target) -> Result<(), TargetError> {
        let control = self.bus.control();
        if let Some(memory) = target.memory {
            control.set_memory(memory.0)?;
        }
        if let Some(cpus) = target.cpus {
            control.set_cpus(cpus)?;
        }
        Ok(())
    }

    fn target(&self) -> Option<Target> {
        let control = self.bus.control();
        Some(Target {
            memory: Some(ByteSize(control.memory())),
            cpus: Some(control.cpus()),
        })
    }

    fn devices(&self) -> Vec<DeviceInfo> {
        let mut described = self.described.clone();
        self.health.iter().for_each(|it| it.tell(&mut described));
        described
    }

    fn waits_for_room(&self) -> bool {
        self.health.iter().any(Health::waits_for_room)
    }

    fn metrics(&self) -> Metrics {
        let devices = self.bus.metrics();
        Metrics {
            devices: devices
                .into_iter()
                .map(|(name, counters)| (name, named(counters)))
                .collect(),
            vcpus: self
                .vcpus
                .iter()
                .enumerate()
                .map(|(index, vcpu)| {
                    let counters = vcpu.counters();
                    let mut all = vec![
                        ("exits_io", counters.io.get()),
                        ("exits_mmio", counters.mmio.get()),
                        ("kicks", counters.kicks.get()),
                        ("ring_full", counters.ring_full.get()),
                    ];
                    all.extend(self.domain.counters(index));
                    named(all)
                })
                .collect(),
            memory: memory_metrics(&self.domain.ram),
        }
    }
}

fn from_errno(error: super::abi::Errno) -> io::Error {
    io::Error::from_raw_os_error(error as i32)
}
