//! The least that a process costs which stands between this machine and a guest,
//! without a guest: frames come out of one TAP and go into another one as they are.
//! A benchmark's peer: `cargo xtask bench drivers`.

use std::error::Error;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use blanket_drivers::tap::{self, Offloads, Tap, TapQueue};
use blanket_memory::IoVec;
use clap::Parser;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Room for a frame with the header before it.
const ROOM: usize = tap::HEADER_LEN + 65_535 + 22;

/// Frames of one end before the other has its turn.
const BATCH: usize = 128;

/// Carries frames between two TAPs.
#[derive(Parser)]
struct Options {
    /// The TAPs, which are made.
    #[arg(num_args = 2, required = true)]
    taps: Vec<String>,
}

fn open(name: &str) -> Result<Tap, Box<dyn Error>> {
    let tap = Tap::open(&tap::Spec {
        name: Some(name.to_owned()),
        queues: 1,
        ..tap::Spec::default()
    })?;
    tap.set_offloads(Offloads(tap.offloads().0 & !libc::TUN_F_UFO))?;
    Ok(tap)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let taps: Vec<Tap> = options
        .taps
        .iter()
        .map(|name| open(name))
        .collect::<Result<_, _>>()?;
    let ends: Vec<&Arc<TapQueue>> = taps.iter().flat_map(Tap::queues).collect();
    let epoll = Epoll::new()?;
    for (end, queue) in ends.iter().enumerate() {
        let event = EpollEvent::new(EventSet::IN, end as u64);
        epoll.ctl(ControlOperation::Add, queue.as_raw_fd(), event)?;
    }
    let mut frame = vec![0; ROOM];
    let mut events = [EpollEvent::default(); 2];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            ready => ready?,
        };
        for event in &events[..ready] {
            let end = usize::from(event.data() != 0);
            for _ in 0..BATCH {
                let Ok(len) = ends[end].read(&mut frame) else {
                    break;
                };
                let vector = [IoVec::new(frame.as_mut_ptr(), len)];
                // What the kernel does not take is lost.
                // SAFETY: the frame outlives the call, which only reads it.
                let _ = unsafe { ends[1 - end].writev(&vector) };
            }
        }
    }
}
