//! A front end of vhost-user at a port of the switch: messages, descriptors and
//! memory that differ from sound ones, or any bytes. Whatever it does, the next
//! front end is served.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use blanket_overlay::frame::{Frame, Head, Offload};
use blanket_overlay::port::Port;
use blanket_overlay::port::vhost_user::VhostUser;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MEMORY: u64 = 1 << 17;
const GUEST: u64 = 1 << 32;
const USER: u64 = 1 << 44;
const SIZE: u64 = 8;
/// From ring to ring; the available and the used ring in each.
const RING: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const BUFFERS: u64 = 0x1_0000;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Attached {
    Nothing,
    Memory,
    Event,
    Pipe,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A message, of sound length if `len` is none.
    Message {
        request: u8,
        flags: u8,
        len: Option<u16>,
        body: Vec<u8>,
        attached: Attached,
    },
    /// Bytes in the rings.
    Write { at: u16, bytes: Vec<u8> },
    /// A descriptor that may be sound, made available.
    Descriptor {
        queue: bool,
        index: u8,
        addr: u32,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// The memory's file gets so long.
    Cut(u32),
    /// A frame to the guest, of so many bytes.
    Send(u16),
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// Without sound messages first.
    raw: bool,
    features: u64,
    steps: Vec<Step>,
}

struct FrontEnd {
    socket: UnixStream,
    memory: File,
    event: EventFd,
    pipe: OwnedFd,
    available: [u16; 2],
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

impl FrontEnd {
    fn connect(path: &std::path::Path) -> Self {
        // SAFETY: a C string.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new.
        let memory = unsafe { File::from_raw_fd(fd) };
        memory.set_len(MEMORY).expect("memory");
        let socket = UnixStream::connect(path).expect("a port");
        socket.set_nonblocking(true).expect("flags");
        Self {
            socket,
            memory,
            event: EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"),
            pipe: std::io::pipe().expect("a pipe").1.into(),
            available: [0; 2],
        }
    }

    fn tell(&mut self, port: &mut VhostUser, header: [u32; 3], body: &[u8], fd: Option<RawFd>) {
        let mut bytes = words(&header);
        bytes.extend(body);
        // The port may have hung up, and then that is that.
        let _ = match fd {
            Some(fd) => self.socket.send_with_fd(&bytes[..], fd).map(drop).is_ok(),
            None => self.socket.write_all(&bytes).is_ok(),
        };
        // Until it has been read and done.
        let deadline = Instant::now() + Duration::from_millis(20);
        loop {
            turn(port);
            let mut left = 0;
            // SAFETY: the call writes an int.
            let asked = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::TIOCOUTQ, &mut left) };
            if asked != 0 || left == 0 || Instant::now() > deadline {
                break;
            }
            std::thread::yield_now();
        }
        turn(port);
    }

    fn say(&mut self, port: &mut VhostUser, request: u32, body: &[u8], fd: Option<RawFd>) {
        self.tell(port, [request, 1, body.len() as u32], body, fd);
    }

    /// Two rings in memory, with these features.
    fn begin(&mut self, port: &mut VhostUser, features: u64) {
        self.say(port, 2, &longs(&[features]), None);
        let memory = Some(self.memory.as_raw_fd());
        self.say(port, 5, &longs(&[1, GUEST, MEMORY, USER, 0]), memory);
        for index in 0..2_u32 {
            let ring = USER + u64::from(index) * RING;
            self.say(port, 8, &words(&[index, SIZE as u32]), None);
            let mut place = words(&[index, 0]);
            place.extend(longs(&[ring, ring + USED, ring + AVAILABLE, 0]));
            self.say(port, 9, &place, None);
            let event = Some(self.event.as_raw_fd());
            self.say(port, 13, &longs(&[index.into()]), event);
            self.say(port, 12, &longs(&[index.into()]), event);
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        if at + bytes.len() as u64 <= MEMORY {
            let _ = self.memory.write_all_at(bytes, at);
        }
    }

    fn add(&mut self, queue: usize, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (addr, len, flags, next) = descriptor;
        let ring = queue as u64 * RING;
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(ring + u64::from(index) % SIZE * 16, &bytes);
        let available = &mut self.available[queue];
        let slot = ring + AVAILABLE + 4 + u64::from(*available) % SIZE * 2;
        *available = available.wrapping_add(1);
        let available = *available;
        self.write(slot, &index.to_le_bytes());
        self.write(ring + AVAILABLE + 2, &available.to_le_bytes());
    }

    fn step(&mut self, port: &mut VhostUser, step: &Step) {
        match step {
            Step::Message {
                request,
                flags,
                len,
                body,
                attached,
            } => {
                let fd = match attached {
                    Attached::Nothing => None,
                    Attached::Memory => Some(self.memory.as_raw_fd()),
                    Attached::Event => Some(self.event.as_raw_fd()),
                    Attached::Pipe => Some(self.pipe.as_raw_fd()),
                };
                let body = &body[..body.len().min(4096)];
                let len = len.map_or(body.len() as u32, u32::from);
                let header = [u32::from(request % 48), 1 | u32::from(flags & 12), len];
                self.tell(port, header, body, fd);
            }
            Step::Write { at, bytes } => self.write(u64::from(*at) % (2 * RING), bytes),
            Step::Descriptor {
                queue,
                index,
                addr,
                len,
                flags,
                next,
            } => {
                let addr = GUEST + u64::from(*addr) % (MEMORY + 4096);
                let (next, flags) = (u16::from(*next) % 9, u16::from(*flags) & 7);
                let descriptor = (addr, u32::from(*len), flags, next);
                self.add((*queue).into(), u16::from(*index) % 9, descriptor);
            }
            Step::Cut(len) => drop(self.memory.set_len(u64::from(*len) % (2 * MEMORY))),
            Step::Send(len) => drop(send(port, usize::from(*len))),
        }
        turn(port);
    }
}

fn turn(port: &mut VhostUser) {
    let received = port.receive(4, &mut |frame| {
        assert!(frame.len() < 70_000);
        std::hint::black_box(frame.to_vec());
    });
    received.expect("a port lives");
    port.flush().expect("a port lives");
    port.arm().expect("a port lives");
    port.disarm();
}

fn send(port: &mut VhostUser, len: usize) -> Result<(), blanket_overlay::drops::Reason> {
    let mut bytes = vec![7; len];
    let head = Head::of(&bytes);
    let at = head.bytes().len();
    let body = [vm_memory::VolatileSlice::from(&mut bytes[at..])];
    port.send(&Frame {
        head,
        body: &body,
        offload: Offload::default(),
    })
}

fuzz_target!(|input: Input| {
    let folder = std::env::temp_dir().join(format!("overlay-port-{}", std::process::id()));
    let _ = std::fs::remove_file(&folder);
    let listener = UnixListener::bind(&folder).expect("a socket");
    let mut port = VhostUser::accept(listener, 1, 1518).expect("a port");
    let mut bad = FrontEnd::connect(&folder);
    if !input.raw {
        bad.begin(&mut port, input.features & 0x1_3000_9983);
    }
    for step in input.steps.iter().take(64) {
        bad.step(&mut port, step);
    }
    drop(bad);
    let deadline = Instant::now() + Duration::from_secs(8);
    while port.is_up() {
        turn(&mut port);
        assert!(Instant::now() < deadline, "it has not been let go");
    }
    let mut good = FrontEnd::connect(&folder);
    good.begin(&mut port, 1 << 32 | 1 << 15);
    for index in 0..2 {
        let addr = GUEST + BUFFERS + u64::from(index) * 2048;
        good.add(0, index, (addr, 2048, 2, 0));
    }
    while send(&mut port, 1000).is_err() {
        turn(&mut port);
        assert!(Instant::now() < deadline, "nobody is served after it");
        std::thread::yield_now();
    }
    port.flush().expect("a port lives");
    let mut got = [0; 1012];
    good.memory
        .read_exact_at(&mut got, BUFFERS)
        .expect("memory");
    assert!(got[12..].iter().all(|byte| *byte == 7));
    drop(port);
    let _ = std::fs::remove_file(&folder);
});
