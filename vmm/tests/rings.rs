//! KVM's dirty rings under a guest that writes all the time: what was taken from
//! them and read is its memory in the end.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod user;

use std::sync::Arc;
use std::time::Duration;

use blanket_drivers::rings::{self, Rings};
use blanket_memory::dirty::{PAGE, Pages};
use blanket_memory::{Backing, GuestRam, Spec};
use blanket_vmm::vcpu::{Bus, OnBus, Outcome, Vcpu};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 64 << 20;
/// What the guest writes: twice as many pages as a ring has entries.
const AREA: u64 = 16 << 20;
const PAGES: u64 = 8192;
const CODE: u64 = 0x10_0000;

/// Adds one to a word of each of RSI pages from RDI on, for ever.
const PROGRAM: [u8; 23] = [
    0x48, 0x89, 0xf9, // mov rcx, rdi
    0x48, 0x89, 0xf2, // mov rdx, rsi
    0x48, 0xff, 0x01, // inc qword [rcx]
    0x48, 0x81, 0xc1, 0x00, 0x10, 0x00, 0x00, // add rcx, 4096
    0x48, 0xff, 0xca, // dec rdx
    0x75, 0xf1, // to the third
    0xeb, 0xe9, // to the first
];

/// The guest uses no devices.
struct Nothing;

impl Bus for Nothing {
    fn read_port(&self, port: u16, _: &mut [u8]) {
        panic!("port {port}");
    }
    fn write_port(&self, port: u16, _: &[u8]) -> Outcome {
        panic!("port {port}");
    }
    fn read_memory(&self, addr: u64, _: &mut [u8]) {
        panic!("memory {addr:#x}");
    }
    fn write_memory(&self, addr: u64, _: &[u8]) -> Outcome {
        panic!("memory {addr:#x}");
    }
}

struct Guest {
    vcpus: Vec<Vcpu>,
    rings: Arc<Rings>,
    ram: GuestRam,
    vm: Arc<VmFd>,
}

/// Two vCPUs that write; none if there are no rings here.
fn guest() -> Option<Guest> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("skipped, because /dev/kvm cannot be used: {error}");
            return None;
        }
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let entries = match rings::enable(&vm, MEMORY) {
        Ok(entries) => entries,
        Err(error) => {
            println!("skipped, because KVM has no dirty rings: {error}");
            return None;
        }
    };
    assert_eq!(entries, 4096);
    let ram = blanket_memory::build(&Spec {
        size: MEMORY,
        backing: Backing::Transparent,
        shared: false,
    });
    let ram = ram.unwrap();
    user::map(&vm, &ram, 0);
    user::tables(&ram);
    ram.write_slice(&PROGRAM, GuestAddress(CODE)).unwrap();
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    let cpuid = cpuid.unwrap();
    let fds: Vec<_> = [(0, PAGES, 0u64), (1, 64, 8)]
        .map(|(index, pages, word)| {
            let fd = vm.create_vcpu(index).unwrap();
            fd.set_cpuid2(&cpuid).unwrap();
            let regs = kvm_regs {
                rip: CODE,
                rdi: AREA + word,
                rsi: pages,
                ..Default::default()
            };
            user::enter(&fd, &regs);
            fd
        })
        .into();
    let rings = Arc::new(Rings::map(Arc::clone(&vm), &fds, entries).unwrap());
    let vcpus = (0..).zip(fds).map(|(index, fd)| {
        let bus = Box::new(OnBus(Arc::new(Nothing)));
        let sink = Arc::new(|event| panic!("{event:?}"));
        let (setup, rings) = (Box::new(|| Ok(())), Arc::clone(&rings));
        Vcpu::spawn(index, fd, bus, sink, setup, Some(rings)).unwrap()
    });
    Some(Guest {
        vcpus: vcpus.collect(),
        rings,
        ram,
        vm,
    })
}

impl Guest {
    fn run(&self) {
        self.vcpus.iter().for_each(Vcpu::resume);
    }

    fn pause(&self) {
        self.vcpus.iter().for_each(Vcpu::pause);
        self.vcpus.iter().for_each(Vcpu::wait_paused);
    }

    fn start(&self) {
        self.rings.start(&self.ram).unwrap();
        user::map(&self.vm, &self.ram, KVM_MEM_LOG_DIRTY_PAGES);
    }

    fn stop(&self) {
        user::map(&self.vm, &self.ram, 0);
        self.rings.stop();
    }

    fn memory(&self) -> Vec<u8> {
        let mut all = vec![0; MEMORY as usize];
        self.ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }

    /// Takes what was written and reads it; how many pages that was.
    fn copy(&self, copy: &mut [u8]) -> u64 {
        let pages: Pages = self.rings.take(&self.ram).unwrap();
        for (at, len) in pages.runs(&self.ram, 16 * PAGE) {
            let range = at.0 as usize..at.0 as usize + len;
            self.ram.read_slice(&mut copy[range], at).unwrap();
        }
        pages.count()
    }

    fn ring_full(&self) -> u64 {
        self.vcpus[0].counters().ring_full.get()
    }
}

fn differing(one: &[u8], other: &[u8]) -> Vec<usize> {
    let pages = one.chunks(PAGE).zip(other.chunks(PAGE)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect()
}

#[test]
fn no_page_that_a_guest_writes_is_lost() {
    let Some(guest) = guest() else { return };
    guest.run();
    // Again and again: what is left in the rings of the last time does no harm.
    for time in 0..4 {
        guest.start();
        let mut copy = guest.memory();
        let mut found = 0;
        for round in 0..30 {
            std::thread::sleep(Duration::from_millis(round % 7));
            if round % 5 == 4 {
                // It stops and goes on with whatever is in its ring.
                guest.pause();
                guest.run();
            }
            found += guest.copy(&mut copy);
        }
        guest.pause();
        found += guest.copy(&mut copy);
        assert_eq!(differing(&guest.memory(), &copy), [0; 0], "time {time}");
        assert!(found > PAGES, "{found}");
        // At rest, it writes nothing.
        assert_eq!(guest.copy(&mut copy), 0);
        guest.stop();
        guest.run();
    }
    assert!(guest.ring_full() > 0, "more pages than a ring has entries");
    guest.pause();
}

#[test]
fn a_full_ring_holds_nobody_up_that_is_not_asked() {
    let Some(guest) = guest() else { return };
    guest.start();
    guest.run();
    // Nobody takes what there is, and still it writes.
    let word = || -> u64 { guest.ram.read_obj(GuestAddress(AREA)).unwrap() };
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while word() < 10 || guest.ring_full() < 10 {
        assert!(std::time::Instant::now() < end, "{}", guest.ring_full());
        std::thread::sleep(Duration::from_millis(1));
    }
    // Nothing is lost of that.
    guest.pause();
    let pages = guest.rings.take(&guest.ram).unwrap();
    assert!(pages.count() >= PAGES, "{}", pages.count());
    guest.stop();
}
