//! `AF_PACKET`: frames past the kernel's IP stack (packet(7)).
//!
//! In by a `TPACKET_V3` ring behind a filter for the uplink's address and port.
//! Out by `sendmmsg` rather than a ring: a message can be a whole train with
//! its virtio header, which a ring's slots would have to be 64 KiB large for.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use super::message::{BATCH, Outgoing};
use super::netlink::Interface;
use super::ring::Ring;
use super::station::{Fate, Station, Way, fate};
use super::udp::{Use, attach_filter};
use super::wire::{Checksum, Headers, VIRTIO_HEADER, VirtioHeader};
use super::{
    Capabilities, Counters, Description, Error, Kind, RxBuffer, Setup, Spec, TxPacket, Uplink,
    check, option, set_option,
};

/// `linux/if_packet.h`; not in libc.
const PACKET_STATISTICS: libc::c_int = 6;

/// See the module.
pub(super) struct AfPacket {
    // Before the socket that it is a mapping of.
    ring: Ring,
    socket: OwnedFd,
    station: Station,
    description: Description,
    /// Packets that the kernel had no room for, up to the last question.
    overrun: Cell<u64>,
    /// What is in front of the packets of a batch.
    fronts: Box<[(Headers, [u8; VIRTIO_HEADER]); BATCH]>,
}

impl AfPacket {
    pub(super) fn open(spec: &Spec, interface: &Interface) -> Result<Self, Error> {
        let setup = Setup {
            kind: Kind::AfPacket,
            interface: &spec.interface,
            capabilities: "CAP_NET_RAW",
        };
        let station = Station::open(spec, interface, Use::Mute)?;
        let local = station.end.address;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Of no protocol: nothing comes in until it is bound.
        // SAFETY: socket takes integers.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })
            .map_err(|e| setup.error("make a packet socket", e))?;
        // SAFETY: the call has just made the descriptor: nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let fd = socket.as_fd();
        let on: libc::c_int = 1;
        let version = libc::tpacket_versions::TPACKET_V3 as libc::c_int;
        set_option(fd, libc::SOL_PACKET, libc::PACKET_VERSION, &version)
            .map_err(|e| setup.error("use TPACKET_V3", e))?;
        set_option(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on)
            .map_err(|e| setup.error("put virtio headers in front of frames", e))?;
        attach_filter(fd, &filter(local)).map_err(|e| setup.error("attach a filter", e))?;
        let ring = Ring::new(fd).map_err(|e| setup.error("set up a ring", e))?;
        bind(fd, interface.index, local).map_err(|e| setup.error("bind a packet socket", e))?;
        Ok(Self {
            description: Description {
                kind: Kind::AfPacket,
                interface: spec.interface.clone(),
                local,
                capabilities: Capabilities {
                    payload: station.payload,
                    segmentation: true,
                    coalescing: true,
                    zero_copy: false,
                },
                mode: "TPACKET_V3, GSO".to_owned(),
            },
            fronts: Box::new([(Headers::empty(), [0; VIRTIO_HEADER]); BATCH]),
            overrun: Cell::new(0),
            ring,
            socket,
            station,
        })
    }

    /// Sends `packet` in one frame for each datagram: this kernel or interface
    /// does not cut trains up. False: later.
    fn send_one_by_one(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        let total = packet.datagrams();
        let mut done = 0;
        while done < total {
            let mut singles = [*packet; BATCH];
            let mut count = 0;
            for (single, bytes) in singles.iter_mut().zip(packet.iter().skip(done)) {
                *single = TxPacket::new(packet.to, bytes);
                count += 1;
            }
            match self.send_frames(&singles[..count]) {
                Ok(sent) if sent > 0 => done += sent,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ if done == 0 => return Ok(false),
                // What has gone cannot be taken back.
                _ => {
                    self.station.counters.refuse(total - done, Fate::Later);
                    return Ok(true);
                }
            }
        }
        self.station.counters.tx.trains += u64::from(packet.is_train());
        Ok(true)
    }

