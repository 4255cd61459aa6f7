//! A malicious guest: writes garbage to every register and ring that it finds,
//! many times over, and says at the end whether the machine is still there.
//!
//! Command line: `seed=N` (which garbage; 1), `rounds=N` (30), and
//! `devices-only`, which leaves the chipset alone: for machines, unlike
//! Blanket's, whose chipset lets a guest harm itself.
//!
//! What it says: `evil: survived N rounds`, or `evil: lost` and the function
//! that no longer answers. Memory below [`arena::START`] is its own, so no
//! device is ever told of an address there. Whatever is an attack on the guest
//! itself is left out: interrupt messages that would reset the processor, and
//! the registers that switch the machine off.
#![no_std]
#![no_main]

mod arena;
mod registers;
mod rings;
mod virtio;

use blanket_firmware::acpi::Tables;
use blanket_firmware::boot::StartInfo;
use blanket_firmware::pci::{Bar, Ecam, Function};
use blanket_firmware::random::Random;
use blanket_firmware::{console, entry, power, say};

use arena::Arena;
use virtio::Device;

entry!(main);

const FUNCTIONS_MAX: usize = 64;
const DEFAULT_ROUNDS: u64 = 30;

/// A function under attack.
#[derive(Clone, Copy)]
struct Target {
    function: Function,
    bars: [Bar; 6],
    virtio: Option<Device>,
}

impl Target {
    fn is_alive(&self) -> bool {
        let identity = self.function.read(0, blanket_firmware::io::Width::Long) as u32;
        identity == self.function.identity && self.virtio.is_none_or(|device| device.reset())
    }
}

fn main(info: &StartInfo) -> ! {
    let rounds = info.number("rounds").unwrap_or(DEFAULT_ROUNDS);
    let seed = info.number("seed").unwrap_or(1);
    let devices_only = info.has("devices-only");
    let Some(arena) = info.ram_end(arena::START).and_then(Arena::new) else {
        panic!("evil: needs 64 MiB of memory and a memory map");
    };
    let Some(ecam) = Tables::find(info.rsdp()).and_then(|tables| Ecam::find(&tables)) else {
        panic!("evil: no ECAM");
    };

    let mut slots = [const { None }; FUNCTIONS_MAX];
    let mut free = 0;
    for (slot, function) in slots.iter_mut().zip(ecam.functions()) {
        if devices_only && function.is_bridge() {
            continue;
        }
        let bars = function.setup(ecam, &mut free);
        *slot = Some(Target {
            function,
            bars,
            virtio: Device::find(&function, &bars),
        });
    }
    let targets = || slots.iter().flatten();
    say!(
        "evil: seed {seed}, {} functions, {} of them virtio",
        targets().count(),
        targets().filter(|target| target.virtio.is_some()).count()
    );

    let mut random = Random::new(seed);
    for round in 0..rounds {
        if round % 10 == 0 {
            say!("evil: round {round} of {rounds}");
        }
        for target in targets() {
            attack(target, &arena, &mut random, round);
        }
        if !devices_only {
            registers::ports(&mut random);
            registers::addresses(&mut random);
            console::init();
        }
    }
    let mut lost = targets().filter(|target| !target.is_alive());
    if let Some(target) = lost.next() {
        say!("evil: lost function {:#06x}", target.function.id);
    } else {
        say!("evil: survived {rounds} rounds");
    }
    power::off()
}

/// One round against one function, which is left reset.
fn attack(target: &Target, arena: &Arena, random: &mut Random, round: u64) {
    let Target {
        function,
        bars,
        virtio,
    } = target;
    // The first round visits each register, later ones hit at random.
    registers::configuration(function, random, round == 0);
    registers::disarm(function);
    function.restore(bars);
    if let Some(device) = virtio {
        device.garbage_registers(random);
        device.reset();
        for _ in 0..4 {
            rings::attack(device, arena, random);
        }
    }
    registers::bars(target, random);
    if let Some(device) = virtio {
        device.reset();
    }
}
