//! A disk driven by a frontend with real rings in guest memory.

mod hostile;
mod serving;
mod upkeep;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blanket_drivers::store::{Engine, Format, Spec};
use vm_memory::{Bytes, GuestAddress};

use super::request::{DISCARD, FLUSH, INDIRECT, READ, REQUEST, RESPONSE, WRITE};
use super::*;
use crate::virtio::testing::until;
use crate::worker::Worker;
use crate::xen::testing::{Events, FrontRing, Guest};

/// Pages of the guest; the last one is its grant table.
const PAGES: usize = 300;
/// Rings lie here: 8 pages for each.
const RINGS: u32 = 1;
/// Data lies here, and in the pages behind; the page has this reference, too.
const DATA: u32 = 100;
/// What the image is full of.
const FILL: u8 = 0x11;
const CAPACITY: usize = 1 << 20;

const OKAY: i16 = 0;
const ERROR: i16 = -1;
const UNSUPPORTED: i16 = -2;

/// A segment: reference, first and last sector.
type Piece = (u32, u8, u8);

struct Bench {
    guest: Guest,
    events: Arc<Events>,
    context: Context,
    faults: Arc<AtomicUsize>,
    block: Block,
    rings: Vec<FrontRing>,
    nodes: HashMap<String, String>,
    path: PathBuf,
    next_id: u64,
    // The image's directory goes last.
    _directory: tempfile::TempDir,
}

/// What is particular about a bench.
struct Kind {
    queues: u16,
    pages: usize,
    /// Whether the backend offers, and the frontend wants, persistent grants.
    persistent: (bool, bool),
    readonly: bool,
    engine: Engine,
}

const PLAIN: Kind = Kind {
    queues: 1,
    pages: 1,
    persistent: (false, false),
    readonly: false,
    engine: Engine::Auto,
};

const PERSISTENT: Kind = Kind {
    persistent: (true, true),
    ..PLAIN
};

fn image(path: &std::path::Path, kind: &Kind) -> Image {
    let spec = Spec {
        path: path.to_owned(),
        readonly: kind.readonly,
        format: Some(Format::Raw),
        direct: false,
        backing: false,
        stripe: Vec::new(),
        engine: kind.engine,
    };
    Image::open(&spec).unwrap()
}

fn block(image: Image, kind: &Kind) -> Block {
    let options = Options {
        name: "blk0",
        position: 0,
        queues: kind.queues,
        persistent: kind.persistent.0,
    };
    Block::new(&options, image, || Box::new(|| Ok(()))).unwrap()
}

