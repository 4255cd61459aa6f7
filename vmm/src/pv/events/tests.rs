use super::*;
use crate::pv::abi::SharedInfo;
use proptest::prelude::*;

const SHARED_INFO: GuestAddress = GuestAddress(0x1000);
const DOORBELLS: GuestAddress = GuestAddress(0x2000);
const ELSEWHERE: GuestAddress = GuestAddress(0x3040);
const VCPUS: usize = 2;

struct Guest {
    events: Events,
    memory: GuestRam,
    /// vCPUs that were woken.
    woken: Arc<Mutex<Vec<usize>>>,
    /// Ports that KVM has wired.
    wired: Arc<Mutex<Vec<u32>>>,
}

fn guest() -> Guest {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let places = Places {
        shared_info: SHARED_INFO,
        doorbells: DOORBELLS,
    };
    let woken = Arc::new(Mutex::new(Vec::new()));
    let wired = Arc::new(Mutex::new(Vec::new()));
    let (wake, register) = (woken.clone(), wired.clone());
    let events = Events::new(
        memory.clone(),
        places,
        VCPUS,
        Arc::new(move |vcpu| wake.lock().unwrap().push(vcpu)),
        Arc::new(move |_, port, add| {
            let mut wired = register.lock().unwrap();
            wired.retain(|other| *other != port);
            if add {
                wired.push(port);
            }
            Ok(())
        }),
    );
    events.initialize();
    Guest {
        events,
        memory,
        woken,
        wired,
    }
}

impl Guest {
    fn woken(&self) -> Vec<usize> {
        std::mem::take(&mut self.woken.lock().unwrap())
    }

    fn wired(&self) -> Vec<u32> {
        self.wired.lock().unwrap().clone()
    }

    fn doorbell(&self, port: u32) -> u8 {
        let at = GuestAddress(DOORBELLS.0 + u64::from(port));
        self.memory.read_obj(at).unwrap()
    }

    fn bit(&self, table: usize, port: u32) -> bool {
        let at = SHARED_INFO.0 + table as u64 + u64::from(port / 64) * 8;
        let word: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
        word & (1 << (port % 64)) != 0
    }

    fn is_pending(&self, port: u32) -> bool {
        self.bit(offset_of!(SharedInfo, evtchn_pending), port)
    }

    /// As the guest does before and after it looks at its events.
    fn set_upcall_mask(&self, vcpu: usize, mask: u8) {
        let at = self.events.vcpu_info(vcpu).unwrap().0 + 1;
        self.memory.write_obj(mask, GuestAddress(at)).unwrap();
    }

    /// As the guest's upcall does: takes all unmasked pending events of a vCPU.
    fn take_events(&self, vcpu: usize) -> Vec<u32> {
        let info = self.events.vcpu_info(vcpu).unwrap();
        self.memory.write_obj(0u8, info).unwrap();
        let selector = GuestAddress(info.0 + 8);
        let words: u64 = self.memory.read_obj(selector).unwrap();
        self.memory.write_obj(0u64, selector).unwrap();
        let selected = |port: &u32| {
            let masked = self.bit(offset_of!(SharedInfo, evtchn_mask), *port);
            words & (1 << (port / 64)) != 0 && self.is_pending(*port) && !masked
        };
        let ports: Vec<u32> = (0..EVENT_CHANNELS).filter(selected).collect();
        for port in &ports {
            let at = self.events.bits.pending_word(u64::from(port / 64));
            let word: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let word = word & !(1 << (port % 64));
            self.memory.write_obj(word, GuestAddress(at)).unwrap();
        }
        ports
    }
}

fn kick() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

