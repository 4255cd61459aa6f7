//! Frames that nobody should send, as a capture.

use std::iter;

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

const ALL: Mac = [0xff; 6];

const IPV4: [u8; 2] = [8, 0];
const ARP: [u8; 2] = [8, 6];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TAG: [u8; 2] = [0x81, 0];
const SERVICE_TAG: [u8; 2] = [0x88, 0xa8];

/// A file of libpcap's, of Ethernet frames.
pub(super) fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let word = u32::to_le_bytes;
    let header = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, 1];
    let mut file: Vec<u8> = header.into_iter().flat_map(word).collect();
    for (number, frame) in frames.iter().enumerate() {
        let len = frame.len() as u32;
        file.extend([0, number as u32, len, len].into_iter().flat_map(word));
        file.extend(frame);
    }
    file
}

/// The frames of such a file.
pub(super) fn frames_of(file: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = file.get(24..).unwrap_or_default();
    iter::from_fn(|| {
        let len = u32::from_le_bytes(rest.get(8..12)?.try_into().ok()?) as usize;
        let (frame, after) = rest.get(16..)?.split_at_checked(len)?;
        rest = after;
        Some(frame.to_vec())
    })
    .collect()
}

/// Always the same numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

fn sum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2);
    let words = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn ethernet(to: Mac, from: Mac, kind: [u8; 2], content: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind, content].concat()
}

/// An IPv4 packet from `10.0.0.66` to `10.0.0.1`; `fragment` as in its header.
fn ipv4(protocol: u8, fragment: u16, content: &[u8]) -> Vec<u8> {
    packet([10, 0, 0, 66], [10, 0, 0, 1], protocol, fragment, content)
}

fn packet(from: [u8; 4], to: [u8; 4], protocol: u8, fragment: u16, content: &[u8]) -> Vec<u8> {
    let [high, low] = ((20 + content.len()) as u16).to_be_bytes();
    let [f, g] = fragment.to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 7, f, g, 64, protocol, 0, 0];
    packet.extend(from.into_iter().chain(to));
    let header = sum(&packet);
    packet[10..12].copy_from_slice(&header);
    packet.extend(content);
    packet
}

/// A TCP header with these options (a multiple of four bytes), and `data_offset` words long as it
/// says itself.
fn tcp(data_offset: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut segment = vec![0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1];
    segment.extend([data_offset << 4, 2, 1, 0, 0, 0, 0, 0]);
    segment.extend(options);
    segment.extend(payload);
    segment
}

fn arp(operation: u16, sender: (Mac, [u8; 4]), target: (Mac, [u8; 4])) -> Vec<u8> {
    let [high, low] = operation.to_be_bytes();
    let mut arp = vec![0, 1, 8, 0, 6, 4, high, low];
    for (mac, ip) in [sender, target] {
        arp.extend(mac);
        arp.extend(ip);
    }
    arp
}

/// An ICMPv6 message of neighbour discovery to all, with these options.
fn nd(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    message.extend(options);
    ipv6(58, message.len() as u16, &message)
}

fn ipv6(next: u8, len: u16, content: &[u8]) -> Vec<u8> {
    let [high, low] = len.to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, high, low, next, 255];
    packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x66]);
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend(content);
    packet
}

/// All of it, from a station to another one and to all.
pub(super) fn malformed(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for to in [to, ALL] {
        all.extend(headers(from, to));
        all.extend(packets(from, to));
        all.extend(questions(from, to));
        all.extend(tags(from, to));
    }
    // Every frame cut off everywhere, and with wrong bytes.
    let mut random = Random(7);
    let whole: Vec<_> = all.iter().filter(|frame| frame.len() < 200).collect();
    let mut worse = Vec::new();
    for frame in whole {
        worse.extend(
            (14..frame.len().min(80))
                .step_by(7)
                .map(|len| frame[..len].to_vec()),
        );
        for _ in 0..6 {
            let mut changed = frame.clone();
            for _ in 0..1 + random.below(4) {
                // Who sends it, and to whom, stays.
                let at = 12 + random.below(changed.len().max(13) - 12);
                if let Some(byte) = changed.get_mut(at) {
                    *byte = random.below(256) as u8;
                }
            }
            worse.push(changed);
        }
    }
    all.extend(worse);
    all.extend(spoofed(from, to));
    all
}

/// Truncated, wrong lengths, no known protocol.
fn headers(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let mut random = Random(3);
    let mut all: Vec<Vec<u8>> = (14..60)
        .step_by(5)
        .map(|len| {
            let content = random.bytes(len - 14);
            ethernet(to, from, IPV4, &content)
        })
        .collect();
    for kind in [
        [0, 0],
        [0, 46],
        [5, 0xdc],
        [0x88, 0xb6],
        [0x88, 0x47],
        [0xff, 0xff],
    ] {
        all.push(ethernet(to, from, kind, &random.bytes(46)));
    }
    // Length fields of IEEE 802.3 that are longer than the frame.
    all.push(ethernet(to, from, [5, 0], &[0xaa, 0xaa, 3]));
    all
}

