//! The kernel's own stack: a UDP socket, with trains both ways.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::message::{self, Outgoing};
use super::netlink::Interface;
use super::station::{Fate, fate};
use super::{
    Capabilities, Counters, Description, Error, Kind, MAX_SEGMENTS, MAX_TRAIN, RxBuffer, Setup,
    Spec, TxPacket, Uplink, check, option, set_option, wire,
};

/// Bytes that wait in a socket's queues. root may exceed the system's limit.
const QUEUE: libc::c_int = 8 << 20;

/// `IP_PMTUDISC_PROBE`: never fragment, and leave the path's MTU to the tunnel.
const PROBE: libc::c_int = libc::IP_PMTUDISC_PROBE;

/// What a socket's buffers hold (`asm-generic/socket.h`; not in libc).
const SO_MEMINFO: libc::c_int = 55;

/// A filter that nothing passes.
const NOTHING: [libc::sock_filter; 1] = [libc::sock_filter {
    code: (libc::BPF_RET | libc::BPF_K) as u16,
    jt: 0,
    jf: 0,
    k: 0,
}];

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It sends and receives: the uplink, or what a raw one leaves to the
    /// kernel.
    Full,
    /// It only sends, for a raw uplink that sees all packets itself.
    Mute,
}

/// See the module.
pub(super) struct Udp {
    socket: UdpSocket,
    /// Of the same address, for sending alone. The kernel tells a socket's
    /// waiters of each datagram that has gone, and whoever waits for those
    /// that come need not be asked for each whether he wants to know.
    out: Option<UdpSocket>,
    description: Description,
    counters: Counters,
}

impl Udp {
    pub(super) fn open(spec: &Spec, interface: &Interface, used: Use) -> Result<Self, Error> {
        let setup = Setup {
            kind: Kind::Udp,
            interface: &spec.interface,
            capabilities: "CAP_NET_RAW",
        };
        let socket = bound(spec, used, &setup)?;
        let local = socket
            .local_addr()
            .map_err(|e| setup.error("read its address", e))?;
        let fd = socket.as_fd();
        prepare(fd, local).map_err(|e| setup.error("forbid fragments", e))?;
        let out = (used == Use::Full)
            .then(|| beside(fd, local, interface))
            .and_then(|out| match out {
                Ok(out) => Some(out),
                Err(error) => {
                    tracing::debug!("no socket for sending alone: {error}");
                    None
                }
            });
        let off: libc::c_int = 0;
        let on: libc::c_int = 1;
        // Setting the default to "none" tells whether the kernel has it.
        let segmentation = set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, &off).is_ok();
        let coalescing = set_option(fd, libc::SOL_UDP, libc::UDP_GRO, &on).is_ok();
        let word = |has, name| if has { name } else { "" };
        let mode = [word(segmentation, "GSO"), word(coalescing, "GRO")];
        let mode: Vec<_> = mode.into_iter().filter(|word| !word.is_empty()).collect();
        Ok(Self {
            description: Description {
                kind: Kind::Udp,
                interface: spec.interface.clone(),
                local,
                capabilities: Capabilities {
                    payload: interface.payload(local.ip()),
                    segmentation,
                    coalescing,
                    zero_copy: false,
                },
                mode: if mode.is_empty() {
                    "plain".to_owned()
                } else {
                    mode.join(", ")
                },
            },
            socket,
            out,
            counters: Counters::default(),
        })
    }

    /// Where it sends.
    fn out(&self) -> BorrowedFd<'_> {
        self.out.as_ref().unwrap_or(&self.socket).as_fd()
    }

    /// What it has sent and received, without asking the kernel.
    pub(super) fn tally(&self) -> Counters {
        self.counters
    }

    /// Puts a datagram, or a train to be cut up by the kernel, into a batch.
    fn push<'a>(batch: &mut Outgoing<'a>, packet: &TxPacket<'a>) {
        // A train's datagrams are shorter than the MTU, which is 16 bits.
        let segment = packet.is_train().then_some(packet.size() as u16);
        batch.push(Some(packet.to), &[packet.bytes], segment);
    }

    /// Sends `packet` alone, whatever the kernel's answer is; false: later.
    fn send_one(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        if packet.is_train() && self.description.capabilities.segmentation {
            let mut batch = Outgoing::new();
            Self::push(&mut batch, packet);
            match batch.send(self.out()) {
                Ok(_) => {
                    self.counters.tx.add(packet);
                    return Ok(true);
                }
                // Interfaces that cannot checksum do not segment (EIO).
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => {
                    self.description.capabilities.segmentation = false;
                }
                Err(error) => match fate(error)? {
                    Fate::Later => return Ok(false),
                    fate => {
                        self.counters.refuse(packet.datagrams(), fate);
                        return Ok(true);
                    }
                },
            }
        }
        self.send_singles(packet)
    }

    /// Sends a packet's datagrams one by one; false: later.
    fn send_singles(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        let total = packet.datagrams();
        let mut done = 0;
        while done < total {
            let mut batch = Outgoing::new();
            for bytes in packet.iter().skip(done).take(message::BATCH) {
                Self::push(&mut batch, &TxPacket::new(packet.to, bytes));
            }
            match batch.send(self.out()) {
                Ok(sent) => {
                    for bytes in packet.iter().skip(done).take(sent) {
                        let single = TxPacket::new(packet.to, bytes);
                        self.counters.tx.add(&single);
                    }
                    done += sent;
                }
                Err(error) => match fate(error)? {
                    Fate::Later if done == 0 => return Ok(false),
                    // What has gone cannot be taken back.
                    fate => {
                        self.counters.refuse(total - done, fate);
                        return Ok(true);
                    }
                },
            }
        }
        self.counters.tx.trains += u64::from(packet.is_train());
        Ok(true)
    }

    /// Sends what fits in one system call, if no packet needs more; returns
    /// how many packets went.
    fn send_batch(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let mut batch = Outgoing::new();
        for packet in packets {
            let whole = !packet.is_train() || self.description.capabilities.segmentation;
            if batch.is_full() || !whole || !self.fits(packet) {
                break;
            }
            Self::push(&mut batch, packet);
        }
        if batch.len() == 0 {
            return Ok(0);
        }
        match batch.send(self.out()) {
            Ok(sent) => {
                for packet in &packets[..sent] {
                    self.counters.tx.add(packet);
                }
                Ok(sent)
            }
            // The first of them is what the kernel does not like.
            Err(_) => Ok(0),
        }
    }

    fn fits(&self, packet: &TxPacket<'_>) -> bool {
        fits(packet, self.description.capabilities.payload)
    }
}

