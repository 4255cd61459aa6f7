//! The PCI bus with an entropy source, a console and a disk: configuration
//! space by ECAM and ports, BARs, virtio handshakes that start handlers on
//! workers, rings of garbage, moves and resets. No access panics or hangs,
//! functions keep their identity, BARs never lie outside the window or on each
//! other, and a reset machine is as it was built and serves a good driver.
#![no_main]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use blanket_devices::char::{CharPort, Spec};
use blanket_devices::lifecycle::{Lifecycle, SavedState};
use blanket_devices::pci::PciBus;
use blanket_devices::virtio::console::Console;
use blanket_devices::virtio::pci::VirtioPci;
use blanket_devices::virtio::rng::Rng;
use blanket_fuzz::guest::{BUFFERS, Buffer, RAM, Rings, STRIDE, Setup, ram};
use blanket_fuzz::machine::{BAR_SIZE, BARS, disk, virtio};
use blanket_memory::GuestRam;
use libfuzzer_sys::fuzz_target;

const WINDOW_END: u64 = BARS + (1 << 20);
/// Slots of the devices: behind the host bridge.
const DEVICES: usize = 3;
/// The BAR's notifications (virtio 1.2, 4.1.4.4), as this transport lays it out.
const NOTIFY: u64 = 0x3000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// An access by ECAM; a write if there is a value.
    Ecam {
        slot: u8,
        register: u16,
        size: Size,
        value: Option<u64>,
    },
    /// An access to ports 0xcf8 to 0xcff.
    Port {
        offset: u8,
        size: Size,
        value: Option<u64>,
    },
    /// An access to a device's BAR where it was at first.
    Bar {
        slot: u8,
        offset: u16,
        size: Size,
        value: Option<u64>,
    },
    /// An access to a common configuration register.
    Common {
        slot: u8,
        offset: u8,
        size: Size,
        value: u64,
    },
    /// An access anywhere in the bus's memory.
    Memory {
        address: u32,
        size: Size,
        value: Option<u64>,
    },
    /// A driver's handshake as far as it should go.
    SetUp {
        slot: u8,
        features: u64,
        queue: Setup,
    },
    /// A chain for a queue, and a notification.
    Request {
        slot: u8,
        queue: u8,
        buffers: Vec<Buffer>,
    },
    /// Garbage in guest memory.
    Garbage { at: u16, bytes: Vec<u8> },
    /// The VM moves.
    Move,
    /// The machine is reset.
    Reset,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    One,
    Two,
    Four,
    Eight,
}

struct Machine {
    bus: PciBus,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    built: Vec<SavedState>,
    rings: Vec<Rings>,
    ram: GuestRam,
}

impl Machine {
    fn new() -> Self {
        let ram = ram();
        let port = CharPort::open(&Spec::default()).expect("a port that leads nowhere");
        let rng = virtio(Box::new(Rng::new("rng0")), &ram, 0);
        let console = virtio(Box::new(Console::new("console0", port)), &ram, 1);
        let disk = virtio(Box::new(disk(64 << 10)), &ram, 2);
        let mut bus = PciBus::new(BARS, WINDOW_END);
        let devices: Vec<_> = [rng, console, disk]
            .into_iter()
            .map(|device| Arc::new(Mutex::new(device)))
            .collect();
        for device in &devices {
            bus.add(device.clone()).expect("a free slot");
        }
        let mut machine = Self {
            bus,
            devices,
            built: Vec::new(),
            rings: Vec::new(),
            ram,
        };
        machine.built = machine.saved();
        machine.rings = (0..2 * DEVICES)
            .map(|i| {
                Rings::new(
                    i,
                    64,
                    Setup {
                        size: 4,
                        ..Setup::default()
                    },
                )
            })
            .collect();
        machine
    }