fn packets(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let udp = |len: u16| {
        let [high, low] = len.to_be_bytes();
        [&[0, 9, 0, 9, high, low, 0, 0][..], &[0x55; 24]].concat()
    };
    let mut ip = |packet: Vec<u8>| all.push(ethernet(to, from, IPV4, &packet));
    // A header that is too short, too long, of another version; a length that is not.
    for first in [0x40, 0x41, 0x44, 0x4f, 0x55, 0x05, 0xf5] {
        let mut packet = ipv4(17, 0, &udp(32));
        packet[0] = first;
        ip(packet);
    }
    for len in [0, 19, 20, 27, 51, 53, 1500, 65_535_u16] {
        let mut packet = ipv4(17, 0, &udp(32));
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        ip(packet);
    }
    for len in [0, 7, 31, 33, 65_535] {
        ip(ipv4(17, 0, &udp(len)));
    }
    // Fragments that overlap, that have no first one, that are longer than a packet may be.
    for fragment in [
        0x2000, 0x2001, 0x2000, 0x0001, 0x2002, 0x3fff, 0x1fff, 0xffff,
    ] {
        ip(ipv4(6, fragment, &tcp(5, &[], &[0x41; 24])));
    }
    // TCP: its header reaches beyond the packet, or is shorter than it is; options that lie.
    for offset in [0, 4, 6, 15] {
        ip(ipv4(6, 0, &tcp(offset, &[], &[])));
    }
    for options in [
        [2, 0, 5, 0xb4],
        [2, 4, 0, 0],
        [2, 4, 0xff, 0xff],
        [2, 255, 5, 0xb4],
        [5, 1, 5, 1],
        [8, 2, 1, 3],
        [1, 1, 1, 2],
        [0, 2, 4, 5],
        [255, 3, 3, 3],
    ] {
        ip(ipv4(6, 0, &tcp(6, &options, &[])));
        ip(ipv4(6, 0, &tcp(15, &options.repeat(10), &[])));
    }
    // IP options that lie; a group's report that is cut off.
    for option in [[7, 0, 4, 0], [7, 255, 4, 0], [0x94, 4, 0, 0], [68, 3, 1, 1]] {
        let mut packet = ipv4(2, 0, &[0x16, 0, 0, 0]);
        packet[0] = 0x46;
        packet.splice(20..20, option);
        ip(packet);
    }
    for kind in [0x11, 0x12, 0x16, 0x17, 0x22] {
        ip(ipv4(
            2,
            0,
            &[kind, 0, 0, 0, 239, 1, 1, 1, 0xff, 0xff, 0xff, 0xff],
        ));
    }
    // Longer than anybody has room for.
    for len in [1501, 2000, 9000, 40_000, 65_000] {
        ip(ipv4(17, 0, &vec![0x55; len - 20]));
    }
    let mut six = |packet: Vec<u8>| all.push(ethernet(to, from, IPV6, &packet));
    for (next, len) in [(17, 0), (17, 65_535), (58, 3), (59, 0), (6, 19)] {
        six(ipv6(next, len, &[0x41; 24]));
    }
    // Headers that follow each other without end, and a fragment that has none.
    let chain: Vec<u8> = iter::repeat_n([0, 0, 0, 0, 0, 0, 0, 0], 40)
        .flatten()
        .collect();
    six(ipv6(0, chain.len() as u16, &chain));
    six(ipv6(43, 8, &[44, 255, 0, 0, 0, 0, 0, 0]));
    six(ipv6(44, 8, &[17, 0, 0xff, 0xff, 0, 0, 0, 1]));
    all
}

