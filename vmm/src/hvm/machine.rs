//! Wiring a machine together, and its life as a whole.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use blanket_devices::legacy::generation;
use blanket_devices::legacy::power::Power;
use blanket_devices::legacy::serial::Serial;
use blanket_devices::lifecycle::{self, Lifecycle, SavedState};
use blanket_devices::pci::PciBus;
use blanket_devices::platform;
use blanket_devices::virtio::net::{Net, PassedNet};
use blanket_devices::virtio::pci::{BAR_SIZE, Context, VirtioPci};
use blanket_devices::virtio::{Device, blk::Block, console::Console, rng::Rng};
use blanket_devices::worker::{STACK, Workers};
use blanket_memory::GuestRam;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuFd, VmFd};
use vm_allocator::{AddressAllocator, AllocPolicy};

use super::boot::{Entry, Payload};
use super::bus::HvmBus;
use super::kvm::Host;
use super::parts::Parts;
use super::time::Stopped;
use super::wiring::KvmWiring;
use super::{cpuid, registers};
use crate::api::types::{self, DeviceInfo, Metrics, Target};
use crate::config::VmConfig;
use crate::jail::Class;
use crate::machine::health::{self, Health};
use crate::machine::open::{Attachment, Disk, Interface};
use crate::machine::{
    self, Error, RequestError, TargetError, dirty, furnish, kvm, lock, memory_metrics, named,
    resource, setup, spawn_workers,
};
use crate::vcpu::state::{VcpuState, set_cpuid};
use crate::vcpu::{Brake, EventSink, OnBus, Vcpu};
use blanket_drivers::cpu::Shown;
use blanket_drivers::rings::Rings;

/// An `hvm` machine.
///
/// Fields are dropped in order: first what runs, then what it runs on.
pub struct Machine {
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) bus: Arc<HvmBus>,
    pub(super) serial: Serial,
    pub(super) virtio: Vec<Arc<Mutex<VirtioPci>>>,
    described: Vec<DeviceInfo>,
    health: Vec<Health>,
    payload: Payload,
    /// Where the kernel starts that has been loaded and has not run.
    pub(super) loaded: Option<Entry>,
    /// The vCPUs' state after power-on, for resets.
    power_on: Vec<VcpuState>,
    pub(super) ram: GuestRam,
    /// What the first vCPU is told by CPUID.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    cpu: Shown,
    /// The MSRs that make up a vCPU's state.
    pub(super) msrs: Vec<u32>,
    pub(super) vm: Arc<VmFd>,
    rings: Option<Arc<Rings>>,
    /// The guest's clocks, while it is paused.
    pub(super) stopped: Option<Stopped>,
    _workers: Workers,
}

