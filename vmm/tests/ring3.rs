//! A vCPU, guest memory and the exits between them on this machine's own
//! `/dev/kvm`, with a program in ring 3: it runs at native speed also where
//! KVM has no hardware virtualization.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod user;

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blanket_memory::{Backing, GuestRam, Spec};
use blanket_vmm::vcpu::state::VcpuState;
use blanket_vmm::vcpu::{Bus, Event, OnBus, Outcome, Vcpu};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{Bytes, GuestAddress};

const PATTERN: u64 = 0x424c_414e_4b45_5421;
const END: u32 = 0x0e4d_0e4d;
const PORT: u16 = 0x500;
const SCRATCH: u64 = 0x10_0000;
const SCRATCH_LEN: u64 = 0x8000;
/// Behind the guest's 16 MiB.
const DEVICE: u64 = 0x200_0000;

/// Writes down what the guest does.
#[derive(Default)]
struct Recorder {
    port_writes: Mutex<Vec<Vec<u8>>>,
    device_writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Bus for Recorder {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        assert_eq!(port, PORT);
        data.fill(0xa5);
    }
    fn write_port(&self, port: u16, data: &[u8]) -> Outcome {
        assert_eq!(port, PORT);
        if data == END.to_le_bytes() {
            return Outcome::Event(Event::PowerOff);
        }
        self.port_writes.lock().unwrap().push(data.to_vec());
        Outcome::Continue
    }
    fn read_memory(&self, addr: u64, data: &mut [u8]) {
        assert_eq!(addr, DEVICE);
        data.fill(0x5a);
    }
    fn write_memory(&self, addr: u64, data: &[u8]) -> Outcome {
        let mut writes = self.device_writes.lock().unwrap();
        writes.push((addr, data.to_vec()));
        Outcome::Continue
    }
}

/// A VM whose one vCPU is about to run the payload in ring 3.
struct Guest {
    ram: GuestRam,
    recorder: Arc<Recorder>,
    vcpu: Vcpu,
    events: Receiver<Event>,
    // The last to go: KVM's own handle.
    _vm: VmFd,
}

/// Why the test cannot be run here, if so.
fn missing() -> Option<String> {
    if let Err(error) = Kvm::new() {
        return Some(format!("/dev/kvm cannot be used: {error}"));
    }
    std::env::var_os("BLANKET_FIRMWARE_DIR")
        .is_none()
        .then(|| "the payloads are not built: run `cargo xtask test`".to_owned())
}

fn load(ram: &GuestRam) -> u64 {
    let folder = std::env::var_os("BLANKET_FIRMWARE_DIR").unwrap();
    let mut file = std::fs::File::open(Path::new(&folder).join("ring3")).unwrap();
    Elf::load(ram, None, &mut file, None).unwrap().kernel_load.0
}

fn guest() -> Guest {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let ram = blanket_memory::build(&Spec {
        size: 16 << 20,
        backing: Backing::Transparent,
        shared: true,
    })
    .unwrap();
    // The guest's memory outlives its vCPU: see the order in Guest.
    user::map(&vm, &ram, 0);
    let entry = load(&ram);
    user::tables(&ram);
    let fd = vm.create_vcpu(0).unwrap();
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    fd.set_cpuid2(&cpuid.unwrap()).unwrap();
    let regs = kvm_regs {
        rip: entry,
        rdi: SCRATCH,
        rsi: SCRATCH_LEN,
        rdx: u64::from(PORT),
        rcx: DEVICE,
        r8: 20_000_000,
        ..Default::default()
    };
    user::enter(&fd, &regs);
    let recorder = Arc::new(Recorder::default());
    let (sender, events) = channel();
    let sink = Arc::new(move |event| sender.send(event).unwrap());
    let vcpu = Vcpu::spawn(
        0,
        fd,
        Box::new(OnBus(recorder.clone())),
        sink,
        Box::new(|| Ok(())),
        None,
    )
    .unwrap();
    Guest {
        ram,
        recorder,
        vcpu,
        events,
        _vm: vm,
    }
}

/// What the guest must have done by its end.
fn check(guest: &Guest) {
    let word = |i: u64| -> u64 { guest.ram.read_obj(GuestAddress(SCRATCH + 8 * i)).unwrap() };
    let words = SCRATCH_LEN / 8;
    assert!((4..words).all(|i| word(i) == PATTERN ^ (SCRATCH + 8 * i)));
    let sum = (0..words).fold(0u64, |sum, i| sum.wrapping_add(PATTERN ^ (SCRATCH + 8 * i)));
    let sum = sum.to_le_bytes();
    assert_eq!(
        *guest.recorder.port_writes.lock().unwrap(),
        [&sum[..1], &sum[..2], &sum[..4]]
    );
    assert_eq!([word(0), word(1), word(2)], [0xa5, 0xa5a5, 0xa5a5_a5a5]);
    let pattern = PATTERN.to_le_bytes();
    let written: Vec<_> = [1, 2, 4, 8]
        .iter()
        .map(|len| (DEVICE, pattern[..*len].to_vec()))
        .collect();
    assert_eq!(*guest.recorder.device_writes.lock().unwrap(), written);
    assert_eq!(word(3), 0x5a5a_5a5a_5a5a_5a5a);
}

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn memory_ports_and_device_memory_work_at_every_width() {
    if let Some(reason) = missing() {
        println!("skipped, because {reason}");
        return;
    }
    let guest = guest();
    guest.vcpu.resume();
    assert_eq!(guest.events.recv_timeout(LIMIT).unwrap(), Event::PowerOff);
    guest.vcpu.wait_paused();
    check(&guest);
    assert_eq!(
        guest.vcpu.counters().io.get(),
        7,
        "3 writes, 3 reads, the end"
    );
    assert_eq!(guest.vcpu.counters().mmio.get(), 5);
}

#[test]
fn a_vcpu_stopped_anywhere_and_carried_over_ends_with_the_same_result() {
    if let Some(reason) = missing() {
        println!("skipped, because {reason}");
        return;
    }
    let guest = guest();
    let mut stops = 0;
    loop {
        guest.vcpu.resume();
        if let Ok(event) = guest.events.recv_timeout(Duration::from_micros(300)) {
            assert_eq!(event, Event::PowerOff);
            break;
        }
        guest.vcpu.pause();
        guest.vcpu.wait_paused();
        if let Ok(event) = guest.events.try_recv() {
            assert_eq!(event, Event::PowerOff);
            break;
        }
        stops += 1;
        // Out of the vCPU, through the encoding, and into it again.
        let fd = guest.vcpu.paused_fd();
        let saved = VcpuState::read(&fd, &[]).unwrap().pack().unwrap();
        fd.set_regs(&kvm_regs::default()).unwrap();
        VcpuState::unpack(&saved).unwrap().write(&fd).unwrap();
    }
    guest.vcpu.wait_paused();
    assert!(stops > 0, "the loop runs longer than a stop takes");
    check(&guest);
}