#[test]
fn a_bound_virq_reaches_its_vcpu_once_unmasked() {
    let guest = guest();
    let port = guest.events.bind_virq(virq::TIMER, 1).unwrap();
    guest.events.virq(virq::TIMER, 1);
    assert!(guest.is_pending(port), "masked, but pending");
    assert_eq!(guest.woken(), [] as [usize; 0]);
    guest.events.unmask(port).unwrap();
    assert_eq!(guest.woken(), [1]);
    assert!(!guest.events.pending(1), "the vCPU is masked");
    guest.set_upcall_mask(1, 0);
    assert!(guest.events.pending(1) && !guest.events.pending(0));
    assert_eq!(guest.take_events(1), [port]);
    assert!(!guest.events.pending(1));
    // From now on without the mask.
    guest.events.virq(virq::TIMER, 1);
    assert_eq!((guest.woken(), guest.events.pending(1)), (vec![1], true));
    // Already pending: nobody needs to hear it twice.
    guest.events.virq(virq::TIMER, 1);
    guest.events.virq(virq::TIMER, 0);
    assert_eq!(guest.woken(), [] as [usize; 0]);
}

#[test]
fn a_backend_is_kicked_when_it_binds_and_whenever_the_guest_sends() {
    let guest = guest();
    let port = guest.events.alloc_unbound(BACKEND).unwrap();
    guest.events.send(port).unwrap();
    let kick = kick();
    guest.events.bind(port, &kick).unwrap();
    assert_eq!(kick.read().unwrap(), 1);
    assert_eq!((guest.wired(), guest.doorbell(port)), (vec![port], 1));
    guest.events.send(port).unwrap();
    assert_eq!(kick.read().unwrap(), 1);
    assert!(!guest.is_pending(port), "the guest's own end is not told");
    assert!(guest.events.bind(port, &kick).is_err(), "it is bound");

    guest.events.unmask(port).unwrap();
    guest.events.notify(port);
    assert_eq!(guest.woken(), [0]);
    assert_eq!(guest.take_events(0), [port]);
}

#[test]
fn either_end_may_go_first() {
    let guest = guest();
    let port = guest.events.alloc_unbound(BACKEND).unwrap();
    guest.events.bind(port, &kick()).unwrap();
    guest.events.unbind(port);
    assert_eq!((guest.wired(), guest.doorbell(port)), (vec![], 0));
    let waits = Status::Unbound { remote: BACKEND };
    assert_eq!(guest.events.status(port), Ok((waits, 0)));
    guest.events.notify(port);
    assert!(!guest.is_pending(port));

    guest.events.bind(port, &kick()).unwrap();
    guest.events.close(port).unwrap();
    assert_eq!((guest.wired(), guest.doorbell(port)), (vec![], 0));
    guest.events.unbind(port);
    guest.events.notify(port);
    assert_eq!(guest.events.status(port), Ok((Status::Closed, 0)));
    assert_eq!(guest.events.close(port), Err(Errno::Inval));
}

#[test]
fn ports_for_others_and_ports_of_other_kinds_are_not_for_backends() {
    let guest = guest();
    let ports = [
        guest.events.alloc_unbound(7).unwrap(),
        guest.events.bind_ipi(0).unwrap(),
        guest.events.bind_virq(virq::TIMER, 0).unwrap(),
        0,
        4000,
        u32::MAX,
    ];
    for port in ports {
        assert!(guest.events.bind(port, &kick()).is_err(), "{port}");
    }
    assert!(guest.wired().is_empty());
}

#[test]
fn a_port_whose_wiring_fails_stays_unbound() {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let places = Places {
        shared_info: SHARED_INFO,
        doorbells: DOORBELLS,
    };
    let refuse: Register = Arc::new(|_, _, _| Err(io::Error::other("no")));
    let events = Events::new(memory, places, 1, Arc::new(|_| ()), refuse);
    let port = events.alloc_unbound(BACKEND).unwrap();
    assert!(events.bind(port, &kick()).is_err());
    let waits = Status::Unbound { remote: BACKEND };
    assert_eq!(events.status(port), Ok((waits, 0)));
}

