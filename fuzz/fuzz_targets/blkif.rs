//! blkif: no grant, ring, request, setup, pause or move hurts the backend, the
//! image never grows, no page stays mapped, and a frontend that behaves reads
//! back what it writes afterwards.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_devices::xen::EventChannels;
use blanket_devices::xen::blkif::{Block, Options};
use blanket_devices::xen::bus::{Backend, Context};
use blanket_devices::xen::grant::GrantTable;
use blanket_drivers::store::{Engine, Format, Image, Spec};
use blanket_fuzz::file::MemFile;
use blanket_fuzz::guest::{RAM, ram};
use blanket_fuzz::machine::workers;
use blanket_fuzz::xen::{Ports, wait_for};
use blanket_memory::GuestRam;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of the disk.
const CAPACITY: u64 = 64 << 10;
/// The grant table's page; reference n is for page n, as long as nobody
/// changes it.
const TABLE: u64 = RAM - 4096;
/// The first page of each queue's ring, and the first of 32 data pages.
const RINGS: [u64; 2] = [1, 9];
const DATA: u64 = 32;
/// `BLKIF_OP_READ`, `BLKIF_OP_WRITE`.
const READ: u8 = 0;
const WRITE: u8 = 1;
/// Bytes of a request.
const REQUEST: usize = 112;
/// `BLKIF_RSP_OKAY`, `BLKIF_RSP_ERROR`.
const OKAY: i16 = 0;
const ERROR: i16 = -1;

#[derive(Arbitrary, Debug)]
struct Input {
    thread: bool,
    readonly: bool,
    persistent: (bool, bool),
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request that is nearly one.
    Request {
        queue: bool,
        operation: u8,
        segments: u8,
        indirect: Option<u8>,
        sector: u8,
        pieces: [(u8, u8, u8); 11],
    },
    /// Any bytes as a request.
    Raw { queue: bool, bytes: Vec<u8> },
    /// Any index of the producer.
    Claim { queue: bool, index: u32 },
    /// Any bytes anywhere.
    Poke { addr: u32, bytes: [u8; 8] },
    /// A grant: flags, domain, page.
    Grant { reference: u8, entry: (u8, u8, u8) },
    /// A notification.
    Kick { queue: bool },
    /// The frontend goes and comes again, with nodes of its own.
    Connect {
        queues: Option<u8>,
        order: Option<u8>,
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
    produced: [u32; 2],
}

impl Frontend {
    fn new() -> Self {
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
            produced: [0; 2],
        };
        frontend.grant_all();
        frontend
    }

    fn grant_all(&self) {
        for page in 0..RAM / 4096 {
            self.grant(page, 1, 0, page as u32);
        }
    }

    /// Asks for one sector in `page` and gives the status.
    fn ask(&mut self, operation: u8, page: u64) -> i16 {
        let slot = RINGS[0] * 4096 + 64 + u64::from(self.produced[0]) * REQUEST as u64;
        self.push(false, &request(operation, 3, &[(page as u8, 0, 0)]));
        self.ports.send(0);
        wait_for(&self.ram, RINGS[0] * 4096 + 8, self.produced[0]);
        let status = self.ram.read_obj(GuestAddress(slot + 10));
        status.expect("a status")
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        // Beyond the end: as good as nothing.
        let _ = self.ram.write_slice(bytes, GuestAddress(addr));
    }

    fn grant(&self, reference: u64, flags: u16, domain: u16, page: u32) {
        let entry = u64::from(flags) | u64::from(domain) << 16 | u64::from(page) << 32;
        self.write(TABLE + 8 * (reference % 512), &entry.to_le_bytes());
    }

    /// Empty rings of the largest size.
    fn clear_rings(&mut self) {
        self.produced = [0; 2];
        for first in RINGS {
            self.write(first * 4096, &[0; 64]);
        }
    }

    fn push(&mut self, queue: bool, request: &[u8]) {
        let (queue, len) = (usize::from(queue), request.len().min(REQUEST));
        let slot = u64::from(self.produced[queue] % 32) * REQUEST as u64;
        self.write(RINGS[queue] * 4096 + 64 + slot, &request[..len]);
        self.produced[queue] = self.produced[queue].wrapping_add(1);
        self.claim(queue, self.produced[queue]);
    }

    fn claim(&self, queue: usize, index: u32) {
        self.write(RINGS[queue] * 4096, &index.to_le_bytes());
    }