impl Machine {
    /// Puts `parts` together and loads the kernel. Threads are made here, each
    /// under its filter; the guest does not run yet.
    ///
    /// # Errors
    /// KVM or the kernel refuses something, or the guest's kernel cannot be
    /// loaded.
    pub fn build(config: &VmConfig, mut parts: Parts, events: &EventSink) -> Result<Self, Error> {
        populate(parts.payload.populate_loaded(&parts.ram))?;
        let entry = parts.payload.load(&parts.ram, config.cpus())?;
        let vm = Arc::new(parts.vm);
        let rings = dirty::enable(&vm, config)?;
        furnish(&vm, &parts.ram)?;
        let wiring = KvmWiring::new(vm.clone()).map_err(resource("set up interrupts"))?;
        let line = |gsi| wiring.line(gsi).map_err(resource("set up an interrupt"));
        let power = Power::new(line(platform::POWER_GSI)?);
        let serial_line = line(platform::SERIAL_GSI)?;
        let workers = spawn_workers(config.io_threads())?;
        let serial = Serial::new(parts.serial, serial_line, workers.clone())
            .map_err(resource("set up the serial port"))?;
        let mut builder = Builder {
            pci: PciBus::new(platform::PCI_WINDOW_START, platform::PCI_WINDOW_END),
            window: AddressAllocator::new(
                platform::PCI_WINDOW_START,
                platform::PCI_WINDOW_END - platform::PCI_WINDOW_START,
            )
            .map_err(Error::Window)?,
            wiring: Arc::new(wiring),
            workers: workers.clone(),
            ram: parts.ram.clone(),
            virtio: Vec::new(),
            described: Vec::new(),
            health: Vec::new(),
        };
        for (i, disk) in parts.disks.into_iter().enumerate() {
            builder.add_disk(i, disk, events)?;
        }
        for (i, interface) in parts.interfaces.into_iter().enumerate() {
            builder.add_interface(i, interface)?;
        }
        if let Some(port) = parts.console {
            builder.add(Box::new(Console::new("console0", port)), "virtio-console")?;
        }
        if config.rng.unwrap_or(true) {
            builder.add(Box::new(Rng::new("rng0")), "virtio-rng")?;
        }
        let bus = Arc::new(HvmBus {
            uart: serial.uart().clone(),
            power: Mutex::new(power),
            pci: builder.pci,
        });
        let fds = make_vcpus(&parts.host, &vm, config.cpus())?;
        let rings = dirty::map(&vm, &fds, rings)?;
        let (vcpus, power_on) = start_vcpus(fds, &parts.host.msrs, &bus, events, rings.as_ref())?;
        let cpuid = cpuid_of(&parts.host, 0, config.cpus());
        // Last: what maps memory meanwhile would wait for each page's zeroing.
        populate(parts.payload.populate_ahead(&parts.ram))?;
        Ok(Self {
            vcpus,
            bus,
            serial,
            virtio: builder.virtio,
            described: builder.described,
            health: builder.health,
            payload: parts.payload,
            loaded: Some(entry),
            power_on,
            ram: parts.ram,
            cpuid,
            cpu: parts.host.cpu,
            msrs: parts.host.msrs,
            vm,
            rings,
            stopped: None,
            _workers: workers,
        })
    }

    pub(super) fn power(&self) -> MutexGuard<'_, Power> {
        lock(&self.bus.power)
    }

    fn stop_vcpus(&self) {
        for vcpu in &self.vcpus {
            vcpu.pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
    }

    /// Takes every device a step further.
    fn each_device(
        &mut self,
        step: impl Fn(&mut dyn Lifecycle) -> Result<(), lifecycle::Error>,
    ) -> Result<(), lifecycle::Error> {
        for device in &self.virtio {
            step(&mut *lock(device))?;
        }
        step(&mut self.serial)?;
        step(&mut *self.power())
    }
}

impl machine::Machine for Machine {
    fn cpu(&self) -> &Shown {
        &self.cpu
    }

    fn kind(&self) -> types::Machine {
        types::Machine::Hvm
    }

    fn load(&mut self) -> Result<(), Error> {
        let entry = match self.loaded.take() {
            Some(entry) => entry,
            None => self.payload.load(&self.ram, self.vcpus.len() as u8)?,
        };
        let fd = self.vcpus[0].paused_fd();
        let power_on = fd.get_sregs().map_err(kvm("read registers"))?;
        fd.set_sregs(&registers::special(entry, &power_on))
            .map_err(kvm("set registers"))?;
        fd.set_regs(&registers::general(entry))
            .map_err(kvm("set registers"))
    }

    fn start(&mut self) -> Result<(), lifecycle::Error> {
        self.each_device(|device| device.start())?;
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), lifecycle::Error> {
        self.stop_vcpus();
        self.stopped = Some(Stopped::now(&self.vm));
        self.each_device(|device| device.pause())
    }

