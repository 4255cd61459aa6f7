//! Against etherparse as the judge.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TransportSlice, VlanId};
use proptest::prelude::*;

use super::*;
use crate::frame::Segments;

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn header() -> TcpHeader {
    let mut header = TcpHeader::new(1000, 80, 0xffff_ff00, 500);
    (header.ack, header.psh, header.fin, header.cwr) = (true, true, true, true);
    header
}

fn large(kind: Kind, tagged: bool, payload: &[u8]) -> (Vec<u8>, Checksum) {
    let mut bytes = Vec::new();
    let ether = PacketBuilder::ethernet2(A, B);
    let v4 = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let (start, offset) = match kind {
        Kind::Tcp4 if tagged => {
            ether
                .single_vlan(VlanId::try_new(5).unwrap())
                .ipv4(v4.0, v4.1, 64)
                .tcp_header(header())
                .write(&mut bytes, payload)
                .unwrap();
            (38, 16)
        }
        Kind::Tcp4 => {
            let step = ether.ipv4(v4.0, v4.1, 64).tcp_header(header());
            step.write(&mut bytes, payload).unwrap();
            (34, 16)
        }
        Kind::Tcp6 => {
            let step = ether.ipv6([1; 16], [2; 16], 64).tcp_header(header());
            step.write(&mut bytes, payload).unwrap();
            (54, 16)
        }
        _ => {
            let step = ether.ipv4(v4.0, v4.1, 64).udp(5, 6);
            step.write(&mut bytes, payload).unwrap();
            (34, 6)
        }
    };
    (bytes, Checksum { start, offset })
}

/// Calls `with` with a frame of these bytes, the body in pieces.
fn framed<R>(
    bytes: &[u8],
    cuts: &[usize],
    offload: Offload,
    with: impl FnOnce(&mut Frame<'_>) -> R,
) -> R {
    let head = Head::of(bytes);
    let mut rest = bytes[head.bytes().len()..].to_vec();
    let mut left = &mut rest[..];
    let mut pieces = Vec::new();
    for cut in cuts {
        let (one, two) = left.split_at_mut((*cut).min(left.len()));
        pieces.push(VolatileSlice::from(one));
        left = two;
    }
    pieces.push(VolatileSlice::from(left));
    with(&mut Frame {
        head,
        body: &pieces,
        offload,
    })
}

/// Checks all checksums and lengths; the payload and the TCP header.
fn judged(bytes: &[u8]) -> (Vec<u8>, Option<TcpHeader>) {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let net = packet.net.as_ref().unwrap();
    let v4 = net.ipv4_ref().map(|ip| ip.header().to_header());
    if let Some(ip) = &v4 {
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    }
    let v6 = net.ipv6_ref().map(|ip| ip.header().to_header());
    match packet.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => {
            let header = tcp.to_header();
            let payload = tcp.payload();
            let right = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, payload).unwrap(),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, payload).unwrap(),
                _ => panic!("no IP"),
            };
            assert_eq!(header.checksum, right);
            (payload.to_vec(), Some(header))
        }
        TransportSlice::Udp(udp) => {
            let right = udp
                .to_header()
                .calc_checksum_ipv4(&v4.unwrap(), udp.payload())
                .unwrap();
            assert_eq!(udp.checksum(), right);
            assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
            (udp.payload().to_vec(), None)
        }
        _ => panic!("no transport"),
    }
}

fn segmented(kind: Kind, size: u16, checksum: Checksum) -> Offload {
    Offload {
        checksum: Some(checksum),
        valid: false,
        segments: Some(Segments {
            kind,
            ecn: false,
            header: 0,
            size,
        }),
    }
}