/// Whether a packet's datagrams have `payload` bytes at most, and it is not
/// longer than a train may be.
pub(super) fn fits(packet: &TxPacket<'_>, payload: usize) -> bool {
    packet.size() <= payload
        && packet.bytes.len() <= MAX_TRAIN
        && packet.datagrams() <= MAX_SEGMENTS
}

impl Uplink for Udp {
    fn description(&self) -> &Description {
        &self.description
    }

    fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> io::Result<usize> {
        let mut what = [(0, 0, None); message::BATCH];
        let counters = &mut self.counters;
        let slots = buffers.iter_mut().map(|buffer| &mut *buffer.bytes);
        let got = message::receive(self.socket.as_fd(), slots, |index, incoming| {
            let segment = wire::gro_segment(incoming.control).unwrap_or(incoming.len);
            what[index] = (incoming.len, segment, incoming.from);
            if incoming.truncated {
                counters.rx_truncated += 1;
                what[index].2 = None;
            }
        });
        let got = match got {
            Ok(got) => got,
            Err(error) => return fate(error).map(|_| 0),
        };
        let mut kept = 0;
        for (index, (len, segment, from)) in what.into_iter().enumerate().take(got) {
            let Some(from) = from else { continue };
            buffers.swap(kept, index);
            let buffer = &mut buffers[kept];
            (buffer.len, buffer.segment, buffer.from) = (len, segment, from);
            self.counters.rx.add(&buffer.packet());
            kept += 1;
        }
        Ok(kept)
    }

