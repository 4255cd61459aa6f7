//! `AF_XDP`: the driver's packets in memory of our own (Linux
//! `Documentation/networking/af_xdp.rst`).
//!
//! One socket for each of the interface's queues, fed by a program that takes
//! the uplink's datagrams and nothing else. Zero-copy where the driver does it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ::xdp::slab::Slab;
use ::xdp::socket::{XdpSocket, XdpSocketBuilder};
use ::xdp::umem::{FrameSize, UmemCfgBuilder};
use ::xdp::{CompletionRing, FillRing, Packet, RingConfigBuilder, RxRing, TxRing, Umem};

use super::message::BATCH;
use super::netlink::Interface;
use super::station::{Fate, Station, Way, fate};
use super::udp::Use;
use super::wire::{self, Checksum};
use super::{
    Capabilities, Counters, Description, Error, Kind, MAX_SEGMENTS, RxBuffer, Setup, Spec,
    TxPacket, Uplink, check, option,
};

mod program;

use program::{Attached, Program};

/// Entries of each ring.
const RING: u32 = 2048;
/// How long a queue that somebody has closed may take to be free again.
const RELEASE: Duration = Duration::from_secs(1);
/// Frames of a queue's memory: enough for both directions' rings.
const FRAMES: u32 = 4096;
/// Bytes of a frame that the kernel keeps for itself.
const HEADROOM: usize = 256;
/// Bytes of a frame.
const FRAME: usize = 4096;
/// Queues that get a socket, each with its memory; packets of further ones
/// come by the kernel's socket.
const MAX_QUEUES: u32 = 16;
/// How many times the rings are asked until the kernel's socket is, while they
/// have something each time.
const KERNEL_TURN: usize = 16;
/// What root or these may.
const CAPABILITIES: &str = "CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF";

/// Packets on their way between a ring and us, `limit` at most.
struct Burst {
    packets: VecDeque<Packet>,
    limit: usize,
}

impl Slab for Burst {
    fn available(&self) -> usize {
        self.limit.saturating_sub(self.packets.len())
    }

    fn len(&self) -> usize {
        self.packets.len()
    }

    fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    fn push_front(&mut self, packet: Packet) -> Option<Packet> {
        if self.available() == 0 {
            return Some(packet);
        }
        self.packets.push_front(packet);
        None
    }

    fn pop_back(&mut self) -> Option<Packet> {
        self.packets.pop_back()
    }
}

/// One queue's rings and memory.
struct Queue {
    // Before the memory that the kernel writes to.
    socket: XdpSocket,
    fill: FillRing,
    rx: RxRing,
    tx: TxRing,
    completion: CompletionRing,
    umem: Umem,
    burst: Burst,
    /// Frames that the kernel has yet to send.
    sending: usize,
    zero_copy: bool,
}

// SAFETY: the packets in `burst` point into `umem`, which moves along with
// them; nothing else is tied to a thread.
unsafe impl Send for Queue {}

