//! netif's queues, two pairs of rings, on a TAP in a network namespace of its
//! own: no grant, ring, packet, frame, setup, pause or move hurts the backend,
//! no page stays mapped, and a frontend that behaves sends and receives
//! afterwards.
//!
//! It needs /dev/net/tun and the right to make a network namespace.
#![no_main]

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use blanket_devices::xen::EventChannels;
use blanket_devices::xen::bus::{Backend, Context};
use blanket_devices::xen::grant::GrantTable;
use blanket_devices::xen::netif::Netif;
use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{Spec, Tap};
use blanket_fuzz::guest::{RAM, ram};
use blanket_fuzz::machine::workers;
use blanket_fuzz::packet::{PacketSocket, isolate};
use blanket_fuzz::xen::{Ports, wait_for};
use blanket_memory::GuestRam;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
/// The grant table's page; reference n is for page n, as long as nobody
/// changes it.
const TABLE: u64 = RAM - 4096;
/// The pages of the rings: transmission and reception of each queue. Their
/// places in the list are their event channels, too.
const RINGS: [u64; 4] = [1, 2, 3, 4];
const TX: usize = 0;
const RX: usize = 1;
/// The first of 64 data pages.
const DATA: u64 = 32;
/// Entries of a ring.
const ENTRIES: u32 = 256;

#[derive(Arbitrary, Debug)]
struct Input {
    /// What the frontend takes, as in [`FEATURES`].
    features: u8,
    split: bool,
    steps: Vec<Step>,
}

/// Nodes that the frontend may leave out.
const FEATURES: [&str; 4] = [
    "feature-sg",
    "feature-ipv6-csum-offload",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
];

#[derive(Arbitrary, Debug)]
enum Step {
    /// Slots that are nearly a packet: page, offset, size, and whether it goes
    /// on; the first one's flags and extra.
    Packet {
        queue: bool,
        flags: u8,
        extra: Option<[u8; 5]>,
        slots: Vec<(u8, u16, u16)>,
    },
    /// Buffers for packets.
    Buffers { queue: bool, first: u8, count: u8 },
    /// Any bytes as a slot.
    Raw { ring: u8, bytes: [u8; 12] },
    /// Any index of the producer.
    Claim { ring: u8, index: u32 },
    /// Any bytes anywhere.
    Poke { addr: u32, bytes: [u8; 8] },
    /// A grant: flags, domain, page.
    Grant { reference: u8, entry: (u8, u8, u8) },
    /// A notification.
    Kick { ring: u8 },
    /// A frame from outside.
    Frame { len: u16, bytes: Vec<u8> },
    /// The frontend goes and comes again, with nodes of its own.
    Connect {
        queues: Option<u8>,
        reference: Option<u8>,
        port: Option<u8>,
    },
    /// The machine stops for a moment.
    Pause,
    /// The backend goes on in another monitor.
    Move,
}

struct Frontend {
    ram: GuestRam,
    ports: Arc<Ports>,
    context: Context,
    features: u8,
    split: bool,
    produced: [u32; 4],
}

impl Frontend {
    fn new(features: u8, split: bool) -> Self {
        let (ram, ports) = (ram(), Arc::new(Ports::default()));
        let context = Context {
            memory: ram.clone(),
            grants: Arc::new(GrantTable::new(ram.clone(), GuestAddress(TABLE), 1)),
            events: Arc::clone(&ports) as Arc<dyn EventChannels>,
            workers: workers(),
            fault: Arc::new(|| {}),
        };
        let frontend = Self {
            ram,
            ports,
            context,
            features,
            split,
            produced: [0; 4],
        };
        frontend.grant_all();
        frontend
    }

    fn grant_all(&self) {
        for page in 0..RAM / 4096 {
            self.grant(page, 1, 0, page as u32);
        }
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        // Beyond the end: as good as nothing.
        let _ = self.ram.write_slice(bytes, GuestAddress(addr));
    }

    fn grant(&self, reference: u64, flags: u16, domain: u16, page: u32) {
        let entry = u64::from(flags) | u64::from(domain) << 16 | u64::from(page) << 32;
        self.write(TABLE + 8 * (reference % 512), &entry.to_le_bytes());
    }