    fn each(&self, mut act: impl FnMut(&mut VirtioPci)) {
        for device in &self.devices {
            act(&mut device.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn saved(&self) -> Vec<SavedState> {
        let mut all = Vec::new();
        self.each(|device| all.push(device.save().expect("a state to save")));
        all
    }

    fn reset(&self) {
        self.each(|device| device.pause().expect("a rest"));
        self.each(|device| device.reset().expect("a reset"));
        self.bus.reroute();
        assert_eq!(self.saved(), self.built);
        self.each(|device| device.resume().expect("a worker"));
    }

    fn carry_over(&self) {
        self.each(|device| device.pause().expect("a rest"));
        let saved = self.saved();
        let mut states = saved.iter();
        self.each(|device| {
            device
                .restore(states.next().expect("one each"))
                .expect("its own state");
        });
        assert_eq!(self.saved(), saved);
        self.bus.reroute();
        self.each(|device| device.resume().expect("a worker"));
    }

    fn memory(&self, address: u64, size: Size, value: Option<u64>) {
        let mut data = value.unwrap_or_default().to_le_bytes();
        let data = &mut data[..bytes(size)];
        if value.is_some() {
            self.bus.write_memory(address, data);
        } else {
            self.bus.read_memory(address, data);
        }
    }

    fn write(&self, slot: usize, offset: u64, bytes: &[u8]) {
        let address = BARS + slot as u64 * BAR_SIZE + offset;
        self.bus.write_memory(address, bytes);
    }

    /// Steps 1 to 8 of virtio 1.2, 3.1.1, for all queues alike.
    fn set_up(&mut self, slot: usize, features: u64, setup: Setup) {
        self.write(slot, 20, &[0]);
        self.write(slot, 20, &[3]);
        for (word, value) in [features as u32, (features >> 32) as u32 | 1]
            .iter()
            .enumerate()
        {
            self.write(slot, 8, &(word as u32).to_le_bytes());
            self.write(slot, 12, &value.to_le_bytes());
        }
        self.write(slot, 20, &[11]);
        for queue in 0..2 {
            let index = 2 * slot + queue;
            let rings = Rings::new(index, 64, setup);
            rings.begin(&self.ram);
            let [descriptors, available, used] = rings.addresses();
            self.write(slot, 22, &(queue as u16).to_le_bytes());
            self.write(slot, 24, &rings.size.to_le_bytes());
            self.write(slot, 32, &descriptors.to_le_bytes());
            self.write(slot, 40, &available.to_le_bytes());
            self.write(slot, 48, &used.to_le_bytes());
            self.write(slot, 28, &u16::from(!setup.absent).to_le_bytes());
            self.rings[index] = rings;
        }
        self.write(slot, 20, &[15]);
    }

    fn request(&mut self, slot: usize, queue: usize, buffers: &[Buffer]) {
        let chain: Vec<_> = buffers
            .iter()
            .map(|buffer| {
                let at = BUFFERS + u64::from(buffer.at) * 8 % (RAM - BUFFERS);
                Rings::write(&self.ram, at, &buffer.bytes);
                let len = usize::from(buffer.len).max(buffer.bytes.len());
                (at, len as u32, buffer.writable)
            })
            .collect();
        self.rings[2 * slot + queue].offer(&self.ram, &chain, false);
        self.write(
            slot,
            NOTIFY + 4 * queue as u64,
            &(queue as u16).to_le_bytes(),
        );
    }

    fn step(&mut self, step: Step) {
        let device = |slot: u8| usize::from(slot) % DEVICES;
        match step {
            Step::Ecam {
                slot,
                register,
                size,
                value,
            } => {
                let address = u64::from(slot % 8) << 15 | u64::from(register % 0x1000);
                let mut data = value.unwrap_or_default().to_le_bytes();
                let data = &mut data[..bytes(size)];
                if value.is_some() {
                    self.bus.write_ecam(address, data);
                } else {
                    self.bus.read_ecam(address, data);
                }
            }
            Step::Port {
                offset,
                size,
                value,
            } => {
                let mut data = value.unwrap_or_default().to_le_bytes();
                let data = &mut data[..bytes(size)];
                if value.is_some() {
                    self.bus.write_port(u16::from(offset % 8), data);
                } else {
                    self.bus.read_port(u16::from(offset % 8), data);
                }
            }
            Step::Bar {
                slot,
                offset,
                size,
                value,
            } => {
                let offset = u64::from(offset) % BAR_SIZE;
                self.memory(BARS + device(slot) as u64 * BAR_SIZE + offset, size, value);
            }
            Step::Common {
                slot,
                offset,
                size,
                value,
            } => {
                let address = BARS + device(slot) as u64 * BAR_SIZE + u64::from(offset % 64);
                self.memory(address, size, Some(value));
                self.memory(address, size, None);
            }
            Step::Memory {
                address,
                size,
                value,
            } => {
                self.memory(u64::from(address) | BARS, size, value);
            }
            Step::SetUp {
                slot,
                features,
                queue,
            } => self.set_up(device(slot), features, queue),
            Step::Request {
                slot,
                queue,
                buffers,
            } => {
                self.request(device(slot), usize::from(queue % 2), &buffers);
            }
            Step::Garbage { at, bytes } => {
                Rings::write(&self.ram, u64::from(at) * 4, &bytes);
            }
            Step::Move => self.carry_over(),
            Step::Reset => self.reset(),
        }
    }

    fn check_identities(&self) {
        for (slot, expected) in [0x0008_1b36u32, 0x1044_1af4, 0x1043_1af4, 0x1042_1af4, !0]
            .iter()
            .enumerate()
        {
            let mut id = [0; 4];
            self.bus.read_ecam((slot as u64) << 15, &mut id);
            assert_eq!(u32::from_le_bytes(id), *expected);
        }
    }

    /// A driver that behaves gets entropy.
    fn check_service(&mut self) {
        let good = Setup {
            size: 4,
            ..Setup::default()
        };
        self.set_up(0, 0, good);
        let mut status = [0];
        self.bus.read_memory(BARS + 20, &mut status);
        assert_eq!(status, [15]);
        let buffer = Buffer {
            writable: true,
            at: 0,
            len: 16,
            bytes: Vec::new(),
        };
        self.request(0, 0, &[buffer]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.rings[0].used_index(&self.ram) != 1 {
            assert!(Instant::now() < deadline, "no entropy");
            std::thread::sleep(Duration::from_micros(20));
        }
        assert_eq!(self.rings[0].last_used_len(&self.ram), 16);
    }
}

fn bytes(size: Size) -> usize {
    match size {
        Size::One => 1,
        Size::Two => 2,
        Size::Four => 4,
        Size::Eight => 8,
    }
}

fuzz_target!(|steps: Vec<Step>| {
    const { assert!(2 * DEVICES as u64 * STRIDE <= BUFFERS) };
    let mut machine = Machine::new();
    for step in steps {
        machine.step(step);
    }
    machine.check_identities();
    machine.reset();
    machine.check_service();
    machine.each(Lifecycle::halt);
});
