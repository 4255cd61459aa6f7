//! Event channels: no sequence of hypercalls, backends' calls, and writes to
//! shared memory breaks the table; KVM's wiring follows it; a saved table is
//! taken over as it was, and any other is taken over or refused.
#![no_main]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use blanket_devices::xen::{BACKEND, EventChannels};
use blanket_memory::GuestRam;
use blanket_vmm::pv::events::{Events, Places, Status};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: u64 = 0x5000;
const SHARED_INFO: GuestAddress = GuestAddress(0x1000);
const DOORBELLS: GuestAddress = GuestAddress(0x2000);
const VCPUS: usize = 3;

#[derive(Arbitrary, Debug)]
struct Input {
    steps: Vec<Step>,
    /// Changes to a saved table.
    saved: Vec<(u16, u8)>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Unbound { remote: bool },
    Virq { number: u8, vcpu: u8 },
    Ipi { vcpu: u8 },
    Assign { port: u16, vcpu: u8 },
    Close { port: u16 },
    Send { port: u16 },
    Unmask { port: u16 },
    Status { port: u16 },
    Reset,
    Initialize,
    Info { vcpu: u8, at: u16 },
    Poll { vcpu: u8, port: u16 },
    EndPoll { vcpu: u8 },
    Bind { port: u16 },
    Unbind { port: u16 },
    Notify { port: u16 },
    Raise { number: u8, vcpu: u8 },
    Scribble { at: u16, value: u64 },
    Fill,
    Move,
}

/// Mostly ports that may be in use.
fn port(raw: u16) -> u32 {
    u32::from(if raw < 0xf000 { raw % 16 } else { raw })
}

fn perform(events: &Events, memory: &GuestRam, kick: &EventFd, step: Step) {
    match step {
        Step::Unbound { remote } => {
            let _ = events.alloc_unbound(if remote { BACKEND } else { 7 });
        }
        Step::Virq { number, vcpu } => {
            let _ = events.bind_virq(u32::from(number), usize::from(vcpu));
        }
        Step::Ipi { vcpu } => drop(events.bind_ipi(usize::from(vcpu))),
        Step::Assign { port: at, vcpu } => {
            let _ = events.bind_vcpu(port(at), usize::from(vcpu));
        }
        Step::Close { port: at } => drop(events.close(port(at))),
        Step::Send { port: at } => drop(events.send(port(at))),
        Step::Unmask { port: at } => drop(events.unmask(port(at))),
        Step::Status { port: at } => drop(events.status(port(at))),
        Step::Reset => events.reset(),
        Step::Initialize => events.initialize(),
        Step::Info { vcpu, at } => {
            let _ = events.set_vcpu_info(usize::from(vcpu), GuestAddress(u64::from(at)));
        }
        Step::Poll { vcpu, port: at } => {
            let _ = events.poll(usize::from(vcpu), &[port(at), 1]);
        }
        Step::EndPoll { vcpu } => events.end_poll(usize::from(vcpu)),
        Step::Bind { port: at } => drop(events.bind(port(at), kick)),
        Step::Unbind { port: at } => events.unbind(port(at)),
        Step::Notify { port: at } => events.notify(port(at)),
        Step::Raise { number, vcpu } => events.virq(u32::from(number), usize::from(vcpu)),
        Step::Scribble { at, value } => {
            let _ = memory.write_obj(value, GuestAddress(u64::from(at)));
        }
        Step::Fill => while events.alloc_unbound(BACKEND).is_ok() {},
        Step::Move => {
            let saved = events.save();
            events.restore(&saved).expect("its own table");
        }
    }
}

fuzz_target!(|input: Input| {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory");
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let wired = Arc::new(Mutex::new(BTreeSet::new()));
    let wires = wired.clone();
    let events = Events::new(
        memory.clone(),
        Places {
            shared_info: SHARED_INFO,
            doorbells: DOORBELLS,
        },
        VCPUS,
        Arc::new(|vcpu| assert!(vcpu < VCPUS)),
        Arc::new(move |_, port, add| {
            let mut wires = wires.lock().expect("the only thread");
            let news = if add {
                wires.insert(port)
            } else {
                wires.remove(&port)
            };
            assert!(news, "port {port} is wired twice, or not at all");
            Ok(())
        }),
    );
    events.initialize();
    for step in &input.steps {
        perform(&events, &memory, &kick, *step);
        for vcpu in 0..VCPUS + 1 {
            let _ = (events.pending(vcpu), events.vcpu_info(vcpu));
            assert!(events.timer_port(vcpu) < 4096);
        }
    }
    let bound: BTreeSet<u32> = (0..4096)
        .filter(|port| matches!(events.status(*port), Ok((Status::Interdomain { .. }, _))))
        .collect();
    assert_eq!(bound, *wired.lock().expect("the only thread"));

    // A saved table with changed bytes.
    let mut bytes = Vec::new();
    ciborium::into_writer(&events.save(), &mut bytes).expect("a table");
    for (at, value) in input.saved {
        let len = bytes.len();
        bytes[usize::from(at) % len] = value;
    }
    if let Ok(saved) = ciborium::from_reader(bytes.as_slice())
        && events.restore(&saved).is_ok()
    {
        for port in 0..64 {
            let _ = (events.send(port), events.unmask(port));
        }
    }
});
