//! A vhost-user backend that answers what it likes and writes to the memory of
//! the guest whose queues are passed through to it: the monitor neither hangs
//! nor panics, and the queues stop at a place that they have.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use arbitrary::Arbitrary;
use blanket_devices::vhost_user::Opened;
use blanket_devices::virtio::net::PassedNet;
use blanket_devices::virtio::{Activation, Device, Interrupt, VirtQueue};
use blanket_drivers::mac::MacAddress;
use blanket_memory::{Backing, GuestRam, Spec};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RAM: u64 = 1 << 16;
const SIZE: u16 = 16;
/// Where the guest's two rings lie.
const RINGS: [u64; 2] = [0x1000, 0x4000];
/// Messages of the protocol that have an answer of their own.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;

#[derive(Arbitrary, Debug)]
struct Input {
    /// What differs from a good backend's answers, in their order.
    answers: Vec<Answer>,
    /// What the guest and the backend write.
    pokes: Vec<(u16, [u8; 8])>,
    /// What the guest accepts of what it is offered.
    features: u64,
    pairs: bool,
}

#[derive(Arbitrary, Debug)]
enum Answer {
    Good,
    Value(u64),
    Header([u32; 3]),
    Bytes(Vec<u8>),
    End,
}

fn bytes(header: [u32; 3], value: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(value.to_le_bytes());
    bytes
}

/// Serves one connection; `None` when it has ended.
fn serve(mut socket: UnixStream, answers: Vec<Answer>) -> Option<()> {
    let mut answers = answers.into_iter();
    loop {
        let mut header = [0; 12];
        socket.read_exact(&mut header).ok()?;
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| header[4 * i + b]));
        let mut body = vec![0; word(2) as usize];
        socket.read_exact(&mut body).ok()?;
        let good = match word(0) {
            GET_FEATURES => 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 15,
            GET_PROTOCOL_FEATURES => 9,
            GET_QUEUE_NUM => 2,
            GET_VRING_BASE => u64::from(body.first().copied().unwrap_or(0)) | 3 << 32,
            _ if word(1) & 8 != 0 => 0,
            _ => continue,
        };
        let right = [word(0), 5, 8];
        let answer = match answers.next().unwrap_or(Answer::Good) {
            Answer::Good => bytes(right, good),
            Answer::Value(value) => bytes(right, value),
            Answer::Header(header) => bytes(header, good),
            // Shorter ones would only be waited for.
            Answer::Bytes(mut any) if any.len() >= 20 => {
                any.truncate(4096);
                any
            }
            Answer::Bytes(_) | Answer::End => return None,
        };
        socket.write_all(&answer).ok()?;
    }
}

/// A backend for the connections that the input has answers for; all others
/// find nobody.
fn backend(path: &std::path::Path, answers: Vec<Answer>) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("a socket");
    std::thread::spawn(move || {
        let accepted = listener.accept();
        drop(listener);
        if let Ok((socket, _)) = accepted {
            serve(socket, answers);
        }
    })
}

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
}

fn queues(ram: &GuestRam, count: u16) -> Vec<VirtQueue> {
    let queue = |index: u16| {
        let at = RINGS[usize::from(index % 2)] + 0x6000 * u64::from(index / 2);
        let state = QueueState {
            max_size: SIZE,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size: SIZE,
            ready: true,
            desc_table: at,
            avail_ring: at + 0x400,
            used_ring: at + 0x800,
        };
        let queue = Queue::try_from(state).expect("a queue");
        let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        VirtQueue::new(index, queue, kick, ram.clone(), Arc::new(Nobody))
    };
    (0..count).map(queue).collect()
}

fn run(input: Input) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("blanket-fuzz-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let backend = backend(&path, input.answers);
    let pairs = 1 + u16::from(input.pairs);
    let opened = Opened::connect(&path, pairs);
    std::fs::remove_file(&path).expect("the socket's file");
    if let Ok(opened) = opened {
        serve_guest(opened, pairs, input.features, &input.pokes);
    }
    backend.join().expect("a backend");
}

fn serve_guest(opened: Opened, pairs: u16, features: u64, pokes: &[(u16, [u8; 8])]) {
    let spec = Spec {
        size: RAM,
        backing: Backing::Small,
        shared: true,
    };
    let ram = blanket_memory::build_at(&spec, &[(GuestAddress(0), RAM)]).expect("memory");
    let kept = opened.keep(|| Box::new(|| Ok(()))).expect("threads");
    let mac = MacAddress([2, 0, 0, 0, 0, 1]);
    let mut net = PassedNet::new("net0", kept, &ram, mac, None).expect("an interface");
    let activation = Activation {
        ram: ram.clone(),
        features: features & (net.features() | net.transport_features()),
        queues: queues(&ram, 2 * pairs),
        interrupt: Arc::new(Nobody),
    };
    let mut handlers = net.activate(activation).expect("handlers");
    handlers.iter_mut().for_each(|handler| handler.kick());
    for (at, bytes) in pokes {
        // Beyond the end: as good as nothing.
        let _ = ram.write_slice(bytes, GuestAddress((*at).into()));
    }
    for handler in &mut handlers {
        handler.quiesce();
        for queue in handler.queues() {
            let state = &queue.queue;
            let taken = state.next_avail().wrapping_sub(state.next_used());
            assert!(taken <= SIZE, "{taken} of {SIZE}");
        }
    }
    net.reset(handlers);
}

fuzz_target!(|input: Input| run(input));