    fn resume(&mut self) -> Result<(), lifecycle::Error> {
        self.each_device(|device| device.resume())?;
        if let Some(stopped) = self.stopped.take() {
            stopped.go_on(&self.vm, &self.vcpus);
        }
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        // It starts anew, and so may its clocks.
        self.stopped = None;
        self.each_device(|device| device.reset())?;
        self.bus.pci.reroute();
        for (vcpu, state) in self.vcpus.iter().zip(&self.power_on) {
            state.write(&vcpu.paused_fd())?;
        }
        self.load()
    }

    fn halt(&mut self) {
        self.stop_vcpus();
        let halted = self.each_device(|device| {
            device.halt();
            Ok(())
        });
        debug_assert!(halted.is_ok(), "halt cannot fail");
    }

    fn press_power_button(&mut self) -> Result<(), lifecycle::Error> {
        self.power()
            .press_button()
            .map_err(|error| lifecycle::Error::Device {
                device: "power button".to_owned(),
                message: error.to_string(),
            })
    }

    fn set_name(&mut self, name: &str) -> Result<(), lifecycle::Error> {
        generation::set_name(&self.ram, name).map_err(|error| lifecycle::Error::Device {
            device: "name".to_owned(),
            message: error.to_string(),
        })
    }

    fn new_generation(&mut self) -> Result<(), lifecycle::Error> {
        let failed = |message: String| lifecycle::Error::Device {
            device: "generation ID".to_owned(),
            message,
        };
        generation::renew(&self.ram).map_err(|error| failed(error.to_string()))?;
        let told = self.power().tell_generation();
        told.map_err(|error| failed(error.to_string()))
    }

    fn suspend(&mut self) -> Result<(), RequestError> {
        Err(RequestError::NoSuspension)
    }

    fn press_sysrq(&mut self, _: char) -> Result<(), RequestError> {
        Err(RequestError::NoSysRq)
    }

    fn is_suspended(&self) -> bool {
        false
    }

    fn memory(&self) -> &GuestRam {
        &self.ram
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

    fn set_target(&mut self, _: &Target) -> Result<(), TargetError> {
        Err(TargetError::Fixed)
    }

    fn target(&self) -> Option<Target> {
        None
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
        Metrics {
            devices: self
                .virtio
                .iter()
                .map(|device| {
                    let device = lock(device);
                    (device.name().to_owned(), named(device.metrics()))
                })
                .chain([("serial".to_owned(), named(self.serial.metrics()))])
                .collect(),
            vcpus: self
                .vcpus
                .iter()
                .map(|vcpu| {
                    let counters = vcpu.counters();
                    named(vec![
                        ("exits_io", counters.io.get()),
                        ("exits_mmio", counters.mmio.get()),
                        ("kicks", counters.kicks.get()),
                        ("ring_full", counters.ring_full.get()),
                    ])
                })
                .collect(),
            memory: memory_metrics(&self.ram),
        }
    }
}

/// Starts a thread that populates memory for the kernel; it ends by itself.
fn populate(work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let confine = setup(Class::Populate);
    std::thread::Builder::new()
        .name("populate".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            // Unconfined it does not go on; the kernel loads all the same.
            if confine().is_ok() {
                work();
            }
        })
        .map(drop)
        .map_err(resource("start a thread"))
}

/// What processor `index` of `count` says of itself.
fn cpuid_of(host: &Host, index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let mut cpuid = host.cpu.cpuid.clone();
    cpuid::adapt(&mut cpuid, index, count, host.deadline_timer);
    cpuid
}

