use super::*;
use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use blanket_memory::GuestRam;
use blanket_pv_shim::layout::{self, Data};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::pv::cpuid::{Source, Visible};
use crate::pv::domain::{Cpu, Trap};
use crate::pv::events::{Events, Places, Status};
use crate::pv::shim::Area;
use crate::pv::time::Time;

const MEMORY: u64 = 1 << 20;
const VCPUS: usize = 2;
/// Where the page tables are: they map all memory to itself, but for one page.
const TABLES: u64 = 0x1000;
const HOLE: u64 = 0x8_0000;
/// Where arguments point to, mostly.
const ARENA: u64 = 0x4_0000;

/// A VM without vCPUs and what KVM supports; None where there is no KVM.
fn vm() -> Option<&'static (Arc<VmFd>, kvm_bindings::CpuId)> {
    static VM: OnceLock<Option<(Arc<VmFd>, kvm_bindings::CpuId)>> = OnceLock::new();
    VM.get_or_init(|| {
        let kvm = Kvm::new().ok()?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?;
        Some((Arc::new(kvm.create_vm().ok()?), supported))
    })
    .as_ref()
}

fn page_tables(ram: &GuestRam) {
    const FLAGS: u64 = 0x67;
    let put = |value: u64, at: u64| ram.write_obj(value, GuestAddress(at)).unwrap();
    for level in 0..3 {
        put(
            TABLES + (level + 1) * 0x1000 + FLAGS,
            TABLES + level * 0x1000,
        );
    }
    for page in 0..MEMORY >> 12 {
        if page << 12 != HOLE {
            put(page << 12 | FLAGS, TABLES + 0x3000 + page * 8);
        }
    }
}