fn questions(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let me = (from, [10, 0, 0, 66]);
    let zero = ([0; 6], [0; 4]);
    for operation in [0, 1, 2, 3, 8, 0xffff] {
        for (sender, target) in [
            (me, zero),
            (zero, me),
            (me, (ALL, [255; 4])),
            ((ALL, [10, 0, 0, 1]), me),
            (([1, 0, 0x5e, 0, 0, 1], [224, 0, 0, 1]), zero),
        ] {
            all.push(ethernet(to, from, ARP, &arp(operation, sender, target)));
        }
    }
    // Of another hardware, of another protocol, with other lengths.
    for (at, byte) in [(1, 7), (2, 0x86), (4, 255), (4, 0), (5, 16), (5, 0)] {
        let mut wrong = arp(1, me, zero);
        wrong[at] = byte;
        all.push(ethernet(to, from, ARP, &wrong));
    }
    for kind in [133, 134, 135, 136, 137, 130, 143] {
        for options in [
            &[][..],
            &[1, 0, 0, 0],
            &[1, 1, 1, 0x5e, 0, 0, 1, 2],
            &[1, 255, 2, 0, 0, 0, 0, 1],
            &[2, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ] {
            all.push(ethernet(to, from, IPV6, &nd(kind, options)));
        }
    }
    all
}

/// Tags in tags, as somebody sends who wants to get into another VLAN.
fn tags(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let ping = ipv4(1, 0, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
    let tag = |kind: [u8; 2], vid: u16| [kind, vid.to_be_bytes()].concat();
    let mut all = Vec::new();
    for outer in [0, 1, 5, 6, 0xfff, 0xe006] {
        all.push(ethernet(
            to,
            from,
            TAG,
            &[&tag(TAG, outer)[2..], &IPV4, &ping].concat(),
        ));
        for (kind, next) in [(TAG, TAG), (SERVICE_TAG, TAG), (TAG, SERVICE_TAG)] {
            for inner in [0, 5, 6] {
                let nested = [&tag(kind, outer)[2..], &tag(next, inner), &IPV4, &ping].concat();
                all.push(ethernet(to, from, kind, &nested));
            }
        }
    }
    for depth in [3, 10, 100, 300] {
        let mut nested = [0, 6].to_vec();
        nested.extend(iter::repeat_n(tag(TAG, 6), depth).flatten());
        nested.extend(IPV4);
        nested.extend(&ping);
        all.push(ethernet(to, from, SERVICE_TAG, &nested));
    }
    // A tag, and then nothing.
    all.push(ethernet(to, from, TAG, &[]));
    all.push(ethernet(to, from, TAG, &[0, 6]));
    all.push(ethernet(to, from, SERVICE_TAG, &[0, 6, 0x81]));
    all
}

/// From addresses that are others', that nobody can have, and that there are many of; to groups
/// that end at the next bridge.
fn spoofed(from: Mac, to: Mac) -> Vec<Vec<u8>> {
    let ping = ipv4(1, 0, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
    let mut all: Vec<_> = [[0; 6], ALL, [1, 0, 0x5e, 0, 0, 1], to]
        .into_iter()
        .map(|source| ethernet(to, source, IPV4, &ping))
        .collect();
    for group in [0, 1, 2, 3, 0xe] {
        let to = [1, 0x80, 0xc2, 0, 0, group];
        all.push(ethernet(to, from, [0x88, 9], &[0; 46]));
    }
    all.extend((0..3000_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        ethernet(ALL, [2, 0x66, 0, 0, high, low], IPV4, &ping)
    }));
    all
}

/// Where UDP datagrams come from and go to.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub(super) from: (Mac, [u8; 4], u16),
    pub(super) to: (Mac, [u8; 4], u16),
}

impl Way {
    /// A datagram, without a checksum.
    fn datagram(&self, payload: &[u8]) -> Vec<u8> {
        let mut udp = Vec::new();
        for number in [self.from.2, self.to.2, (8 + payload.len()) as u16, 0] {
            udp.extend(number.to_be_bytes());
        }
        udp.extend(payload);
        let packet = packet(self.from.1, self.to.1, 17, 0, &udp);
        ethernet(self.to.0, self.from.0, IPV4, &packet)
    }
}

/// What is no datagram of a tunnel, or says that it is of one.
pub(super) fn datagrams(way: &Way) -> Vec<Vec<u8>> {
    let mut random = Random(5);
    let mut all: Vec<Vec<u8>> = [0, 1, 3, 4, 15, 16, 31, 32, 100, 1400]
        .into_iter()
        .map(|len| random.bytes(len))
        .collect();
    for (kind, len) in [
        (1, 160),
        (2, 100),
        (3, 56),
        (4, 32),
        (4, 48),
        (4, 1400),
        (9, 64),
    ] {
        for len in [len, len - 1, len + 1, 5] {
            for number in [0, 1, 2, u32::MAX, random.below(1 << 31) as u32] {
                let mut payload = vec![kind, 1, 0, 0];
                payload.extend(number.to_be_bytes());
                payload.extend(random.bytes(len.max(9) - 8));
                payload.truncate(len);
                all.push(payload);
            }
        }
    }
    all.iter().map(|payload| way.datagram(payload)).collect()
}

/// Frames in VXLAN, of a network.
pub(super) fn vxlan(way: &Way, vni: u32, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let wrap = |frame: &Vec<u8>| {
        let header = [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes()].concat();
        way.datagram(&[&header[..], frame].concat())
    };
    let fits = |frame: &&Vec<u8>| frame.len() <= 1450;
    let mut all: Vec<_> = frames.iter().filter(fits).map(wrap).collect();
    // Its own header is wrong, or cut off.
    for len in 0..8 {
        all.push(way.datagram(&[8, 0, 0, 0, 0, 0, 42, 0][..len]));
    }
    for first in [0, 0x0f, 0xff] {
        all.push(way.datagram(&[&[first, 0, 0, 0, 0, 0, 42, 255][..], &frames[0]].concat()));
    }
    all
}