    fn push(&mut self, ring: usize, slot: &[u8]) {
        let size = if ring % 2 == TX { 12 } else { 8 };
        let index = u64::from(self.produced[ring] % ENTRIES);
        let len = slot.len().min(size);
        let addr = RINGS[ring] * 4096 + 64 + index * size as u64;
        self.write(addr, &slot[..len]);
        self.produced[ring] = self.produced[ring].wrapping_add(1);
    }

    fn show(&self, ring: usize) {
        self.claim(ring, self.produced[ring]);
    }

    fn claim(&self, ring: usize, index: u32) {
        self.write(RINGS[ring] * 4096, &index.to_le_bytes());
    }

    fn kick(&self, ring: usize) {
        let ring = if self.split { ring } else { ring & !1 };
        self.ports.send(ring as u32);
    }

    /// Connects with the given nodes, or good ones.
    fn connect(&mut self, netif: &mut Netif, step: [Option<u8>; 3]) -> bool {
        let [queues, reference, port] = step;
        netif.disconnect();
        self.produced = [0; 4];
        for page in RINGS {
            self.write(page * 4096, &[0; 64]);
        }
        let nodes = |node: &str| {
            let first = 2 * usize::from(node.starts_with("queue-1"));
            let channel = |ring: usize| port.map_or(ring as u64, u64::from);
            let name = node.rsplit('/').next()?;
            let number = match name {
                "multi-queue-num-queues" => queues?.into(),
                "tx-ring-ref" => reference.map_or(RINGS[first], u64::from),
                "rx-ring-ref" => RINGS[first + 1],
                "event-channel" if self.split => return None,
                "event-channel" | "event-channel-tx" => channel(first),
                "event-channel-rx" => channel(first + 1),
                "request-rx-copy" | "feature-rx-notify" => 1,
                name => {
                    let at = FEATURES.iter().position(|feature| *feature == name)?;
                    u64::from(self.features >> at & 1)
                }
            };
            Some(number.to_string())
        };
        netif.connect(&nodes, &self.context).is_ok()
    }

    fn packet(&mut self, queue: bool, flags: u8, extra: Option<[u8; 5]>, slots: &[Slot]) {
        let ring = 2 * usize::from(queue) + TX;
        let total: u16 = slots.iter().fold(0, |sum, slot| sum.wrapping_add(slot.2));
        for (i, (page, offset, size)) in slots.iter().enumerate() {
            let first = i == 0;
            let more = u8::from(i + 1 < slots.len()) << 2;
            let flags = more
                | if first {
                    (flags & 3) | u8::from(extra.is_some()) << 3
                } else {
                    0
                };
            let size = if first { total } else { *size };
            self.push(ring, &tx_slot(*page, *offset, flags, size));
            if let Some([kind, flags, s0, s1, protocol]) = extra.filter(|_| first) {
                self.push(ring, &[kind % 6, flags & 1, s0, s1, protocol % 4]);
            }
        }
        self.show(ring);
        self.kick(ring);
    }

    fn buffers(&mut self, queue: bool, first: u8, count: u8) {
        let ring = 2 * usize::from(queue) + RX;
        for page in (0..count % 64).map(|i| (first.wrapping_add(i)) % 64) {
            let page = DATA as u8 + page;
            self.push(ring, &[page, 0, 0, 0, page, 0, 0, 0]);
        }
        self.show(ring);
        self.kick(ring);
    }
}

/// Page, offset and size.
type Slot = (u8, u16, u16);

fn tx_slot(page: u8, offset: u16, flags: u8, size: u16) -> [u8; 12] {
    let page = if page < 224 {
        DATA as u8 + page % 64
    } else {
        page
    };
    let ([o0, o1], [s0, s1]) = (offset.to_le_bytes(), size.to_le_bytes());
    [page, 0, 0, 0, o0, o1, flags, 0, page, 0, s0, s1]
}

thread_local! {
    /// A TAP takes long to make: all runs share it.
    static NET: RefCell<Option<(Netif, PacketSocket)>> = const { RefCell::new(None) };
}

fn make() -> (Netif, PacketSocket) {
    let spec = Spec {
        name: Some("fuzz0".to_owned()),
        queues: 2,
        ..Spec::default()
    };
    let tap = Tap::open(&spec).unwrap_or_else(|error| give_up(&error));
    let outside = PacketSocket::open(tap.name()).unwrap_or_else(|error| give_up(&error));
    let netif = Netif::new(0, "net0", tap, MAC, None).expect("an interface");
    (netif, outside)
}

