use super::*;
use crate::net::checksum;
use blanket_memory::IoVec;
use proptest::prelude::*;

/// An Ethernet header of `ether_type`, with VLAN tags before it.
fn ethernet(tags: usize, ether_type: u16) -> Vec<u8> {
    let mut packet = vec![2; 12];
    for _ in 0..tags {
        packet.extend([0x81, 0x00, 0, 5]);
    }
    packet.extend(ether_type.to_be_bytes());
    packet
}

/// An IPv4 packet with `options` words of options.
fn v4(protocol: u8, options: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let len = 20 + 4 * usize::from(options) + payload.len();
    let mut packet = vec![0x45 + options, 0];
    packet.extend((len as u16).to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.resize(packet.len() + 4 * usize::from(options), 1);
    packet.extend(payload);
    packet
}

/// An IPv6 packet with `next` as its first header.
fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend([0xfd; 16]);
    packet.extend([0xfe; 16]);
    packet.extend(payload);
    packet
}

/// A TCP header without options.
fn tcp() -> Vec<u8> {
    let mut header = vec![0; 20];
    header[12] = 5 << 4;
    header
}

fn find(parts: &[Vec<u8>; 2]) -> Option<Transport> {
    Transport::find(&parts.concat())
}

#[test]
fn a_header_is_found_behind_tags_options_and_extensions() {
    let found = find(&[ethernet(0, 0x0800), v4(6, 0, 0, &tcp())]).unwrap();
    assert_eq!((found.ip, found.tcp, found.tagged), (Ip::V4, true, false));
    assert_eq!((found.start, found.payload), (34, 54));
    assert_eq!(found.checksum_offset(), 16);

    // "Do not fragment" is no fragment.
    let found = find(&[ethernet(2, 0x0800), v4(17, 3, 0x4000, &[0; 8])]).unwrap();
    assert_eq!((found.tcp, found.tagged, found.start), (false, true, 54));
    assert_eq!((found.payload, found.checksum_offset()), (62, 6));

    // Hop-by-hop (16 bytes), authentication (24), a fragment that is whole.
    let mut payload = vec![51, 1];
    payload.resize(16, 0);
    payload.extend([44, 4]);
    payload.resize(40, 0);
    payload.extend([6, 0, 0, 0, 0, 0, 0, 9]);
    payload.extend(tcp());
    let found = find(&[ethernet(0, 0x86dd), v6(0, &payload)]).unwrap();
    assert_eq!((found.ip, found.tcp), (Ip::V6, true));
    assert_eq!(found.start, 14 + 40 + 48);
}

#[test]
fn packets_without_a_whole_checksum_have_no_header_to_find() {
    for fragment in [0x2000, 1] {
        assert_eq!(
            find(&[ethernet(0, 0x0800), v4(6, 0, fragment, &tcp())]),
            None
        );
    }
    let fragment = [&[6, 0, 0, 1, 0, 0, 0, 9][..], &tcp()].concat();
    assert_eq!(find(&[ethernet(0, 0x86dd), v6(44, &fragment)]), None);
    // ICMP, ARP, TCP with a header that is too short for TCP.
    assert_eq!(find(&[ethernet(0, 0x0800), v4(1, 0, 0, &[0; 8])]), None);
    assert_eq!(find(&[ethernet(0, 0x0806), vec![0; 28]]), None);
    assert_eq!(find(&[ethernet(0, 0x0800), v4(6, 0, 0, &[0; 20])]), None);
    // Three tags, headers that are cut off, extensions without end.
    assert_eq!(find(&[ethernet(3, 0x0800), v4(6, 0, 0, &tcp())]), None);
    assert_eq!(
        find(&[ethernet(0, 0x0800), v4(6, 0, 0, &tcp()[..19])]),
        None
    );
    let endless = find(&[ethernet(0, 0x86dd), v6(0, &[0; 160])]);
    assert_eq!(endless, None);
}

/// What the receiver computes over a correct segment and its pseudo header: 0.
fn verify(packet: &[u8], transport: &Transport) -> u16 {
    let mut sum = Sum::default();
    let addresses = match transport.ip {
        Ip::V4 => 26..34,
        Ip::V6 => 22..54,
    };
    sum.add(&packet[addresses]);
    sum.add(&[0, if transport.tcp { 6 } else { 17 }]);
    sum.add(&((packet.len() - transport.start) as u16).to_be_bytes());
    sum.add(&packet[transport.start..]);
    !sum.folded()
}

/// Cuts `packet` into pieces of `sizes`, over and over.
fn pieces(packet: &mut [u8], sizes: &[usize]) -> Vec<IoVec> {
    let mut pieces = Vec::new();
    let mut rest = packet;
    for size in sizes.iter().copied().cycle() {
        let (piece, others) = rest.split_at_mut(size.min(rest.len()));
        pieces.push(IoVec::new(piece.as_mut_ptr(), piece.len()));
        rest = others;
        if rest.is_empty() {
            break;
        }
    }
    pieces
}

#[test]
fn a_checksum_is_that_of_the_worked_example() {
    // RFC 1071, 3: 0001 f203 f4f5 f6f7 sums to ddf2.
    let mut sum = Sum::default();
    sum.add(&[0x00, 0x01, 0xf2]);
    sum.add(&[0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
    assert_eq!(sum.folded(), 0xddf2);
}

#[test]
fn a_place_outside_the_packet_is_refused() {
    let mut packet = vec![0; 60];
    let pieces = pieces(&mut packet, &[60]);
    assert!(!checksum::complete(&pieces, 50, 9));
    assert!(!checksum::complete(&pieces, 61, 0));
    assert!(checksum::complete(&pieces, 50, 8));
}

proptest! {
    #[test]
    fn a_completed_checksum_satisfies_the_receiver(
        tcp_payload in any::<bool>(),
        six in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..3000),
        sizes in proptest::collection::vec(1usize..1500, 1..5),
    ) {
        let mut segment = if tcp_payload { tcp() } else { vec![0; 8] };
        segment.extend(&payload);
        let protocol = if tcp_payload { 6 } else { 17 };
        let mut packet = if six {
            [ethernet(0, 0x86dd), v6(protocol, &segment)].concat()
        } else {
            [ethernet(0, 0x0800), v4(protocol, 0, 0, &segment)].concat()
        };
        let transport = Transport::find(&packet).unwrap();
        let len = packet.len();
        transport.sum_pseudo_header(&mut packet, len);
        let pieces = pieces(&mut packet, &sizes);
        prop_assert!(checksum::complete(&pieces, transport.start, transport.checksum_offset()));
        prop_assert_eq!(verify(&packet, &transport), 0);
    }

    #[test]
    fn any_bytes_give_a_header_within_them_or_none(
        mut head in proptest::collection::vec(any::<u8>(), 0..=HEAD),
        ether_type in prop_oneof![Just(0x0800u16), Just(0x86dd), Just(0x8100), any::<u16>()],
        protocol in prop_oneof![Just(6u8), Just(17), Just(0), Just(44), Just(51), any::<u8>()],
    ) {
        if head.len() > 24 {
            head[12..14].copy_from_slice(&ether_type.to_be_bytes());
            head[if ether_type == 0x0800 { 23 } else { 20 }] = protocol;
        }
        if let Some(transport) = Transport::find(&head) {
            prop_assert!(transport.start + transport.checksum_offset() + 2 <= head.len());
            prop_assert!(transport.payload <= head.len());
            let len = head.len();
            transport.sum_pseudo_header(&mut head, len);
        }
    }
}