    /// Connects with the given nodes, or good ones.
    fn connect(&mut self, block: &mut Block, step: [Option<u8>; 4]) -> bool {
        let [queues, order, reference, port] = step;
        block.disconnect();
        self.clear_rings();
        let nodes = |node: &str| {
            let queue = usize::from(node.starts_with("queue-1"));
            let number = match node.rsplit('/').next()? {
                "multi-queue-num-queues" => queues?.into(),
                "ring-page-order" => order?.into(),
                "feature-persistent" => 1,
                "event-channel" => port.map_or(queue as u64, u64::from),
                page => match page.strip_prefix("ring-ref")? {
                    "" => reference.map_or(RINGS[queue], u64::from),
                    page => RINGS[queue] + page.parse::<u64>().ok()?,
                },
            };
            Some(number.to_string())
        };
        block.connect(&nodes, &self.context).is_ok()
    }
}

/// A request with its segments: reference, first and last sector.
fn request(operation: u8, sector: u8, pieces: &[(u8, u8, u8)]) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[0] = operation;
    request[1] = pieces.len() as u8;
    request[16] = sector;
    for (entry, (reference, first, last)) in request[24..].chunks_exact_mut(8).zip(pieces) {
        entry[..6].copy_from_slice(&[*reference, 0, 0, 0, *first, *last]);
    }
    request
}

fn near(step: &Step) -> Option<[u8; REQUEST]> {
    let Step::Request {
        operation,
        segments,
        indirect,
        sector,
        pieces,
        ..
    } = step
    else {
        return None;
    };
    let pieces = pieces.map(|(page, first, last)| {
        let page = if page < 224 {
            DATA as u8 + page % 32
        } else {
            page
        };
        (page, first % 10, last % 10)
    });
    let mut bytes = request(operation % 8, *sector, &pieces);
    bytes[1] = segments % 13;
    if let Some(page) = indirect {
        bytes[..4].copy_from_slice(&[6, operation % 3, *segments, u8::from(*segments == 0)]);
        bytes[28..32].copy_from_slice(&[DATA as u8 + page % 34, 0, 0, 0]);
    }
    Some(bytes)
}

fuzz_target!(|input: Input| {
    let file = MemFile::new(&[], CAPACITY);
    let open = || {
        let image = Image::open(&Spec {
            path: file.path(),
            readonly: input.readonly,
            format: Some(Format::Raw),
            direct: false,
            backing: false,
            stripe: Vec::new(),
            engine: if input.thread {
                Engine::Sync
            } else {
                Engine::Auto
            },
        });
        let options = Options {
            name: "blk0",
            position: 0,
            queues: 2,
            persistent: input.persistent.0,
        };
        Block::new(&options, image.expect("an image"), || Box::new(|| Ok(()))).expect("a disk")
    };
    let mut block = open();
    let mut front = Frontend::new();
    front.connect(
        &mut block,
        [input.persistent.1.then_some(2), None, None, None],
    );
    for step in &input.steps {
        match step {
            Step::Request { queue, .. } => {
                if let Some(bytes) = near(step) {
                    front.push(*queue, &bytes);
                    front.ports.send(u32::from(*queue));
                }
            }
            Step::Raw { queue, bytes } => front.push(*queue, bytes),
            Step::Claim { queue, index } => front.claim((*queue).into(), *index),
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
            Step::Kick { queue } => front.ports.send(u32::from(*queue)),
            Step::Connect {
                queues,
                order,
                reference,
                port,
            } => {
                front.connect(&mut block, [*queues, *order, *reference, *port]);
            }
            Step::Pause => {
                block.pause().expect("a pause");
                block.resume().expect("an end of the pause");
            }
            Step::Move => {
                block.pause().expect("a pause");
                let state = block.save().expect("a state");
                block.disconnect();
                if block.restore(&state, &front.context).is_ok() {
                    block.resume().expect("a start");
                } else {
                    // What it needs is not granted any more.
                    block.disconnect();
                }
            }
        }
    }
    block.disconnect();
    assert_eq!(file.len(), CAPACITY);
    assert_eq!(front.context.grants.metrics()[0].1, 0, "pages are mapped");

    front.grant_all();
    assert!(front.connect(&mut block, [None; 4]));
    let data = [0x5a; 512];
    front.write(DATA * 4096, &data);
    let written = front.ask(WRITE, DATA);
    assert_eq!(written, if input.readonly { ERROR } else { OKAY });
    assert_eq!(front.ask(READ, DATA + 1), OKAY);
    let mut back = [0; 512];
    let addr = GuestAddress((DATA + 1) * 4096);
    front.ram.read_slice(&mut back, addr).expect("memory");
    assert!(input.readonly || back == data);
    block.disconnect();
});
