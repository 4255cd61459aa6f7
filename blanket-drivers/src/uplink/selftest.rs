//! The self-test: which uplink this kernel carries the most with.
//!
//! Each kind is opened on the interface itself, to see that it can be. Those
//! that can are then run over a veth pair between two network namespaces of
//! the test's own, without a byte on the node's network: what they differ in is
//! the kernel's and our own work for each datagram, which is the same there.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::lab::Lab;
use super::{Error, Kind, MAX_SEGMENTS, MAX_TRAIN, RX_BUFFER, RxBuffer, Spec, TxPacket, Uplink};
use super::{netlink, open};

/// How long each stream runs; all of it takes about two seconds.
const STREAM: Duration = Duration::from_millis(250);
/// Round trips that are timed, and for how long at most.
const TRIPS: usize = 200;
const TRIPS_TIME: Duration = Duration::from_millis(100);
/// How long the first datagram may take: neighbours have to be found.
const FIRST: Duration = Duration::from_secs(2);
/// Payload of a small datagram in bytes: a 64-byte frame in a tunnel's.
const SMALL: usize = 96;
/// Packets that are sent by one call, and buffers that are offered to one.
const BATCH: usize = 32;

/// What was measured of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Gb/s of payload in trains of datagrams as long as the MTU allows.
    pub bulk_gbps: f64,
    /// Seconds of processor time for a GB of that, both ends together.
    pub cpu_s_per_gb: f64,
    /// Small single datagrams per second, in thousands.
    pub small_kpps: f64,
    /// Microseconds there and back, without waking another thread.
    pub round_trip_us: f64,
}

/// One kind of uplink on one interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The kind.
    pub kind: Kind,
    /// How it is set up there, if it can be.
    pub mode: Option<String>,
    /// What it carries.
    pub figures: Option<Figures>,
    /// Why it cannot be used, or was not measured.
    pub obstacle: Option<String>,
    /// From 0 to 1: the geometric mean of its bulk, small-datagram and
    /// round-trip figures, each relative to the best.
    pub score: f64,
}

/// What the self-test found for an interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// All kinds, in order of preference.
    pub kinds: Vec<Measured>,
    /// The one with the highest score.
    pub chosen: Kind,
    /// Why that one, in words.
    pub reason: String,
}

impl Report {
    /// Whether anything could be measured.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        self.kinds.iter().any(|kind| kind.figures.is_some())
    }
}

/// Tries and measures every kind of uplink for the interface's address.
///
/// # Errors
/// There is no such interface, it is down, or without the address. That a kind
/// does not work is part of the report.
pub fn measure(interface: &str, address: IpAddr) -> Result<Report, Error> {
    let found = netlink::usable(interface, address)?;
    let spec = Spec::new(interface, SocketAddr::new(address, 0));
    let mut kinds: Vec<_> = Kind::OF_INTERFACES
        .into_iter()
        .map(|kind| {
            let opened = open(kind, &spec);
            Measured {
                kind,
                mode: opened.as_ref().ok().map(|it| it.description().mode.clone()),
                figures: None,
                obstacle: opened.err().map(|error| error.to_string()),
                score: 0.0,
            }
        })
        .collect();
    let mtu = found.mtu.clamp(576, 9000) as u32;
    let open_kinds = kinds
        .iter()
        .filter(|it| it.mode.is_some())
        .map(|it| it.kind);
    let open_kinds: Vec<_> = open_kinds.collect();
    // On a thread of its own, which takes the namespaces along.
    let results = std::thread::spawn(move || run(&open_kinds, mtu)).join();
    let results = results.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    for (kind, result) in results {
        let measured = kinds.iter_mut().find(|it| it.kind == kind);
        let Some(measured) = measured else { continue };
        match result {
            Ok(figures) => measured.figures = Some(figures),
            Err(error) => measured.obstacle = Some(format!("not measured: {error}")),
        }
    }
    Ok(judge(kinds))
}

type Outcome = (Kind, Result<Figures, String>);

/// Measures the kinds one after the other.
fn run(kinds: &[Kind], mtu: u32) -> Vec<Outcome> {
    let lab = match Lab::new(mtu, 1) {
        Ok(lab) => lab,
        Err(error) => {
            let told = error.to_string();
            return kinds
                .iter()
                .map(|kind| (*kind, Err(told.clone())))
                .collect();
        }
    };
    let one = |kind| -> Result<Figures, String> {
        let end = |end| lab.open(kind, 0, end, false).map_err(|e| e.to_string());
        let (mut near, mut far) = (end(0)?, end(1)?);
        figures(&mut *near, &mut *far).map_err(|e| e.to_string())
    };
    kinds.iter().map(|kind| (*kind, one(*kind))).collect()
}

/// Runs all loads from `near` to `far`.
pub(super) fn figures(near: &mut dyn Uplink, far: &mut dyn Uplink) -> io::Result<Figures> {
    let deadline = Instant::now() + FIRST;
    while !round_trip(near, far, Duration::from_millis(50))? {
        if Instant::now() > deadline {
            return Err(io::Error::other("nothing gets through"));
        }
    }
    let start = Instant::now();
    let mut trips = 0;
    while trips < TRIPS && start.elapsed() < TRIPS_TIME {
        trips += usize::from(round_trip(near, far, TRIPS_TIME)?);
    }
    let round_trip_us = start.elapsed().as_secs_f64() * 1e6 / trips.max(1) as f64;
    let payload = near.description().capabilities.payload;
    let segments = (MAX_TRAIN / payload.max(1)).clamp(1, MAX_SEGMENTS);
    let bulk = stream(near, far, payload, segments, STREAM)?;
    let small = stream(near, far, SMALL.min(payload), 1, STREAM)?;
    Ok(Figures {
        bulk_gbps: rounded(bulk.bytes as f64 * 8.0 / bulk.seconds / 1e9),
        cpu_s_per_gb: rounded(bulk.cpu / (bulk.bytes.max(1) as f64 / 1e9)),
        small_kpps: rounded(small.datagrams as f64 / small.seconds / 1e3),
        round_trip_us: rounded(round_trip_us),
    })
}