/// Tells why it cannot run here, in the words of all tests.
fn give_up(error: &dyn std::fmt::Display) -> ! {
    println!(
        "skipped, because there is no TAP in a network namespace of its own ({error}); \
         run it as root, or allow unprivileged user namespaces and /dev/net/tun"
    );
    // SAFETY: ends the process at once. (The engine takes an ordinary exit for
    // a crash.)
    unsafe { libc::_exit(0) }
}

fn frame(last: u8) -> Vec<u8> {
    let mut frame = MAC.0.to_vec();
    // From a neighbour, of an experimental kind (IEEE 802).
    frame.extend([2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame.resize(60, last);
    frame
}

fuzz_target!(
    init: {
        // Before the fuzzing engine starts threads.
        if let Err(error) = isolate() {
            give_up(&error);
        }
    },
    |input: Input| {
        NET.with_borrow_mut(|net| {
            let (netif, outside) = net.get_or_insert_with(make);
            run(&input, netif, outside);
        });
    }
);

fn run(input: &Input, netif: &mut Netif, outside: &PacketSocket) {
    let mut front = Frontend::new(input.features, input.split);
    front.connect(netif, [None; 3]);
    for step in &input.steps {
        take(step, &mut front, netif, outside);
    }
    netif.disconnect();
    let mapped = front.context.grants.metrics()[0].1;
    assert_eq!(mapped, 0, "pages are mapped");
    outside.drain();

    front.grant_all();
    // Frames that came while nobody was connected end with this connection.
    assert!(front.connect(netif, [None; 3]));
    assert!(front.connect(netif, [None; 3]));
    front.write(DATA * 4096, &frame(7));
    front.packet(false, 0, None, &[(0, 0, 60)]);
    wait_for(&front.ram, RINGS[TX] * 4096 + 8, 1);
    assert_eq!(wait_frame(outside), frame(7));
    front.buffers(false, 1, 1);
    outside.send(&frame(9));
    wait_for(&front.ram, RINGS[RX] * 4096 + 8, 1);
    let mut got = [0; 60];
    let addr = GuestAddress((DATA + 1) * 4096);
    front.ram.read_slice(&mut got, addr).expect("memory");
    assert_eq!(got[..], frame(9));
    netif.disconnect();
}

fn wait_frame(outside: &PacketSocket) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(frame) = outside.receive() {
            return frame;
        }
        assert!(Instant::now() < deadline, "no frame");
    }
}

fn take(step: &Step, front: &mut Frontend, netif: &mut Netif, outside: &PacketSocket) {
    let ring = |ring: u8| usize::from(ring % 4);
    match step {
        Step::Packet {
            queue,
            flags,
            extra,
            slots,
        } => {
            let slots = &slots[..slots.len().min(24)];
            front.packet(*queue, *flags, *extra, slots);
        }
        Step::Buffers {
            queue,
            first,
            count,
        } => front.buffers(*queue, *first, *count),
        Step::Raw { ring: at, bytes } => {
            front.push(ring(*at), bytes);
            front.show(ring(*at));
        }
        Step::Claim { ring: at, index } => front.claim(ring(*at), *index),
        Step::Poke { addr, bytes } => front.write(u64::from(*addr) % RAM, bytes),
        Step::Grant { reference, entry } => {
            let (flags, domain, page) = *entry;
            front.grant(
                (*reference).into(),
                flags.into(),
                domain.into(),
                page.into(),
            );
        }
        Step::Kick { ring: at } => front.kick(ring(*at)),
        Step::Frame { len, bytes } => {
            let mut frame = bytes.clone();
            frame.resize(usize::from(*len % 1515), 0);
            outside.send(&frame);
        }
        Step::Connect {
            queues,
            reference,
            port,
        } => {
            front.connect(netif, [*queues, *reference, *port]);
        }
        Step::Pause => {
            netif.pause().expect("a pause");
            netif.resume().expect("an end of the pause");
        }
        Step::Move => {
            netif.pause().expect("a pause");
            let state = netif.save().expect("a state");
            netif.disconnect();
            if netif.restore(&state, &front.context).is_ok() {
                netif.resume().expect("a start");
            } else {
                // What it needs is not granted any more.
                netif.disconnect();
            }
        }
    }
}