fn make_vcpus(host: &Host, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, Error> {
    let mut fds = Vec::new();
    for index in 0..count {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(kvm("create a vCPU"))?;
        set_cpuid(&fd, &cpuid_of(host, index, count))?;
        fds.push(fd);
    }
    Ok(fds)
}

/// Starts their threads, at rest; and their state after power-on.
fn start_vcpus(
    fds: Vec<VcpuFd>,
    msrs: &[u32],
    bus: &Arc<HvmBus>,
    events: &EventSink,
    rings: Option<&Arc<Rings>>,
) -> Result<(Vec<Vcpu>, Vec<VcpuState>), Error> {
    let power_on = fds
        .iter()
        .map(|fd| VcpuState::read(fd, msrs))
        .collect::<Result<Vec<_>, _>>()?;
    let vcpus = fds
        .into_iter()
        .zip(0u8..)
        .map(|(fd, index)| {
            let processor = Box::new(OnBus(bus.clone()));
            let (events, setup) = (events.clone(), setup(Class::Vcpu));
            Vcpu::spawn(index, fd, processor, events, setup, rings.cloned())
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(resource("start a vCPU"))?;
    Ok((vcpus, power_on))
}

/// The machine's devices while it is being built.
struct Builder {
    pci: PciBus,
    /// What is left of the memory for BARs.
    window: AddressAllocator,
    wiring: Arc<KvmWiring>,
    workers: Workers,
    ram: GuestRam,
    virtio: Vec<Arc<Mutex<VirtioPci>>>,
    described: Vec<DeviceInfo>,
    health: Vec<Health>,
}

impl Builder {
    fn add_disk(&mut self, index: usize, disk: Disk, events: &EventSink) -> Result<(), Error> {
        let engine = health::engine(&disk.image);
        let name = format!("blk{index}");
        let volumes = disk.image.devices().to_vec();
        let capacity = disk.image.capacity();
        let device = Block::new(
            &name,
            disk.image,
            disk.serial.as_deref(),
            disk.queues,
            || setup(Class::Store),
        )?;
        let health = Health::new(&name, volumes, device.counters(), events);
        self.health.push(health);
        let info = self.add(Box::new(device), "virtio-blk")?;
        info.path = Some(disk.path);
        info.capacity = Some(capacity);
        info.engine = Some(engine);
        Ok(())
    }

    fn add_interface(&mut self, index: usize, interface: Interface) -> Result<(), Error> {
        let name = format!("net{index}");
        let failed = resource("set up a network interface");
        let (mac, mtu) = (interface.mac, interface.mtu);
        let info = match interface.attachment {
            Attachment::Tap(tap) => {
                let net = Net::new(name, tap, mac, mtu).map_err(failed)?;
                let tap = net.tap_name().to_owned();
                let info = self.add(Box::new(net), "virtio-net")?;
                info.tap = Some(tap);
                info
            }
            Attachment::VhostUser(backend) => {
                let path = backend.path().to_owned();
                let net = backend
                    .keep(|| setup(Class::VhostUser))
                    .and_then(|backend| PassedNet::new(name, backend, &self.ram, mac, mtu))
                    .map_err(failed)?;
                let info = self.add(Box::new(net), "virtio-net")?;
                info.vhost_user = Some(path);
                info
            }
        };
        info.mac = Some(mac);
        Ok(())
    }

    /// Puts a device on the bus and describes it.
    fn add(&mut self, device: Box<dyn Device>, kind: &str) -> Result<&mut DeviceInfo, Error> {
        let name = device.name().to_owned();
        let index = self.virtio.len();
        let bar = self
            .window
            .allocate(BAR_SIZE, BAR_SIZE, AllocPolicy::FirstMatch)
            .map_err(Error::Window)?;
        let context = Context {
            ram: self.ram.clone(),
            wiring: self.wiring.clone(),
            workers: self.workers.clone(),
            bar: bar.start(),
            first_worker: index,
        };
        let transport = VirtioPci::new(device, context).map_err(resource("add a device"))?;
        let transport = Arc::new(Mutex::new(transport));
        let slot = self
            .pci
            .add(transport.clone())
            .map_err(resource("add a device"))?;
        self.virtio.push(transport);
        self.described.push(DeviceInfo {
            name,
            kind: kind.to_owned(),
            address: Some(format!("00:{slot:02x}.0")),
            ..DeviceInfo::default()
        });
        Ok(&mut self.described[index])
    }
}
