//! Frames, their headers and offloads.

use proptest::prelude::*;

use super::key::{ethertype, protocol};
use super::*;

const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

fn ethernet(kind: u16, rest: &[u8]) -> Vec<u8> {
    [&B.0[..], &A.0, &kind.to_be_bytes(), rest].concat()
}

fn tcp4(payload: usize) -> Vec<u8> {
    let total = (40 + payload) as u16;
    let mut ip = vec![0x45, 0x10];
    ip.extend(total.to_be_bytes());
    ip.extend([
        0,
        0,
        0x40,
        0,
        64,
        protocol::TCP,
        0,
        0,
        10,
        0,
        0,
        1,
        10,
        0,
        0,
        2,
    ]);
    ip.extend([
        0x30, 0x39, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0,
    ]);
    ip.resize(40 + payload, 7);
    ip
}

fn read(bytes: &[u8]) -> Result<(Key, Layers), Malformed> {
    let head = Head::of(bytes);
    parse(head.bytes(), bytes.len(), PortId(1), Vni::default())
}

#[test]
fn tcp_behind_two_tags_is_read() {
    let mut rest = vec![0x60, 5];
    rest.extend(ethertype::VLAN.to_be_bytes());
    rest.extend([0, 7]);
    rest.extend(ethertype::IPV4.to_be_bytes());
    rest.extend(tcp4(1000));
    let (key, layers) = read(&ethernet(ethertype::SERVICE_VLAN, &rest)).expect("sound");
    let vids = key.tags.map(|tag| tag.map(Tag::vid));
    assert_eq!(
        (vids, key.tags[0].map(Tag::priority)),
        ([Some(5), Some(7)], Some(3))
    );
    assert_eq!((key.src, key.dst, key.ethertype), (A, B, ethertype::IPV4));
    assert_eq!((key.protocol, key.tos, key.ttl), (protocol::TCP, 0x10, 64));
    assert_eq!((key.ports, key.tcp_flags), (Some((12345, 80)), 0x12));
    assert_eq!(
        (layers.network, layers.transport, layers.payload),
        (22, 42, 62)
    );
}

#[test]
fn what_is_cut_off_or_contradicts_itself_is_malformed() {
    let whole = ethernet(ethertype::IPV4, &tcp4(0));
    assert!(read(&whole).is_ok());
    for len in 0..whole.len() {
        assert!(read(&whole[..len]).is_err(), "{len} bytes of it");
    }
    let wrong = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        read(&bytes).expect_err("malformed")
    };
    assert_eq!(wrong(14, 0x44), Malformed::Ip, "a header of 16 bytes");
    assert_eq!(wrong(14, 0x65), Malformed::Ip, "version 6");
    assert_eq!(wrong(17, 41), Malformed::Ip, "longer than the frame");
    assert_eq!(wrong(17, 30), Malformed::Transport);
    assert_eq!(wrong(46, 0x40), Malformed::Transport, "TCP of 16 bytes");
    assert_eq!(wrong(6, 1), Malformed::Source, "from a group");
}

#[test]
fn arp_and_neighbours_are_read() {
    let mut rest = vec![0, 1, 8, 0, 6, 4, 0, 1];
    rest.extend(A.0);
    rest.extend([10, 0, 0, 1]);
    rest.extend([0; 6]);
    rest.extend([10, 0, 0, 2]);
    let (key, _) = read(&ethernet(ethertype::ARP, &rest)).expect("sound");
    let arp = key.arp.expect("ARP");
    assert_eq!(
        (arp.op, arp.sender.0, arp.target.1.octets()),
        (1, A, [10, 0, 0, 2])
    );

    let mut six = vec![0x60, 0, 0, 0, 0, 24, protocol::ICMPV6, 255];
    six.extend([0xfe; 32]);
    six.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    six.extend([9; 16]);
    let (key, layers) = read(&ethernet(ethertype::IPV6, &six)).expect("sound");
    assert_eq!(key.nd_target.map(|target| target.octets()), Some([9; 16]));
    assert_eq!((key.ports, layers.transport), (Some((135, 0)), 54));
}

#[test]
fn later_fragments_have_no_ports() {
    let mut bytes = ethernet(ethertype::IPV4, &tcp4(0));
    bytes[20] = 0x20;
    assert_eq!(
        read(&bytes).map(|(key, _)| (key.fragment, key.ports.is_some())),
        Ok((Some(false), true))
    );
    bytes[21] = 1;
    assert_eq!(
        read(&bytes).map(|(key, _)| (key.fragment, key.ports.is_some())),
        Ok((Some(true), false))
    );
}

#[test]
fn tags_are_put_in_and_taken_out() {
    let bytes = ethernet(ethertype::IPV4, &tcp4(400));
    let mut head = Head::of(&bytes);
    assert_eq!(head.bytes().len(), HEAD);
    assert!(head.insert(12, [0x81, 0, 0, 9]));
    assert_eq!(
        head.bytes()[..18],
        [&bytes[..12], &[0x81, 0, 0, 9], &bytes[12..14]].concat()
    );
    assert!(head.remove(12, 4));
    assert_eq!(head.bytes(), &bytes[..HEAD]);
    assert!(!head.remove(HEAD - 1, 2));
    for _ in 0..HEADROOM / 4 {
        assert!(head.insert(12, [0; 4]));
    }
    assert!(!head.insert(12, [0; 4]), "the headroom is used up");
}

#[test]
fn a_frame_is_its_head_and_its_pieces() {
    let mut bytes: Vec<u8> = (0..=255).collect();
    let whole = bytes.clone();
    let head = Head::of(&bytes);
    let (one, two) = bytes[HEAD..].split_at_mut(10);
    let pieces = [VolatileSlice::from(one), VolatileSlice::from(two)];
    let frame = Frame {
        head,
        body: &pieces,
        offload: Offload::default(),
    };
    assert_eq!((frame.len(), frame.to_vec()), (256, whole.clone()));
    for offset in [0, 100, HEAD, HEAD + 5, HEAD + 10, 250, 256] {
        let mut to = vec![0; 300];
        let len = frame.copy_from(offset, &mut to);
        assert_eq!(to[..len], whole[offset..], "from {offset}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_fail_otherwise(bytes in proptest::collection::vec(any::<u8>(), 0..300),
                                              kind in prop_oneof![Just(0x0800_u16), Just(0x86dd), Just(0x8100), Just(0x0806)]) {
        let _ = read(&bytes);
        if let Ok((_, layers)) = read(&ethernet(kind, &bytes)) {
            prop_assert!(layers.transport <= bytes.len() + 14);
            prop_assert!(layers.payload <= bytes.len() + 14);
        }
    }

    #[test]
    fn offloads_come_back_as_they_were(bytes: [u8; OFFLOAD_BYTES], len in 0_usize..70_000) {
        if let Ok(offload) = Offload::from_virtio(&bytes, len) {
            let again = Offload::from_virtio(&offload.to_virtio(), len).expect("sound");
            prop_assert_eq!(again.checksum, offload.checksum);
            prop_assert_eq!(again.segments, offload.segments);
        }
    }
}