    /// Sends in one call what goes in frames, up to the first that does not;
    /// returns how many are done with.
    fn send_frames(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let now = Instant::now();
        let mut count = 0;
        for (packet, front) in packets.iter().zip(self.fronts.iter_mut()) {
            let whole = !packet.is_train() || self.description.capabilities.segmentation;
            let Way::Frame(mac) = self.station.way(packet, now) else {
                break;
            };
            let headers = self
                .station
                .headers(packet.to, mac, packet.bytes, Checksum::Partial);
            let (Some(headers), true) = (headers, whole) else {
                break;
            };
            // A train's datagrams are shorter than the MTU, which is 16 bits.
            let segment = if packet.is_train() {
                packet.size() as u16
            } else {
                0
            };
            *front = (headers, VirtioHeader::build(&headers, segment));
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        let mut batch = Outgoing::new();
        for (packet, (headers, virtio)) in packets.iter().zip(self.fronts.iter()).take(count) {
            batch.push(None, &[virtio, headers.as_bytes(), packet.bytes], None);
        }
        let error = match batch.send(self.socket.as_fd()) {
            Ok(sent) => {
                for packet in &packets[..sent] {
                    self.station.counters.tx.add(packet);
                }
                return Ok(sent);
            }
            Err(error) => error,
        };
        if packets[0].is_train() && error.raw_os_error() == Some(libc::EINVAL) {
            self.description.capabilities.segmentation = false;
            return Ok(0);
        }
        match fate(error)? {
            Fate::Later => Err(io::ErrorKind::WouldBlock.into()),
            fate => {
                let datagrams = packets[0].datagrams();
                self.station.counters.refuse(datagrams, fate);
                Ok(1)
            }
        }
    }

    /// Sends the first packet in whichever way there is; false: later.
    fn send_first(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        match self.station.way(packet, Instant::now()) {
            Way::TooBig => {
                self.station
                    .counters
                    .refuse(packet.datagrams(), Fate::TooBig);
                Ok(true)
            }
            Way::Refused => {
                self.station
                    .counters
                    .refuse(packet.datagrams(), Fate::Refused);
                Ok(true)
            }
            Way::Kernel => self.station.send_by_kernel(packet),
            Way::Frame(_) => self.send_one_by_one(packet),
        }
    }
}

impl Uplink for AfPacket {
    fn description(&self) -> &Description {
        &self.description
    }

    fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> io::Result<usize> {
        let mut kept = 0;
        let station = &mut self.station;
        while let Some(buffer) = buffers.get_mut(kept) {
            let mut taken = false;
            let there = self.ring.next(|frame| {
                let Some(virtio) = VirtioHeader::parse(frame.virtio) else {
                    station.counters.rx_malformed += 1;
                    return;
                };
                if !frame.whole {
                    station.counters.rx_truncated += 1;
                    return;
                }
                let settled = libc::TP_STATUS_CSUM_VALID | libc::TP_STATUS_CSUMNOTREADY;
                let verify = !virtio.checksum_settled && frame.status & settled == 0;
                taken = station.take(frame.bytes, verify, virtio.segment.into(), buffer);
            });
            kept += usize::from(taken);
            if !there {
                break;
            }
        }
        if kept == 0 {
            socket_error(self.socket.as_fd())?;
        }
        Ok(kept)
    }