#[test]
fn an_ipi_goes_to_its_vcpu() {
    let guest = guest();
    let port = guest.events.bind_ipi(1).unwrap();
    guest.events.unmask(port).unwrap();
    guest.events.send(port).unwrap();
    assert_eq!(guest.woken(), [1]);
    assert_eq!(guest.take_events(1), [port]);
    assert_eq!(guest.events.bind_vcpu(port, 0), Err(Errno::Inval));
}

#[test]
fn an_event_can_be_moved_to_another_vcpu() {
    let guest = guest();
    let port = guest.events.alloc_unbound(BACKEND).unwrap();
    guest.events.bind(port, &kick()).unwrap();
    guest.events.unmask(port).unwrap();
    guest.events.bind_vcpu(port, 1).unwrap();
    guest.events.notify(port);
    assert_eq!(guest.woken(), [1]);
    assert_eq!(guest.take_events(1), [port]);
}

#[test]
fn a_polling_vcpu_is_woken_by_a_masked_port() {
    let guest = guest();
    let port = guest.events.bind_ipi(0).unwrap();
    assert_eq!(guest.events.poll(1, &[port]), Ok(false));
    guest.events.send(port).unwrap();
    assert_eq!(guest.woken(), [1]);
    assert_eq!(guest.events.poll(1, &[port]), Ok(true));
    guest.events.end_poll(1);
    let other = guest.events.bind_ipi(0).unwrap();
    guest.events.send(other).unwrap();
    assert_eq!(guest.woken(), [] as [usize; 0]);
    assert_eq!(
        guest.events.poll(1, &[0; MAX_POLLED + 1]),
        Err(Errno::Inval)
    );
    assert_eq!(guest.events.poll(1, &[EVENT_CHANNELS]), Err(Errno::Inval));
    assert_eq!(guest.events.poll(VCPUS, &[1]), Err(Errno::Inval));
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let guest = guest();
    let events = &guest.events;
    assert_eq!(events.bind_virq(virq::COUNT, 0), Err(Errno::Inval));
    assert_eq!(events.bind_virq(2, 1), Err(Errno::Inval));
    assert_eq!(events.bind_virq(0, VCPUS), Err(Errno::NoEnt));
    assert_eq!(events.bind_ipi(usize::MAX), Err(Errno::NoEnt));
    events.bind_virq(virq::TIMER, 0).unwrap();
    assert_eq!(events.bind_virq(virq::TIMER, 0), Err(Errno::Exist));
    for port in [0, 2, EVENT_CHANNELS, u32::MAX] {
        assert_eq!(events.send(port), Err(Errno::Inval));
        assert_eq!(events.unmask(port), Err(Errno::Inval));
        assert_eq!(events.close(port), Err(Errno::Inval));
        assert_eq!(events.bind_vcpu(port, 0), Err(Errno::Inval));
    }
    assert_eq!(events.status(EVENT_CHANNELS), Err(Errno::Inval));
    for at in [0x3fc8, 0x3001, 0x4000, u64::MAX - 63] {
        let refused = events.set_vcpu_info(0, GuestAddress(at));
        assert_eq!(refused, Err(Errno::Inval), "{at:#x}");
    }
}

#[test]
fn ports_run_out_and_come_back() {
    let guest = guest();
    let ports: Vec<u32> = (1..EVENT_CHANNELS)
        .map(|_| guest.events.alloc_unbound(BACKEND).unwrap())
        .collect();
    assert_eq!(ports.last(), Some(&(EVENT_CHANNELS - 1)));
    assert_eq!(guest.events.alloc_unbound(BACKEND), Err(Errno::NoSpc));
    guest.events.close(77).unwrap();
    assert_eq!(guest.events.bind_ipi(0), Ok(77));
    guest.events.reset();
    assert_eq!(guest.events.alloc_unbound(BACKEND), Ok(1));
}