impl Bench {
    /// A frontend that has written its nodes but is not connected.
    fn unconnected(kind: &Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, vec![FILL; CAPACITY]).unwrap();
        let guest = Guest::new(PAGES);
        let events = Arc::new(Events::default());
        let faults = Arc::new(AtomicUsize::new(0));
        let fault = Arc::clone(&faults);
        let workers = (0..2).map(|_| Worker::spawn("test", Box::new(|| Ok(()))).unwrap());
        let context = Context {
            memory: guest.ram.clone(),
            grants: Arc::clone(&guest.grants),
            events: Arc::clone(&events) as _,
            workers: workers.collect(),
            fault: Arc::new(move || {
                fault.fetch_add(1, Ordering::SeqCst);
            }),
        };
        let mut bench = Self {
            block: block(image(&path, kind), kind),
            nodes: HashMap::new(),
            rings: Vec::new(),
            next_id: 0xfeed_0000_0000,
            guest,
            events,
            context,
            faults,
            path,
            _directory: directory,
        };
        bench.set_up(kind);
        bench
    }

    /// As a Linux frontend does.
    fn set_up(&mut self, kind: &Kind) {
        let mut node = |name: String, value: u32| self.nodes.insert(name, value.to_string());
        node("feature-persistent".to_owned(), kind.persistent.1.into());
        node("multi-queue-num-queues".to_owned(), kind.queues.into());
        if kind.pages > 1 {
            node("ring-page-order".to_owned(), kind.pages.ilog2());
        }
        for queue in 0..u32::from(kind.queues) {
            let first = RINGS + 8 * queue;
            let directory = match kind.queues {
                1 => String::new(),
                _ => format!("queue-{queue}/"),
            };
            node(format!("{directory}event-channel"), 10 + queue);
            for page in 0..u32::try_from(kind.pages).unwrap() {
                let name = match kind.pages {
                    1 => format!("{directory}ring-ref"),
                    _ => format!("{directory}ring-ref{page}"),
                };
                node(name, first + page);
                self.guest.grant(first + page, first + page);
            }
            let ring = FrontRing::new(&self.guest.ram, u64::from(first) << 12, kind.pages, REQUEST);
            self.rings.push(ring);
        }
        for page in DATA..DATA + 64 {
            self.guest.grant(page, page);
        }
    }

    fn connect(&mut self) -> Result<HashMap<String, String>, Error> {
        let nodes = &self.nodes;
        let read = |name: &str| nodes.get(name).cloned();
        let nodes = self.block.connect(&read, &self.context)?;
        Ok(nodes.into_iter().collect())
    }

    fn new(kind: &Kind) -> Self {
        let mut bench = Self::unconnected(kind);
        bench.connect().unwrap();
        bench
    }

    /// Puts a request into a ring and notifies the backend if it asks for it.
    fn send(&mut self, queue: u32, request: &[u8]) {
        let ring = &mut self.rings[queue as usize];
        ring.push(request);
        if ring.publish() {
            self.events.send(10 + queue);
        }
    }

    /// Waits for the next response: id, operation, status.
    fn wait(&mut self, queue: u32) -> (u64, u8, i16) {
        let mut response = None;
        until("a response", || {
            response = self.rings[queue as usize].pop::<RESPONSE>();
            response.is_some()
        });
        let bytes: [u8; RESPONSE] = response.unwrap();
        (
            u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            bytes[8],
            i16::from_le_bytes([bytes[10], bytes[11]]),
        )
    }

    /// Sends a request, waits for its response and gives the status.
    fn ask(&mut self, mut request: [u8; REQUEST]) -> i16 {
        self.next_id += 1;
        request[8..16].copy_from_slice(&self.next_id.to_le_bytes());
        self.send(0, &request);
        let (id, operation, status) = self.wait(0);
        let asked = match request[0] {
            INDIRECT => request[1],
            operation => operation,
        };
        assert_eq!((id, operation), (self.next_id, asked));
        status
    }

    fn fill_page(&self, page: u32, bytes: &[u8]) {
        let addr = GuestAddress(u64::from(page) << 12);
        self.guest.ram.write_slice(bytes, addr).unwrap();
    }

    fn page(&self, page: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let addr = GuestAddress(u64::from(page) << 12);
        self.guest.ram.read_slice(&mut bytes, addr).unwrap();
        bytes
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn counter(&self, name: &str) -> u64 {
        let metrics = self.block.metrics();
        metrics.iter().find(|(key, _)| *key == name).unwrap().1
    }

    /// Data pages that the backend has mapped.
    fn mapped(&self) -> usize {
        let pages = DATA..DATA + 64;
        pages.filter(|page| self.guest.in_use(*page)).count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.block.disconnect();
    }
}

/// A request with its segments in itself.
fn direct(operation: u8, sector: u64, pieces: &[Piece]) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[0] = operation;
    request[1] = u8::try_from(pieces.len()).unwrap();
    request[16..24].copy_from_slice(&sector.to_le_bytes());
    let room = request[24..].chunks_exact_mut(8);
    for (entry, piece) in room.zip(pieces) {
        entry.copy_from_slice(&segment(*piece));
    }
    request
}

fn segment((reference, first, last): Piece) -> [u8; 8] {
    let mut entry = [0; 8];
    entry[..4].copy_from_slice(&reference.to_le_bytes());
    (entry[4], entry[5]) = (first, last);
    entry
}

/// A request with `segments` segments in a page.
fn indirect(operation: u8, sector: u64, segments: u16, page: u32) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[0] = INDIRECT;
    request[1] = operation;
    request[2..4].copy_from_slice(&segments.to_le_bytes());
    request[16..24].copy_from_slice(&sector.to_le_bytes());
    request[28..32].copy_from_slice(&page.to_le_bytes());
    request
}

fn discard(sector: u64, sectors: u64) -> [u8; REQUEST] {
    let mut request = direct(DISCARD, sector, &[]);
    request[24..32].copy_from_slice(&sectors.to_le_bytes());
    request
}

fn pattern(page: u32) -> Vec<u8> {
    (0..4096u32)
        .map(|i| (i / 512 + 8 * page + i % 251) as u8)
        .collect()
}