fn domain(supported: &kvm_bindings::CpuId) -> Option<Domain> {
    let area = layout::M2P + (1 << 20);
    let ranges = [
        (GuestAddress(0), MEMORY as usize),
        (GuestAddress(layout::GPA), area as usize),
    ];
    let ram = GuestRam::from_ranges(&ranges).unwrap();
    Area::new(&ram, MEMORY, VCPUS).build(false).unwrap();
    page_tables(&ram);
    let cpus: Vec<Cpu> = (0..VCPUS)
        .map(|_| Cpu::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
        .collect();
    let places = Places {
        shared_info: GuestAddress(layout::GPA + layout::SHARED_INFO),
        doorbells: GuestAddress(layout::GPA + layout::DOORBELLS),
    };
    let (wake, register) = (Arc::new(|_| ()), Arc::new(|_: &EventFd, _, _| Ok(())));
    let events = Events::new(ram.clone(), places, VCPUS, wake, register);
    events.initialize();
    let domain = Domain {
        ram,
        memory: MEMORY,
        trusted: false,
        cpus: Arc::new(cpus),
        events: Arc::new(events),
        time: Arc::new(Time::new(2_000_000_000)),
        cpuid: Arc::new(Visible::new(Source::Native, supported.as_slice()).ok()?),
        uuid: std::sync::Mutex::default(),
        console: Box::new(|bytes| assert!(bytes.len() <= 4096)),
        given: AtomicU64::new(0),
        hardware: false,
        suspended: std::sync::Mutex::default(),
    };
    for index in 0..VCPUS {
        let at = offset_of!(Data, kernel_cr3);
        domain.part(index).set(at, TABLES).unwrap();
        // As the machine starts, and brings vCPUs up.
        domain.cpus[index].state().traps = vec![Trap::default(); 256];
    }
    Some(domain)
}

/// What a hypercall of vCPU `index` with a word at [`ARENA`] comes to.
fn ask(domain: &Domain, index: usize, number: u64, arguments: [u64; 6], word: u64) -> Answer {
    let at = GuestAddress(ARENA);
    domain.ram.write_obj(word, at).unwrap();
    let call = Hypercall {
        domain,
        index,
        number,
        arguments,
    };
    call.call()
}

#[test]
fn the_first_vcpu_suspends_its_guest_and_nobody_else() {
    const SUSPEND: u64 = 2;
    const FRAME: u64 = 5;
    let Some((_, supported)) = vm() else { return };
    let domain = domain(supported).unwrap();
    let suspend = |index, frame| {
        let arguments = [2, ARENA, frame, 0, 0, 0];
        ask(&domain, index, number::SCHED_OP, arguments, SUSPEND)
    };
    let refused = Answer::Value(Errno::Inval.rax());
    for (index, frame) in [(1, FRAME), (0, MEMORY >> 12), (0, u64::MAX)] {
        assert_eq!(suspend(index, frame), refused);
        assert_eq!(*domain.suspended.lock().unwrap(), None);
    }
    assert_eq!(suspend(0, FRAME), Answer::Event(Event::Suspended));
    assert_eq!(*domain.suspended.lock().unwrap(), Some(FRAME));
}

#[test]
fn the_clock_of_user_code_follows_a_pause_as_long_as_the_guest_wants_it() {
    const REGISTER_TIME: u64 = 13;
    const AREA: u64 = ARENA + 0x100;
    let Some((_, supported)) = vm() else { return };
    let domain = domain(supported).unwrap();
    let register = |area| {
        let arguments = [REGISTER_TIME, 0, ARENA, 0, 0, 0];
        ask(&domain, 0, number::VCPU_OP, arguments, area)
    };
    let version = || domain.ram.read_obj::<u32>(GuestAddress(AREA)).unwrap();
    let pause = || {
        domain.time.pause();
        domain.resume_clocks().unwrap();
    };
    assert_eq!(register(AREA), Answer::Value(0));
    let first = version();
    pause();
    assert_ne!(version(), first, "it is stale");
    // None any more, as before a suspension.
    assert_eq!(register(0), Answer::Value(0));
    let last = version();
    pause();
    assert_eq!(version(), last);
}

#[derive(Clone, Debug)]
enum Step {
    Call(bool, u64, [u64; 6]),
    Memory(u64, u64),
}

fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0u64..0x200).prop_map(|offset| ARENA + offset * 8),
        3 => 0u64..40,
        1 => (0u64..16).prop_map(|before| HOLE - before),
        1 => 0u64..MEMORY,
        1 => (0u64..0x90_0000).prop_map(|offset| layout::VA + offset),
        1 => any::<u64>(),
        1 => prop::sample::select(vec![u64::MAX, 1 << 63, 0x7ff0, 1 << 32, u64::MAX - 7]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let arguments = || prop::array::uniform6(argument());
    prop_oneof![
        3 => (any::<bool>(), 0u64..45, arguments())
            .prop_map(|(second, number, arguments)| Step::Call(second, number, arguments)),
        // Those with commands, and a command.
        6 => (any::<bool>(), prop::sample::select(vec![12u64, 17, 20, 24, 26, 29, 30, 32]),
            0u64..32, arguments())
            .prop_map(|(second, number, command, mut arguments)| {
                arguments[0] = command;
                if number == number::VCPU_OP {
                    arguments[1] %= 3;
                }
                Step::Call(second, number, arguments)
            }),
        6 => (0u64..0x200, argument()).prop_map(|(at, value)| Step::Memory(ARENA + at * 8, value)),
        1 => (0u64..MEMORY - 8, argument()).prop_map(|(at, value)| Step::Memory(at, value)),
        1 => (0u64..0x28_0000, argument())
            .prop_map(|(at, value)| Step::Memory(layout::GPA + at, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_arguments_in_any_memory_make_a_hypercall_panic_or_go_astray(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        let Some((_, supported)) = vm() else { return Ok(()) };
        let Some(domain) = domain(supported) else { return Ok(()) };
        let pages = MEMORY >> 12;
        for step in &steps {
            match *step {
                Step::Memory(at, value) => {
                    let _ = domain.ram.write_obj(value, GuestAddress(at));
                }
                Step::Call(second, number, arguments) => {
                    let index = usize::from(second);
                    let call = Hypercall { domain: &domain, index, number, arguments };
                    match call.call() {
                        Answer::Event(event) => prop_assert!(
                            number == number::SCHED_OP,
                            "{number} makes {event:?}"
                        ),
                        Answer::Down | Answer::Value(_) => {}
                    }
                }
            }
            prop_assert!(domain.ballooned() <= pages);
            for index in 0..VCPUS {
                let state = domain.cpus[index].state();
                prop_assert!(state.traps.len() == 256 && state.gdt.len() <= 16);
            }
        }
        for port in 0..64 {
            // Nobody is there to bind one.
            let bound = matches!(domain.events.status(port), Ok((Status::Interdomain { .. }, _)));
            prop_assert!(!bound, "{port}");
        }
    }
}
