//! The least that an overlay in a process can cost between two TAPs: frames
//! come out of one, go in trains of datagrams as they are, and go into the
//! other one. Nothing is looked up, learned, sealed or repaired. A benchmark's
//! peer: `cargo xtask bench overlay`.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use blanket_drivers::tap::{self, Offloads, Tap};
use blanket_drivers::uplink::{self, Kind, RX_BUFFER, RxBuffer, TxPacket};
use blanket_memory::IoVec;
use clap::Parser;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How a frame begins: with this, and its length with this.
const MAGIC: [u8; 4] = *b"LEAS";
const START: usize = 8;

/// Bytes of a datagram, and of a train.
const DATAGRAM: usize = 1472;
const TRAIN: usize = 44 * DATAGRAM;

/// Room for a frame with what is before it.
const ROOM: usize = START + tap::HEADER_LEN + 65_535 + 22;

/// Frames, and trains, at once.
const BATCH: usize = 16;

/// Carries frames between two TAPs on two nodes, as they are.
#[derive(Parser)]
struct Options {
    /// The TAP, which is made.
    tap: String,
    /// The interface to the other node.
    interface: String,
    /// This node's address there.
    local: SocketAddr,
    /// The other one's.
    remote: SocketAddr,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let tap = Tap::open(&tap::Spec {
        name: Some(options.tap),
        queues: 1,
        ..tap::Spec::default()
    })?;
    tap.set_offloads(Offloads(tap.offloads().0 & !libc::TUN_F_UFO))?;
    let queue = tap.queues().first().context("a TAP without queues")?;
    let spec = uplink::Spec::new(&options.interface, options.local);
    let mut uplink = uplink::open(Kind::Udp, &spec)?;
    let epoll = Epoll::new()?;
    for fd in [queue.as_raw_fd(), uplink.fd().as_raw_fd()] {
        let event = EpollEvent::new(EventSet::IN, fd as u64);
        epoll.ctl(ControlOperation::Add, fd, event)?;
    }
    let mut frames: Vec<Vec<u8>> = (0..BATCH).map(|_| vec![0; ROOM]).collect();
    let mut rooms: Vec<Vec<u8>> = (0..BATCH).map(|_| vec![0; RX_BUFFER]).collect();
    let mut whole: Vec<u8> = Vec::with_capacity(ROOM);
    let mut events = [EpollEvent::default(); 2];
    loop {
        match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
            _ => (),
        }
        loop {
            let mut lens = [0; BATCH];
            let mut count = 0;
            for (frame, its) in frames.iter_mut().zip(&mut lens) {
                let Ok(len) = queue.read(&mut frame[START..]) else {
                    break;
                };
                *its = START + len;
                frame[..4].copy_from_slice(&MAGIC);
                frame[4..START].copy_from_slice(&(*its as u32).to_ne_bytes());
                count += 1;
            }
            let mut trains = [TxPacket::new(options.remote, &[]); 2 * BATCH];
            let pieces = frames.iter().zip(lens).take(count);
            let pieces = pieces.flat_map(|(frame, len)| frame[..len].chunks(TRAIN));
            let mut used = 0;
            for (train, bytes) in trains.iter_mut().zip(pieces) {
                *train = TxPacket::train(options.remote, bytes, DATAGRAM);
                used += 1;
            }
            if used > 0 {
                uplink.tx(&trains[..used])?;
            }
            let mut rooms = rooms.iter_mut();
            let mut buffers: [RxBuffer<'_>; BATCH] = std::array::from_fn(|_| {
                RxBuffer::new(rooms.next().map_or(&mut [][..], |room| room.as_mut_slice()))
            });
            let got = uplink.rx(&mut buffers)?;
            for buffer in &buffers[..got] {
                let bytes = &buffer.bytes[..buffer.len];
                hand_on(bytes, &mut whole, &mut |frame| {
                    let vector = [IoVec::new(frame.as_ptr().cast_mut(), frame.len())];
                    // What the kernel does not take is lost.
                    // SAFETY: the frame outlives the call, which only reads it.
                    let _ = unsafe { queue.writev(&vector) };
                });
            }
            if count + got == 0 {
                break;
            }
        }
    }
}

/// Hands on the frames that end in `bytes`; what is left of one that has begun
/// is in `whole`.
fn hand_on(mut bytes: &[u8], whole: &mut Vec<u8>, each: &mut dyn FnMut(&[u8])) {
    if bytes.starts_with(&MAGIC) {
        // Some of the one before is lost.
        whole.clear();
    }
    while !bytes.is_empty() {
        let start = if whole.is_empty() { bytes } else { &whole[..] };
        let len = start.get(4..START).and_then(|len| len.try_into().ok());
        let len = len.map_or(0, |len| u32::from_ne_bytes(len) as usize);
        if !start.starts_with(&MAGIC) || !(START..=ROOM).contains(&len) {
            return whole.clear();
        }
        if whole.is_empty() && len <= bytes.len() {
            each(&bytes[START..len]);
            bytes = &bytes[len..];
            continue;
        }
        let (more, rest) = bytes.split_at(bytes.len().min(len - whole.len()));
        whole.extend_from_slice(more);
        bytes = rest;
        if whole.len() == len {
            each(&whole[START..]);
            whole.clear();
        }
    }
}