/// As many digits as a measurement is worth.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// One datagram there and back; false: it, or its answer, was lost.
fn round_trip(near: &mut dyn Uplink, far: &mut dyn Uplink, limit: Duration) -> io::Result<bool> {
    let (here, there) = (near.description().local, far.description().local);
    let content = [0x5a; SMALL];
    Ok(hand_over(near, far, there, &content, limit)?
        && hand_over(far, near, here, &content, limit)?)
}

fn hand_over(
    from: &mut dyn Uplink,
    to: &mut dyn Uplink,
    address: SocketAddr,
    content: &[u8],
    limit: Duration,
) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    from.tx(&[TxPacket::new(address, content)])?;
    let mut room = vec![0; RX_BUFFER];
    loop {
        if to.rx(&mut [RxBuffer::new(&mut room)])? > 0 {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        wait(to.fd(), left);
    }
}

/// Waits until something has come, `limit` at most.
pub(super) fn wait(fd: BorrowedFd<'_>, limit: Duration) {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = limit.as_millis().clamp(1, 1000) as libc::c_int;
    // SAFETY: one pollfd, which outlives the call. If it fails, who calls
    // looks for himself and comes back.
    unsafe { libc::poll(&raw mut poll, 1, ms) };
}

/// What a stream came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    pub(super) cpu: f64,
}

/// Sends as fast as it goes for `time`; what counts is what arrives.
pub(super) fn stream(
    near: &mut dyn Uplink,
    far: &mut dyn Uplink,
    size: usize,
    segments: usize,
    time: Duration,
) -> io::Result<Flow> {
    let to = far.description().local;
    let content = vec![0xa5; size * segments];
    let stop = AtomicBool::new(false);
    let before = far.counters().rx;
    let start = Instant::now();
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let result = drain(far, &stop);
            stop.store(true, Ordering::Relaxed);
            result
        });
        let sent = flood(
            near,
            &TxPacket::train(to, &content, size),
            start + time,
            &stop,
        );
        stop.store(true, Ordering::Relaxed);
        (sent, receiver.join())
    });
    let received = received.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let seconds = start.elapsed().as_secs_f64();
    let after = far.counters().rx;
    Ok(Flow {
        datagrams: after.datagrams - before.datagrams,
        bytes: after.bytes - before.bytes,
        seconds,
        cpu: sent? + received?,
    })
}

/// Sends copies of `packet`; returns the processor time it took.
fn flood(
    near: &mut dyn Uplink,
    packet: &TxPacket<'_>,
    until: Instant,
    stop: &AtomicBool,
) -> io::Result<f64> {
    let start = cpu_seconds();
    let packets = [*packet; BATCH];
    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
        if near.tx(&packets)? < BATCH {
            std::thread::yield_now();
        }
    }
    Ok(cpu_seconds() - start)
}

/// Takes what comes until nothing does after `stop`.
fn drain(far: &mut dyn Uplink, stop: &AtomicBool) -> io::Result<f64> {
    let start = cpu_seconds();
    let mut room = vec![0; RX_BUFFER * BATCH];
    loop {
        let mut rooms = room.chunks_exact_mut(RX_BUFFER);
        let mut buffers: [_; BATCH] =
            std::array::from_fn(|_| RxBuffer::new(rooms.next().unwrap_or_default()));
        if far.rx(&mut buffers)? > 0 {
            continue;
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(cpu_seconds() - start);
        }
        wait(far.fd(), Duration::from_millis(10));
    }
}

/// Processor time of this thread.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which outlives the call. It
    // knows this clock; a zero would only be a wrong figure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Gives marks, and chooses.
pub(super) fn judge(mut kinds: Vec<Measured>) -> Report {
    let all: Vec<Figures> = kinds.iter().filter_map(|it| it.figures).collect();
    let best = |of: fn(&Figures) -> f64| all.iter().map(of).fold(0.0, f64::max);
    let bulk = best(|it| it.bulk_gbps);
    let small = best(|it| it.small_kpps);
    let quick = best(|it| 1.0 / it.round_trip_us.max(0.001));
    let share = |value: f64, best: f64| if best > 0.0 { value / best } else { 0.0 };
    for kind in &mut kinds {
        let Some(it) = kind.figures else { continue };
        let product = share(it.bulk_gbps, bulk)
            * share(it.small_kpps, small)
            * share(1.0 / it.round_trip_us.max(0.001), quick);
        kind.score = rounded(product.cbrt());
    }
    // Of equal ones the first, which is the preferred one.
    let winner = kinds
        .iter()
        .rev()
        .filter(|it| it.figures.is_some())
        .max_by(|a, b| a.score.total_cmp(&b.score));
    let (chosen, reason) = match winner {
        Some(it) => {
            let reason = if all.len() == 1 {
                "it is the only one that could be measured".to_owned()
            } else {
                format!("its score of {:.2} is the highest", it.score)
            };
            (it.kind, reason)
        }
        None => (
            Kind::Udp,
            "nothing could be measured, and it works everywhere".to_owned(),
        ),
    };
    Report {
        kinds,
        chosen,
        reason,
    }
}