    fn tx(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(packet) = packets.get(done) {
            if !self.fits(packet) {
                self.counters.refuse(packet.datagrams(), Fate::TooBig);
                done += 1;
                continue;
            }
            let sent = self.send_batch(&packets[done..])?;
            done += sent;
            if sent == 0 {
                if !self.send_one(packet)? {
                    break;
                }
                done += 1;
            }
        }
        Ok(done)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn counters(&self) -> Counters {
        let memory = option::<9>(self.fd(), libc::SOL_SOCKET, SO_MEMINFO);
        let drops = memory.map_or(0, |words| words[libc::SK_MEMINFO_DROPS as usize]);
        Counters {
            rx_overrun: drops.into(),
            ..self.counters
        }
    }
}

/// A socket at the uplink's address, on its interface only.
fn bound(spec: &Spec, used: Use, setup: &Setup<'_>) -> Result<UdpSocket, Error> {
    let family = if spec.local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes integers.
    let fd = check(unsafe { libc::socket(family, kind, 0) })
        .map_err(|e| setup.error("make a socket", e))?;
    // SAFETY: the call has just made the descriptor: nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if used == Use::Mute {
        // Before it is bound, so that nothing gets in.
        attach_filter(fd.as_fd(), &NOTHING).map_err(|e| setup.error("attach a filter", e))?;
    }
    let name = spec.interface.as_bytes();
    // SAFETY: `name` has that many bytes and outlives the call.
    let bind = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    };
    check(bind).map_err(|e| setup.error("bind a socket to the interface", e))?;
    message::bind(fd.as_fd(), spec.local).map_err(|e| setup.error("take its address", e))?;
    Ok(fd.into())
}

/// Sets what both directions have in common.
fn prepare(fd: BorrowedFd<'_>, local: SocketAddr) -> io::Result<()> {
    // The two are hints: less room only drops more under bursts.
    for (name, plain) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        if set_option(fd, libc::SOL_SOCKET, name, &QUEUE).is_err() {
            let _ = set_option(fd, libc::SOL_SOCKET, plain, &QUEUE);
        }
    }
    let (level, option) = if local.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    set_option(fd, level, option, &PROBE)
}

/// A socket for sending alone beside `socket`, which has its address and stays
/// the one that receives: of two, the kernel prefers the one that is bound to
/// the interface. This one only has it as its way out, and drops what comes by
/// another one.
fn beside(
    socket: BorrowedFd<'_>,
    local: SocketAddr,
    interface: &Interface,
) -> io::Result<UdpSocket> {
    let (family, level, option) = if local.is_ipv4() {
        (libc::AF_INET, libc::IPPROTO_IP, libc::IP_UNICAST_IF)
    } else {
        (libc::AF_INET6, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF)
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes integers.
    let fd = check(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: the call has just made the descriptor: nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    attach_filter(fd.as_fd(), &NOTHING)?;
    set_option(fd.as_fd(), level, option, &interface.index.to_be())?;
    prepare(fd.as_fd(), local)?;
    // Only for this moment: nobody else gets the address.
    let share = |on: libc::c_int| {
        let mut both = [socket, fd.as_fd()].into_iter();
        both.try_for_each(|fd| set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &on))
    };
    let bound = share(1).and_then(|()| message::bind(fd.as_fd(), local));
    share(0).and(bound)?;
    Ok(fd.into())
}

/// Attaches a classic BPF program (socket(7), `SO_ATTACH_FILTER`).
pub(super) fn attach_filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_ptr().cast_mut(),
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// The port that a socket was given, for who asked for any.
pub(super) fn with_port(spec: &Spec, local: SocketAddr) -> Spec {
    Spec {
        local: SocketAddr::new(spec.local.ip(), local.port()),
        ..spec.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::super::lab::Lab;
    use super::super::tests::{end, in_lab, receive, send};
    use super::*;

    #[test]
    fn where_the_kernel_does_not_cut_trains_up_they_go_one_by_one() {
        in_lab(1500, 1, |lab| {
            lab.enter(0).unwrap();
            let name = Lab::name(0, 0);
            let interface = super::super::netlink::interface(&name).unwrap();
            let local = (Lab::address(0, 0, false), 0).into();
            let mut near = Udp::open(&Spec::new(&name, local), &interface, Use::Full).unwrap();
            near.description.capabilities.segmentation = false;
            let mut far = end(lab, Kind::Udp, 0, 1, false).unwrap();
            let content: Vec<u8> = (0..1000 * 50 + 1).map(|at| (at / 5) as u8).collect();
            let train = TxPacket::train(far.description().local, &content, 1000);
            send(&mut near, &[train]);
            let got = receive(&mut *far, 51);
            let joined: Vec<u8> = got.into_iter().flat_map(|(bytes, _)| bytes).collect();
            assert!(joined == content);
            let tx = near.counters().tx;
            assert_eq!((tx.datagrams, tx.bytes, tx.trains), (51, 50_001, 1));
        });
    }
}