impl Queue {
    /// Opens a queue. The kernel lets go of one that was closed a while after.
    fn open(interface: &Interface, queue: u32, setup: &Setup<'_>) -> Result<Self, Error> {
        let deadline = Instant::now() + RELEASE;
        loop {
            match Self::try_open(interface, queue, setup) {
                Err(Error::Busy { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(RELEASE / 50);
                }
                done => return done,
            }
        }
    }

    fn try_open(interface: &Interface, queue: u32, setup: &Setup<'_>) -> Result<Self, Error> {
        let other = |error: ::xdp::error::Error| io::Error::other(error.to_string());
        let memory = UmemCfgBuilder {
            frame_size: FrameSize::FourK,
            frame_count: FRAMES,
            ..UmemCfgBuilder::default()
        };
        let mut umem = memory
            .build()
            .map_err(other)
            .and_then(Umem::map)
            .map_err(|e| setup.error("get memory for packets", e))?;
        let config = RingConfigBuilder {
            rx_count: RING,
            tx_count: RING,
            fill_count: RING,
            completion_count: RING,
        };
        let config = config
            .build()
            .map_err(|e| setup.error("set up rings", other(e)))?;
        let failed = |what| move |error| setup.error(what, cause(error));
        let mut builder = XdpSocketBuilder::new().map_err(failed("make an XDP socket"))?;
        let (rings, flags) = builder
            .build_rings(&umem, config)
            .map_err(failed("set up rings"))?;
        let socket = builder
            .bind(::xdp::nic::NicIndex(interface.index), queue, flags)
            .map_err(failed("bind an XDP socket"))?;
        let (Some(rx), Some(tx)) = (rings.rx_ring, rings.tx_ring) else {
            let error = io::ErrorKind::Unsupported.into();
            return Err(setup.error("set up rings", error));
        };
        let mut fill = rings.fill_ring;
        // SAFETY: the queue's fields are dropped in order, the socket first.
        unsafe { fill.enqueue(&mut umem, RING as usize) };
        Ok(Self {
            zero_copy: zero_copy(&socket),
            socket,
            fill,
            rx,
            tx,
            completion: rings.completion_ring,
            umem,
            burst: Burst {
                packets: VecDeque::with_capacity(BATCH),
                limit: BATCH,
            },
            sending: 0,
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns the descriptor and is borrowed as long.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    /// Receives into the first of `buffers`.
    fn rx(&mut self, station: &mut Station, buffers: &mut [RxBuffer<'_>]) -> usize {
        self.burst.limit = buffers.len().min(BATCH);
        // SAFETY: the packets are given back below, before the memory goes.
        let got = unsafe { self.rx.recv(&self.umem, &mut self.burst) };
        let mut kept = 0;
        while let Some(packet) = self.burst.pop_back() {
            if let Some(buffer) = buffers.get_mut(kept) {
                kept += usize::from(station.take(&packet, true, 0, buffer));
            }
            self.umem.free_packet(packet);
        }
        if got > 0 {
            // SAFETY: as in `open`.
            unsafe { self.fill.enqueue(&mut self.umem, got) };
        }
        kept
    }

    /// Takes back the frames that have been sent.
    fn reclaim(&mut self) {
        let done = self.completion.dequeue(&mut self.umem, self.sending);
        self.sending -= done;
    }

    /// Whether so many frames can be sent now.
    fn has_room(&mut self, frames: usize) -> bool {
        if self.sending + frames > RING as usize {
            self.reclaim();
        }
        self.sending + frames <= RING as usize && self.umem.allocatable() >= frames
    }

    /// Puts a frame into the ring; there is room.
    fn push(&mut self, headers: &[u8], payload: &[u8]) -> bool {
        // SAFETY: the packet goes to the ring or back to the memory here.
        let Some(mut packet) = (unsafe { self.umem.alloc() }) else {
            return false;
        };
        if packet
            .append(headers)
            .and_then(|()| packet.append(payload))
            .is_err()
        {
            self.umem.free_packet(packet);
            return false;
        }
        self.burst.limit = 1;
        self.burst.push_front(packet);
        // SAFETY: as in `open`.
        if unsafe { self.tx.send(&mut self.burst) } == 1 {
            self.sending += 1;
            return true;
        }
        if let Some(packet) = self.burst.pop_back() {
            self.umem.free_packet(packet);
        }
        false
    }

    /// Has the kernel look at the ring.
    fn kick(&mut self) -> io::Result<()> {
        // Without zero-copy the kernel sends 32 frames a call.
        for _ in 0..RING / 32 {
            // SAFETY: no memory is passed.
            let sent = unsafe {
                libc::sendto(
                    self.socket.as_raw_fd(),
                    std::ptr::null(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null(),
                    0,
                )
            };
            self.reclaim();
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            let full = error.raw_os_error() == Some(libc::ENOBUFS);
            if fate(error)? != Fate::Later || full {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The error number in an error of the crate's.
fn cause(error: ::xdp::socket::SocketError) -> io::Error {
    use ::xdp::socket::SocketError as E;
    match error {
        E::SocketCreation(inner) | E::Bind(inner) => inner,
        E::SetSockOpt { inner, .. } | E::GetSockOpt { inner, .. } | E::RingMap { inner, .. } => {
            inner
        }
    }
}

/// Whether a bound socket shares its memory with the driver.
fn zero_copy(socket: &XdpSocket) -> bool {
    // SAFETY: the socket owns the descriptor and outlives the borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    let options = option::<1>(fd, libc::SOL_XDP, libc::XDP_OPTIONS);
    options.is_ok_and(|[flags]| flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

/// See the module.
pub(super) struct AfXdp {
    // Before the sockets that the program feeds.
    _attached: Attached,
    queues: Vec<Queue>,
    station: Station,
    description: Description,
    poll: OwnedFd,
    /// Counts the calls that receive.
    turn: usize,
}

impl AfXdp {
    pub(super) fn open(spec: &Spec, interface: &Interface) -> Result<Self, Error> {
        let setup = Setup {
            kind: Kind::AfXdp,
            interface: &spec.interface,
            capabilities: CAPABILITIES,
        };
        let mut station = Station::open(spec, interface, Use::Full)?;
        let local = station.end.address;
        let room = FRAME - HEADROOM - 14 - wire::overhead(local.ip());
        station.payload = station.payload.min(room);
        let count = interface.queues.clamp(1, MAX_QUEUES);
        let program =
            Program::load(local, count).map_err(|e| setup.error("load an XDP program", e))?;
        // First, so that a driver has made room for zero-copy queues.
        let attached = program
            .attach(interface.index)
            .map_err(|e| setup.error("attach an XDP program", e))?;
        let poll = epoll().map_err(|e| setup.error("make an epoll", e))?;
        let queues = open_queues(interface, count, &setup)?;
        for (queue, opened) in (0..).zip(&queues) {
            program
                .feed(queue, opened.fd())
                .and_then(|()| watch(&poll, opened.fd()))
                .map_err(|e| setup.error("feed an XDP socket", e))?;
        }
        watch(&poll, station.kernel.fd()).map_err(|e| setup.error("watch a socket", e))?;
        let zero_copy = queues.iter().all(|queue| queue.zero_copy);
        let place = if attached.native { "native" } else { "generic" };
        let copies = if zero_copy { "zero-copy" } else { "copy" };
        let count = queues.len();
        let s = if count == 1 { "" } else { "s" };
        Ok(Self {
            description: Description {
                kind: Kind::AfXdp,
                interface: spec.interface.clone(),
                local,
                capabilities: Capabilities {
                    payload: station.payload,
                    segmentation: false,
                    coalescing: false,
                    zero_copy,
                },
                mode: format!("{place}, {copies}, {count} queue{s}"),
            },
            _attached: attached,
            queues,
            station,
            poll,
            turn: 0,
        })
    }

    /// Puts a packet's frames into a ring, or has the kernel send it; false:
    /// later.
    fn send(&mut self, packet: &TxPacket<'_>, now: Instant) -> io::Result<bool> {
        let mac = match self.station.way(packet, now) {
            Way::Frame(mac) => mac,
            Way::Kernel => return self.station.send_by_kernel(packet),
            Way::TooBig => {
                self.station
                    .counters
                    .refuse(packet.datagrams(), Fate::TooBig);
                return Ok(true);
            }
            Way::Refused => {
                self.station
                    .counters
                    .refuse(packet.datagrams(), Fate::Refused);
                return Ok(true);
            }
        };
        // All queues send to the same wire; the first is as good as any.
        let queue = &mut self.queues[0];
        if !queue.has_room(packet.datagrams().min(MAX_SEGMENTS)) {
            return Ok(false);
        }
        for payload in packet.iter() {
            let headers = self
                .station
                .headers(packet.to, mac, payload, Checksum::Full);
            let sent = headers.is_some_and(|headers| queue.push(headers.as_bytes(), payload));
            let single = TxPacket::new(packet.to, payload);
            if sent {
                self.station.counters.tx.add(&single);
            } else {
                self.station.counters.refuse(1, Fate::Refused);
            }
        }
        self.station.counters.tx.trains += u64::from(packet.is_train());
        Ok(true)
    }
}

impl Uplink for AfXdp {
    fn description(&self) -> &Description {
        &self.description
    }

    fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> io::Result<usize> {
        self.turn = self.turn.wrapping_add(1);
        let mut kept = 0;
        if self.turn.is_multiple_of(KERNEL_TURN) {
            kept += self.station.receive_from_kernel(buffers)?;
        }
        // Each time another queue is the first, so that none is starved.
        let count = self.queues.len();
        for step in 0..count {
            let queue = &mut self.queues[(self.turn + step) % count];
            queue.reclaim();
            kept += queue.rx(&mut self.station, &mut buffers[kept..]);
        }
        if kept == 0 {
            kept = self.station.receive_from_kernel(buffers)?;
        }
        Ok(kept)
    }

    fn tx(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let now = Instant::now();
        let mut done = 0;
        let mut failed = None;
        for packet in packets {
            match self.send(packet, now) {
                Ok(true) => done += 1,
                Ok(false) => break,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if self.queues[0].sending > 0 {
            self.queues[0].kick()?;
        }
        failed.map_or(Ok(done), Err)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }

    fn counters(&self) -> Counters {
        let statistics = self
            .queues
            .iter()
            .filter_map(|it| it.socket.statistics().ok());
        // An empty fill ring is counted in the first too.
        let drops = statistics.map(|it| it.rx_dropped + it.rx_ring_full);
        Counters {
            rx_overrun: drops.sum(),
            ..self.station.counters
        }
    }
}

/// The sockets of an interface's queues, `count` at most: it may have been made
/// with more queues than it uses.
fn open_queues(interface: &Interface, count: u32, setup: &Setup<'_>) -> Result<Vec<Queue>, Error> {
    let mut queues = Vec::new();
    for queue in 0..count {
        match Queue::open(interface, queue, setup) {
            Ok(opened) => queues.push(opened),
            Err(Error::Missing { source, .. })
                if queue > 0 && source.raw_os_error() == Some(libc::EINVAL) =>
            {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(queues)
}

/// A descriptor that is readable when one of those that it watches is.
pub(super) fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: epoll_create1 takes flags.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: the call has just made the descriptor: nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watches a descriptor for what comes in.
pub(super) fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 0,
    };
    // SAFETY: the event outlives the call; both descriptors are open.
    check(unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            fd.as_raw_fd(),
            &raw mut event,
        )
    })
    .map(drop)
}