#[test]
fn moving_the_information_of_a_vcpu_loses_no_event() {
    let guest = guest();
    let port = guest.events.bind_virq(virq::TIMER, 0).unwrap();
    guest.events.unmask(port).unwrap();
    guest.events.virq(virq::TIMER, 0);
    guest.events.set_vcpu_info(0, ELSEWHERE).unwrap();
    assert_eq!(guest.events.vcpu_info(0), Some(ELSEWHERE));
    assert_eq!(guest.take_events(0), [port]);
    guest.events.virq(virq::TIMER, 0);
    assert_eq!(guest.take_events(0), [port]);
    guest.events.initialize();
    assert_eq!(guest.events.vcpu_info(0), Some(SHARED_INFO));
}

#[test]
fn a_saved_table_is_restored_and_backends_bind_again() {
    let guest = guest();
    let timer = guest.events.bind_virq(virq::TIMER, 1).unwrap();
    let port = guest.events.alloc_unbound(BACKEND).unwrap();
    guest.events.bind(port, &kick()).unwrap();
    guest.events.set_vcpu_info(1, ELSEWHERE).unwrap();
    let saved = guest.events.save();

    let other = super::tests::guest();
    // The restored memory is that of the other machine.
    other.events.bits.ring_for(port, BOUND);
    other.events.restore(&saved).unwrap();
    assert_eq!(other.doorbell(port), 0, "nobody is there to hear it");
    assert_eq!(
        other.events.status(timer),
        Ok((Status::Virq { virq: virq::TIMER }, 1))
    );
    let waits = Status::Unbound { remote: BACKEND };
    assert_eq!(other.events.status(port), Ok((waits, 0)));
    other.events.bind(port, &kick()).unwrap();
    assert_eq!(other.events.save(), saved);
}

#[test]
fn in_a_new_domain_no_port_is_bound_or_pending_and_information_stays_in_place() {
    let guest = guest();
    let timer = guest.events.bind_virq(virq::TIMER, 0).unwrap();
    let port = guest.events.alloc_unbound(BACKEND).unwrap();
    guest.events.bind(port, &kick()).unwrap();
    guest.events.set_vcpu_info(0, ELSEWHERE).unwrap();
    guest.set_upcall_mask(0, 1);
    guest.events.unmask(timer).unwrap();
    guest.events.virq(virq::TIMER, 0);
    guest.events.renew();
    assert_eq!(guest.events.vcpu_info(0), Some(ELSEWHERE));
    assert!(guest.wired().is_empty() && guest.doorbell(port) == 0);
    for port in [timer, port] {
        assert_eq!(guest.events.status(port), Ok((Status::Closed, 0)));
        assert!(!guest.is_pending(port) && guest.bit(offset_of!(SharedInfo, evtchn_mask), port));
    }
    guest.set_upcall_mask(0, 0);
    assert!(!guest.events.pending(0));
    // The first ones are free again.
    assert_eq!(guest.events.alloc_unbound(BACKEND), Ok(1));
    assert_eq!(guest.events.bind_virq(virq::TIMER, 0), Ok(2));
}