proptest! {
    #[test]
    fn segments_are_right_and_together_what_was_cut(
        payload in prop::collection::vec(any::<u8>(), 1..4000),
        size in 8_u16..1500,
        cuts in prop::collection::vec(0_usize..1500, 0..5),
        kind in prop_oneof![Just(Kind::Tcp4), Just(Kind::Tcp6), Just(Kind::Udp)],
        tagged: bool,
        finish: bool,
    ) {
        let (bytes, checksum) = large(kind, tagged, &payload);
        let offload = segmented(kind, size, checksum);
        let mut smalls = Vec::new();
        framed(&bytes, &cuts, offload, |frame| {
            let mut segments = Segmenter::new(frame, 2000, finish).unwrap();
            while let Some(mut small) = segments.next() {
                assert_eq!(small.offload.checksum.is_none(), finish);
                finish_checksum(&mut small).unwrap();
                smalls.push(small.to_vec());
            }
        });
        prop_assert_eq!(smalls.len(), payload.len().div_ceil(size.into()));
        let mut all = Vec::new();
        for (i, small) in smalls.iter().enumerate() {
            let (part, tcp) = judged(small);
            let last = i + 1 == smalls.len();
            prop_assert!(part.len() == usize::from(size) || last);
            if let Some(tcp) = tcp {
                prop_assert_eq!(tcp.sequence_number, 0xffff_ff00_u32.wrapping_add(all.len() as u32));
                prop_assert_eq!((tcp.fin, tcp.psh, tcp.cwr), (last, last, i == 0));
                prop_assert!(tcp.ack);
            }
            all.extend(part);
        }
        prop_assert_eq!(all, payload);
    }

    #[test]
    fn a_checksum_left_to_do_is_done(
        payload in prop::collection::vec(any::<u8>(), 0..3000),
        cuts in prop::collection::vec(0_usize..700, 0..5),
        kind in prop_oneof![Just(Kind::Tcp4), Just(Kind::Tcp6), Just(Kind::Udp)],
    ) {
        let (bytes, checksum) = large(kind, false, &payload);
        // The pseudo header's sum is what is left without the rest.
        let (start, place) = (usize::from(checksum.start), usize::from(checksum.start + checksum.offset));
        let mut rest = bytes.clone();
        rest[place..place + 2].fill(0);
        let mut whole = Sum::default();
        whole.add(&rest[start..]);
        let [have, right] = [whole.folded(), [bytes[place], bytes[place + 1]]]
            .map(|word| u32::from(u16::from_be_bytes(word)));
        // right = !(pseudo + have)
        let pseudo = (!right & 0xffff) + (!have & 0xffff);
        let pseudo = (pseudo & 0xffff) + (pseudo >> 16);
        rest[place..place + 2].copy_from_slice(&(pseudo as u16).to_be_bytes());
        let offload = Offload { checksum: Some(checksum), ..Offload::default() };
        let done = framed(&rest, &cuts, offload, |frame| {
            finish_checksum(frame).unwrap();
            assert!(frame.offload.valid && frame.offload.checksum.is_none());
            frame.to_vec()
        });
        judged(&done);
    }

    #[test]
    fn no_bytes_make_it_fail_otherwise(
        mut bytes in prop::collection::vec(any::<u8>(), 0..400),
        start: u16, offset: u16, size: u16,
        kind in prop_oneof![Just(Kind::Tcp4), Just(Kind::Tcp6), Just(Kind::Udp), Just(Kind::Fragments)],
        like: bool,
    ) {
        if like && bytes.len() > 40 {
            bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
            bytes[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]);
        }
        let offload = segmented(kind, size, Checksum { start: start % 500, offset: offset % 500 });
        framed(&bytes, &[7], offload, |frame| {
            if let Ok(mut segments) = Segmenter::new(frame, 1518, true) {
                while let Some(small) = segments.next() {
                    assert!(small.len() <= 1518);
                }
            }
            let _ = finish_checksum(frame);
        });
    }
}

#[test]
fn a_tag_that_was_pushed_in_stays() {
    let payload: Vec<u8> = (0..1000_u32).map(|i| i as u8).collect();
    let (bytes, mut checksum) = large(Kind::Tcp4, false, &payload);
    checksum.start += 4;
    let offload = segmented(Kind::Tcp4, 100, checksum);
    let mut all = Vec::new();
    framed(&bytes, &[], offload, |frame| {
        assert!(frame.head.insert(12, [0x81, 0, 0, 5]));
        let mut segments = Segmenter::new(frame, 1514, true).unwrap();
        while let Some(small) = segments.next() {
            let small = small.to_vec();
            assert_eq!(small[12..16], [0x81, 0, 0, 5]);
            all.extend(judged(&small).0);
        }
    });
    assert_eq!(all, payload);
}

#[test]
fn what_is_not_what_its_offload_says_is_refused() {
    let (bytes, checksum) = large(Kind::Tcp4, false, &[1; 3000]);
    let refused = |offload: Offload, most: usize| {
        framed(&bytes, &[], offload, |frame| {
            Segmenter::new(frame, most, true).err()
        })
    };
    let with = |kind, size| segmented(kind, size, checksum);
    assert_eq!(refused(with(Kind::Tcp4, 1000), 1514), None);
    assert_eq!(refused(with(Kind::Tcp6, 1000), 1514), Some(Reason::Offload));
    assert_eq!(refused(with(Kind::Udp, 1000), 1514), Some(Reason::Offload));
    assert_eq!(
        refused(with(Kind::Fragments, 1000), 1514),
        Some(Reason::Offload)
    );
    assert_eq!(refused(with(Kind::Tcp4, 1500), 1514), Some(Reason::TooBig));
    assert_eq!(
        refused(with(Kind::Tcp4, 1), 1514),
        Some(Reason::Offload),
        "too many"
    );
    let far = Checksum {
        start: 2000,
        offset: 0,
    };
    let far = Offload {
        checksum: Some(far),
        ..Offload::default()
    };
    let result = framed(&bytes, &[], far, finish_checksum);
    assert_eq!(result, Err(Reason::Offload));
}
