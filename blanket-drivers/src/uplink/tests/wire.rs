//! Parsers: what is built is read back, and nothing makes them panic.

use crate::mac::MacAddress;
use crate::uplink::TxPacket;
use crate::uplink::wire::*;
use proptest::prelude::*;
use std::net::SocketAddr;

fn end(octet: u8, v6: bool, port: u16) -> End {
    let address: SocketAddr = if v6 {
        ([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(octet)], port).into()
    } else {
        ([10, 0, 0, octet], port).into()
    };
    End {
        mac: MacAddress([2, 0, 0, 0, 0, octet]),
        address,
    }
}

fn frame(v6: bool, payload: &[u8], checksum: Checksum) -> Vec<u8> {
    let headers = Headers::new(end(1, v6, 7), end(2, v6, 9), payload, checksum).unwrap();
    [headers.as_bytes(), payload].concat()
}

proptest! {
    #[test]
    fn a_datagram_is_read_back_from_its_frame(
        v6: bool,
        ports: (u16, u16),
        payload in prop::collection::vec(any::<u8>(), 0..2000),
        padding in 0usize..20,
    ) {
        let (from, to) = (end(1, v6, ports.0), end(2, v6, ports.1));
        let headers = Headers::new(from, to, &payload, Checksum::Full).unwrap();
        // Short frames are padded on the wire.
        let frame = [headers.as_bytes(), &payload, &vec![0; padding]].concat();
        let datagram = parse(&frame, true).unwrap();
        prop_assert_eq!(datagram.from, from.address);
        prop_assert_eq!(datagram.to, to.address);
        prop_assert_eq!(datagram.payload, &payload[..]);
        prop_assert_eq!(&frame[..6], &to.mac.0);
    }

    #[test]
    fn no_bytes_make_a_parser_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        verify: bool,
    ) {
        let _ = parse(&bytes, verify);
        let _ = VirtioHeader::parse(&bytes);
        let _ = gro_segment(&bytes);
    }

    #[test]
    fn a_frame_with_a_changed_byte_is_refused_or_says_something_else(
        v6: bool,
        payload in prop::collection::vec(any::<u8>(), 1..100),
        at: prop::sample::Index,
        change in 1u8..,
    ) {
        let sound = frame(v6, &payload, Checksum::Full);
        let mut bytes = sound.clone();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        // Nothing covers the stations' addresses, and of IPv6 the class, the
        // label and the hop limit; a checksum of 0 is none in IPv4.
        let uncovered = at < 12 || (v6 && [14, 15, 16, 17, 21].contains(&at));
        let udp_checksum = if v6 { 60..62 } else { 40..42 };
        if !uncovered && !udp_checksum.contains(&at) {
            prop_assert!(parse(&bytes, true).is_err(), "byte {}", at);
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_is_refused(
        v6: bool,
        payload in prop::collection::vec(any::<u8>(), 0..100),
        at: prop::sample::Index,
    ) {
        let frame = frame(v6, &payload, Checksum::Full);
        prop_assert!(parse(&frame[..at.index(frame.len())], true).is_err());
    }

    #[test]
    fn a_trains_datagrams_are_its_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        segment in 0usize..4000,
    ) {
        let train = TxPacket::train(([10, 0, 0, 1], 1).into(), &bytes, segment);
        let parts: Vec<_> = train.iter().collect();
        prop_assert_eq!(parts.len(), train.datagrams());
        prop_assert_eq!(parts.concat(), &bytes[..]);
        if segment != 0 {
            prop_assert!(parts.iter().all(|part| part.len() <= segment));
        }
    }

    #[test]
    fn a_gro_size_is_found_behind_other_messages(size in 1u16.., others in 0usize..3) {
        let mut control = Vec::new();
        for other in 0..=others {
            let last = other == others;
            control.extend(20usize.to_ne_bytes());
            control.extend(if last { libc::SOL_UDP } else { libc::SOL_IP }.to_ne_bytes());
            control.extend(libc::UDP_GRO.to_ne_bytes());
            control.extend(i32::from(size).to_ne_bytes());
            control.extend([0; 4]);
        }
        prop_assert_eq!(gro_segment(&control), Some(size.into()));
        // The kernel does not count the padding of the last one.
        prop_assert_eq!(gro_segment(&control[..control.len() - 4]), Some(size.into()));
        prop_assert_eq!(gro_segment(&control[..control.len() - 5]), None);
    }
}

#[test]
fn a_checksum_that_the_sender_left_to_its_interface_is_accepted() {
    for v6 in [false, true] {
        let partial = frame(v6, b"over a virtual link", Checksum::Partial);
        assert_eq!(
            parse(&partial, true).unwrap().payload,
            b"over a virtual link"
        );
    }
}

#[test]
fn the_checksum_is_that_of_the_rfcs() {
    // Computed by hand: 10.0.0.1:7 to 10.0.0.2:9, "ab".
    // 0a00+0001+0a00+0002+0011+000a + 0007+0009+000a+6162 = 0x759a
    let bytes = frame(false, b"ab", Checksum::Full);
    assert_eq!(bytes[40..42], (!0x759au16).to_be_bytes());
}

#[test]
fn a_datagram_without_a_checksum_is_accepted_in_ipv4_only() {
    for v6 in [false, true] {
        let mut bytes = frame(v6, b"plain", Checksum::Full);
        let at = if v6 { 60 } else { 40 };
        bytes[at..at + 2].fill(0);
        assert_eq!(parse(&bytes, true).is_ok(), !v6);
    }
}

#[test]
fn fragments_and_other_protocols_are_refused() {
    let sound = frame(false, b"x", Checksum::Full);
    for (at, value) in [(20, 0x20), (21, 1), (23, 6), (12, 0x81), (14, 0x65)] {
        let mut bytes = sound.clone();
        bytes[at] = value;
        // A right header checksum, so that it is not that.
        bytes[24..26].fill(0);
        let header: u32 = bytes[14..34]
            .chunks_exact(2)
            .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
            .sum();
        let folded = (header & 0xffff) + (header >> 16);
        bytes[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
        assert_eq!(
            parse(&bytes, false),
            Err(FrameError::Malformed),
            "byte {at}"
        );
    }
}

#[test]
fn a_virtio_header_is_read_back_and_others_than_udps_are_refused() {
    let headers = Headers::new(end(1, false, 7), end(2, false, 9), b"xy", Checksum::Partial);
    let headers = headers.unwrap();
    for segment in [0, 1400] {
        let bytes = VirtioHeader::build(&headers, segment);
        let read = VirtioHeader::parse(&bytes).unwrap();
        assert!(read.checksum_settled);
        assert_eq!(read.segment, segment);
    }
    // VIRTIO_NET_HDR_GSO_TCPV4
    assert_eq!(VirtioHeader::parse(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    assert_eq!(VirtioHeader::parse(&[0; 9]), None);
}

#[test]
fn ends_of_two_families_and_payloads_beyond_ip_have_no_headers() {
    let full = Checksum::Full;
    assert!(Headers::new(end(1, false, 7), end(2, true, 9), b"x", full).is_none());
    let long = vec![0; 65_536];
    assert!(Headers::new(end(1, false, 7), end(2, false, 9), &long, full).is_none());
}