#[test]
fn a_saved_table_of_another_machine_is_refused() {
    let guest = guest();
    let sound = guest.events.save();
    let mut saved = sound.clone();
    saved.vcpu_info.push(None);
    assert!(guest.events.restore(&saved).is_err());
    saved = sound.clone();
    saved.vcpu_info[0] = Some(0x3fff_f000);
    assert!(guest.events.restore(&saved).is_err());
    saved = sound.clone();
    saved.ports = vec![FREE; EVENT_CHANNELS as usize + 1];
    assert!(guest.events.restore(&saved).is_err());
    saved.ports = Vec::new();
    assert!(guest.events.restore(&saved).is_err());
    saved.ports = vec![FREE, Port { vcpu: 2, ..FREE }];
    assert!(guest.events.restore(&saved).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Unbound,
    Ipi(usize),
    Virq(u32, usize),
    Close(u32),
    Send(u32),
    Unmask(u32),
    Move(u32, usize),
    Bind(u32),
    Unbind(u32),
    Notify(u32),
    Raise(u32, usize),
    Info(usize, u64),
    Take(usize),
    Scribble(u64, u64),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let port = || 0u32..8;
    let vcpu = || 0usize..3;
    prop_oneof![
        Just(Step::Unbound),
        vcpu().prop_map(Step::Ipi),
        (0u32..26, vcpu()).prop_map(|(virq, vcpu)| Step::Virq(virq, vcpu)),
        port().prop_map(Step::Close),
        port().prop_map(Step::Send),
        port().prop_map(Step::Unmask),
        (port(), vcpu()).prop_map(|(port, vcpu)| Step::Move(port, vcpu)),
        port().prop_map(Step::Bind),
        port().prop_map(Step::Unbind),
        port().prop_map(Step::Notify),
        (0u32..3, vcpu()).prop_map(|(virq, vcpu)| Step::Raise(virq, vcpu)),
        (vcpu(), 0x3000u64..0x37c0)
            .prop_map(|(vcpu, at)| Step::Info(vcpu, at + 0x800 * vcpu as u64)),
        (0usize..VCPUS).prop_map(Step::Take),
        (0u64..0x3ff8, any::<u64>()).prop_map(|(at, value)| Step::Scribble(at, value)),
        Just(Step::Reset),
    ]
}

fn perform(guest: &Guest, step: &Step) {
    let events = &guest.events;
    let _ = match *step {
        Step::Unbound => events.alloc_unbound(BACKEND).map(drop),
        Step::Ipi(vcpu) => events.bind_ipi(vcpu).map(drop),
        Step::Virq(virq, vcpu) => events.bind_virq(virq, vcpu).map(drop),
        Step::Close(port) => events.close(port),
        Step::Send(port) => events.send(port),
        Step::Unmask(port) => events.unmask(port),
        Step::Move(port, vcpu) => events.bind_vcpu(port, vcpu),
        Step::Bind(port) => events.bind(port, &kick()).map_err(|_| Errno::Inval),
        Step::Info(vcpu, at) => events.set_vcpu_info(vcpu, GuestAddress(at)),
        ref other => {
            match *other {
                Step::Unbind(port) => events.unbind(port),
                Step::Notify(port) => events.notify(port),
                Step::Raise(virq, vcpu) => events.virq(virq, vcpu),
                Step::Take(vcpu) => drop(guest.take_events(vcpu)),
                Step::Scribble(at, value) => {
                    guest.memory.write_obj(value, GuestAddress(at)).unwrap();
                }
                _ => events.reset(),
            }
            Ok(())
        }
    };
}

proptest! {
    #[test]
    fn whatever_the_guest_does_the_wiring_follows_the_table(
        steps in prop::collection::vec(step(), 0..64)
    ) {
        let guest = guest();
        for step in &steps {
            perform(&guest, step);
            let bound = |port: &u32| {
                matches!(guest.events.status(*port), Ok((Status::Interdomain { .. }, _)))
            };
            let mut wired = guest.wired();
            wired.sort_unstable();
            prop_assert_eq!(wired, (0..64).filter(bound).collect::<Vec<_>>());
            let saved = guest.events.save();
            prop_assert!(saved.ports.len() <= 65);
        }
    }

    #[test]
    fn a_guest_that_keeps_to_the_rules_misses_no_event(
        steps in prop::collection::vec(step(), 0..64)
    ) {
        let guest = guest();
        for step in &steps {
            if matches!(step, Step::Scribble(..) | Step::Move(..)) {
                continue;
            }
            perform(&guest, step);
            for vcpu in 0..VCPUS {
                guest.set_upcall_mask(vcpu, 0);
            }
            for port in 1..EVENT_CHANNELS.min(128) {
                let Ok((status, vcpu)) = guest.events.status(port) else { continue };
                let masked = guest.bit(offset_of!(SharedInfo, evtchn_mask), port);
                if status != Status::Closed && guest.is_pending(port) && !masked {
                    prop_assert!(guest.events.pending(vcpu), "{port} after {step:?}");
                }
            }
        }
    }
}