    fn tx(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize> {
        let mut done = 0;
        while done < packets.len() {
            let sent = match self.send_frames(&packets[done..]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                sent => sent?,
            };
            done += sent;
            if sent == 0 {
                match self.send_first(&packets[done]) {
                    Ok(true) => done += 1,
                    Ok(false) => break,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(done)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn counters(&self) -> Counters {
        // Packets, drops, times that the ring was full; reading sets them to 0.
        let now = option::<3>(self.socket.as_fd(), libc::SOL_PACKET, PACKET_STATISTICS);
        let drops = now.map_or(0, |words| words[1]);
        self.overrun.update(|total| total + u64::from(drops));
        Counters {
            rx_overrun: self.overrun.get(),
            ..self.station.counters
        }
    }
}

/// What happened to the interface, which a ring does not tell.
fn socket_error(fd: BorrowedFd<'_>) -> io::Result<()> {
    let [error] = option::<1>(fd, libc::SOL_SOCKET, libc::SO_ERROR)?;
    if error == 0 {
        return Ok(());
    }
    let error = error.cast_signed();
    fate(io::Error::from_raw_os_error(error)).map(drop)
}

/// Binds to the interface, for frames of the address's family alone: of one
/// protocol the kernel does not show what it sends itself.
fn bind(fd: BorrowedFd<'_>, index: u32, local: SocketAddr) -> io::Result<()> {
    let protocol = if local.is_ipv4() {
        libc::ETH_P_IP
    } else {
        libc::ETH_P_IPV6
    };
    // SAFETY: zeros are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (protocol as u16).to_be();
    address.sll_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` has `len` bytes and outlives the call.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// Accepts unfragmented UDP to `local` (classic BPF, Linux
/// `Documentation/networking/filter.rst`).
pub(super) fn filter(local: SocketAddr) -> Vec<libc::sock_filter> {
    /// Load at an offset, and which value it must have; or must have no bit of.
    enum Test {
        Is(u32, u32, u32),
        No(u32, u32, u32),
    }
    let (b, h, w) = (libc::BPF_B, libc::BPF_H, libc::BPF_W);
    let port = u32::from(local.port());
    let tests = match local.ip() {
        IpAddr::V4(ip) => vec![
            Test::Is(b, 14, 0x45),
            Test::Is(b, 23, 17),
            Test::No(h, 20, 0x3fff),
            Test::Is(w, 30, u32::from(ip)),
            Test::Is(h, 36, port),
        ],
        IpAddr::V6(ip) => {
            let mut tests = vec![Test::Is(b, 20, 17)];
            let words = ip.octets();
            for (place, word) in (38..).step_by(4).zip(words.chunks_exact(4)) {
                let word = word
                    .iter()
                    .fold(0, |word, byte| word << 8 | u32::from(*byte));
                tests.push(Test::Is(w, place, word));
            }
            tests.push(Test::Is(h, 56, port));
            tests
        }
    };
    let insn = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |size| libc::BPF_LD | libc::BPF_ABS | size;
    // Two instructions for each test; the last two take or drop the frame.
    let total = tests.len() * 2;
    let mut program = Vec::with_capacity(total + 2);
    for test in tests {
        // From the jump behind the load to the drop.
        let drop = (total - program.len() - 1) as u8;
        match test {
            Test::Is(size, at, value) => {
                program.push(insn(load(size), 0, 0, at));
                program.push(insn(libc::BPF_JMP | libc::BPF_JEQ, 0, drop, value));
            }
            Test::No(size, at, bits) => {
                program.push(insn(load(size), 0, 0, at));
                program.push(insn(libc::BPF_JMP | libc::BPF_JSET, drop, 0, bits));
            }
        }
    }
    program.push(insn(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX));
    program.push(insn(libc::BPF_RET | libc::BPF_K, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::super::tests::{acquaint, end, in_lab, receive, send};
    use super::*;

    #[test]
    fn where_the_kernel_takes_no_trains_they_go_frame_by_frame() {
        in_lab(1500, 1, |lab| {
            lab.enter(0).unwrap();
            let name = Lab::name(0, 0);
            let interface = super::super::netlink::interface(&name).unwrap();
            let local = (Lab::address(0, 0, false), 4789).into();
            let mut near = match AfPacket::open(&Spec::new(&name, local), &interface) {
                Ok(near) => near,
                Err(error) => return println!("skipped, because {error}"),
            };
            let mut far = end(lab, Kind::Udp, 0, 1, false).unwrap();
            acquaint(&mut near, &mut *far);
            near.description.capabilities.segmentation = false;
            let content: Vec<u8> = (0..1000 * 50 + 1).map(|at| (at / 5) as u8).collect();
            let train = TxPacket::train(far.description().local, &content, 1000);
            let before = near.counters();
            send(&mut near, &[train]);
            let got = receive(&mut *far, 51);
            let joined: Vec<u8> = got.into_iter().flat_map(|(bytes, _)| bytes).collect();
            assert!(joined == content);
            let after = near.counters();
            assert_eq!(after.tx.datagrams - before.tx.datagrams, 51);
            assert_eq!(after.tx.trains - before.tx.trains, 1);
            assert_eq!(after.tx_kernel, before.tx_kernel);
        });
    }
}
