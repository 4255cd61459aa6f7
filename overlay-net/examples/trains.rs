//! The least that tunnels between nodes can cost, whatever they carry: trains of
//! datagrams from one node to another one, with nothing in them. A benchmark's
//! peer: `cargo xtask bench overlay`.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_drivers::uplink::{self, Kind, RX_BUFFER, RxBuffer, TxPacket};
use clap::Parser;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes of a datagram, and of a train.
const DATAGRAM: usize = 1472;
const TRAIN: usize = 44 * DATAGRAM;

/// Trains at once.
const BATCH: usize = 16;

/// Sends trains, or takes them, and says how many bytes there were, and how many
/// seconds of a processor they took.
#[derive(Parser)]
struct Options {
    /// The interface to the other node.
    interface: String,
    /// This node's address there.
    local: SocketAddr,
    /// For so many seconds.
    seconds: u64,
    /// Who they are sent to; none: they are taken.
    remote: Option<SocketAddr>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let spec = uplink::Spec::new(&options.interface, options.local);
    let mut uplink = uplink::open(Kind::Udp, &spec)?;
    let epoll = Epoll::new()?;
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, uplink.fd().as_raw_fd(), event)?;
    let train = vec![0; TRAIN];
    let mut rooms: Vec<Vec<u8>> = (0..BATCH).map(|_| vec![0; RX_BUFFER]).collect();
    let mut events = [EpollEvent::default(); 1];
    let (mut bytes, end) = (0, Instant::now() + Duration::from_secs(options.seconds));
    while Instant::now() < end {
        if let Some(remote) = options.remote {
            let trains = [TxPacket::train(remote, &train, DATAGRAM); BATCH];
            bytes += uplink.tx(&trains)? * TRAIN;
            continue;
        }
        // It ends soon after, if nothing comes.
        let _ = epoll.wait(100, &mut events);
        let mut rooms = rooms.iter_mut();
        let mut buffers: [RxBuffer<'_>; BATCH] = std::array::from_fn(|_| {
            RxBuffer::new(rooms.next().map_or(&mut [][..], |room| room.as_mut_slice()))
        });
        let got = uplink.rx(&mut buffers)?;
        bytes += buffers[..got]
            .iter()
            .map(|buffer| buffer.len)
            .sum::<usize>();
    }
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, rest) = stat.rsplit_once(')').context("/proc/self/stat")?;
    let ticks = rest.split_ascii_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map_while(|word| word.parse::<u64>().ok()).sum();
    println!("{bytes} {}", ticks as f64 / 100.0);
    Ok(())
}
