//! Frames that are changed are right afterwards.

use super::*;
use crate::frame::{Checksum, key::ethertype};

/// What an ICMP, UDP or TCP packet's checksum is over.
fn transport_sum(bytes: &[u8], at: usize, v6: bool) -> u16 {
    let (addresses, start, proto) = if v6 {
        (&bytes[at + 8..at + 40], at + 40, bytes[at + 6])
    } else {
        (&bytes[at + 12..at + 20], at + 20, bytes[at + 9])
    };
    let mut all = bytes[start..].to_vec();
    let len = all.len();
    all.resize(len.next_multiple_of(2), 0);
    if proto != 1 {
        all.extend(addresses);
        all.extend([0, proto, 0, len as u8]);
    }
    ones(&all)
}

fn sent(actions: &str, bytes: &[u8]) -> Vec<u8> {
    let control = control(&[actions]);
    let mut seen = run(&mut pipeline(&control), bytes, Offload::default());
    assert_eq!(seen.dropped, [], "{actions}");
    seen.sent.pop().expect("sent").1
}

#[test]
fn checksums_are_right_after_each_change() {
    let udp = [&[0, 53, 0, 54, 0, 11, 0, 0][..], b"abc"].concat();
    let icmp = [8, 0, 0, 0, 0, 7, 0, 1];
    let solicit = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &[9; 16]].concat();
    for (v6, proto, transport, checksum, matched, actions) in [
        (
            false,
            6,
            tcp(2),
            16,
            "tcp",
            "mod_nw_src:192.168.7.1,mod_tp_dst:8080",
        ),
        (
            false,
            6,
            tcp(2),
            16,
            "tcp",
            "mod_nw_tos:184,dec_ttl,mod_nw_ecn:3",
        ),
        (
            false,
            17,
            udp.clone(),
            6,
            "udp",
            "mod_nw_dst:1.2.3.4,mod_tp_src:1",
        ),
        (
            false,
            17,
            udp.clone(),
            6,
            "udp",
            "set_field:0.0.9.0/0.0.255.0->ip_dst",
        ),
        (
            false,
            1,
            icmp.to_vec(),
            2,
            "icmp",
            "set_field:0->icmp_type,mod_nw_dst:9.9.9.9",
        ),
        (
            true,
            6,
            tcp(2),
            16,
            "tcp6",
            "set_field:fd00::99->ipv6_src,mod_tp_src:7",
        ),
        (
            true,
            17,
            udp,
            6,
            "udp6",
            "set_field:fd00::98->ipv6_dst,dec_ttl,mod_nw_tos:32",
        ),
        (
            true,
            58,
            solicit,
            2,
            "icmp6,icmp_type=135",
            "set_field:fd00::5->nd_target",
        ),
    ] {
        let kind = if v6 { ethertype::IPV6 } else { ethertype::IPV4 };
        let bytes = ethernet(kind, &ip(v6, proto, &transport, checksum));
        let after = sent(&format!("{matched},actions={actions},output:2"), &bytes);
        assert_ne!(after, bytes, "{actions}");
        assert_eq!(transport_sum(&after, 14, v6), 0xffff, "{actions}");
        if !v6 {
            assert_eq!(ones(&after[14..34]), 0xffff, "{actions}");
        }
    }
}

#[test]
fn fields_have_their_new_values() {
    let bytes = ethernet(ethertype::IPV4, &ip(false, 6, &tcp(16), 16));
    let text = "tcp,actions=mod_dl_dst:02:00:00:00:00:99,mod_nw_dst:1.2.3.4,mod_tp_src:77,\
                mod_nw_tos:0x28,mod_nw_ttl:9,mod_vlan_vid:5,mod_vlan_pcp:3,output:2";
    let after = sent(text, &bytes);
    let (key, _) = parse(&after, after.len(), PortId(1), Vni::default()).expect("sound");
    assert_eq!(key.dst, Mac([2, 0, 0, 0, 0, 0x99]));
    assert_eq!(key.ip.map(|(_, dst)| dst), Some([1, 2, 3, 4].into()));
    assert_eq!((key.ports, key.tos, key.ttl), (Some((77, 80)), 0x28, 9));
    assert_eq!(
        key.tags[0].map(|tag| (tag.vid(), tag.priority())),
        Some((5, 3))
    );
    let back = sent("actions=pop_vlan,output:2", &after);
    assert_eq!((back.len(), &back[12..14]), (bytes.len(), &[8, 0][..]));
    let two = sent("actions=push_vlan:0x88a8,mod_vlan_vid:9,output:2", &after);
    let (key, _) = parse(&two, two.len(), PortId(1), Vni::default()).expect("sound");
    let tags = key
        .tags
        .map(|tag| tag.map(|tag| (tag.tpid, tag.vid(), tag.priority())));
    assert_eq!(tags, [Some((0x88a8, 9, 3)), Some((0x8100, 5, 3))]);
}

#[test]
fn a_checksum_that_is_left_to_do_keeps_its_pseudo_header() {
    for v6 in [false, true] {
        let mut packet = ip(v6, 6, &tcp(2), 0);
        let (kind, header, matched, change) = if v6 {
            (ethertype::IPV6, 40, "tcp6", "set_field:fd00::7->ipv6_dst")
        } else {
            (ethertype::IPV4, 20, "tcp", "mod_nw_dst:99.1.2.3")
        };
        let pseudo = |packet: &[u8]| {
            let addresses = if v6 { 8..40 } else { 12..20 };
            let len = packet.len() - header;
            ones(&[&packet[addresses], &[0, 6, 0, len as u8]].concat())
        };
        let at = header + 16;
        let sum = pseudo(&packet);
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let offload = Offload {
            checksum: Some(Checksum {
                start: (14 + header) as u16,
                offset: 16,
            }),
            ..Offload::default()
        };
        let flow = format!("{matched},actions=mod_vlan_vid:7,{change},mod_tp_src:1,output:2");
        let control = control(&[&flow]);
        let seen = run(&mut pipeline(&control), &ethernet(kind, &packet), offload);
        let after = &seen.sent[0].1;
        let sum = [after[18 + at], after[19 + at]];
        assert_eq!(u16::from_be_bytes(sum), pseudo(&after[18..]), "{flow}");
    }
}

#[test]
fn a_datagram_without_checksum_stays_without() {
    let udp = [0, 53, 0, 54, 0, 8, 0, 0];
    let bytes = ethernet(ethertype::IPV4, &ip(false, 17, &udp, 0));
    let after = sent(
        "udp,actions=mod_nw_src:3.3.3.3,mod_tp_src:9,output:2",
        &bytes,
    );
    assert_eq!(after[40..42], [0, 0]);
    assert_eq!(after[34..36], [0, 9]);
}

#[test]
fn what_has_no_time_or_no_room_left_is_dropped() {
    let mut packet = ip(false, 6, &tcp(2), 16);
    packet[8] = 1;
    let bytes = ethernet(ethertype::IPV4, &packet);
    let control_of = |text: &str| control(&[text]);
    let seen = run(
        &mut pipeline(&control_of("ip,actions=dec_ttl,output:2")),
        &bytes,
        Offload::default(),
    );
    assert_eq!(
        (seen.sent.len(), &seen.dropped[..]),
        (0, &[Reason::Ttl][..])
    );
    let many = ["push_vlan:0x8100"; 9].join(",");
    let seen = run(
        &mut pipeline(&control_of(&format!("actions={many},output:2"))),
        &bytes,
        Offload::default(),
    );
    assert_eq!(seen.dropped, [Reason::Rewrite]);
}

proptest! {
    /// Whatever the frame is, and whatever is done with it.
    #[test]
    fn no_frame_makes_rewriting_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..260),
        kind in prop_oneof![Just(0x0800_u16), Just(0x86dd), Just(0x8100), Just(0x0806)],
        start: u16, offset: u16, proto in 0_usize..5, change in 0_usize..5,
    ) {
        if let Some(first) = bytes.first_mut() {
            *first = if kind == 0x86dd { 0x60 } else { 0x45 };
        }
        let bytes = ethernet(kind, &bytes);
        let offload = Offload { checksum: Some(Checksum { start, offset }), ..Offload::default() };
        let matched = ["ip", "ipv6", "tcp", "udp6", "arp"][proto];
        let changes: &[&str] = match proto {
            0 => &["mod_nw_dst:1.1.1.1", "dec_ttl", "mod_nw_tos:4"],
            1 => &["set_field:::1->ipv6_dst", "dec_ttl", "mod_nw_tos:4"],
            2 => &["mod_tp_dst:5", "mod_nw_src:1.1.1.1"],
            3 => &["mod_tp_dst:5", "set_field:::1->ipv6_src"],
            _ => &["set_field:2->arp_op", "set_field:02:00:00:00:00:01->arp_tha"],
        };
        let change = changes[change % changes.len()];
        let text = format!("{matched},actions=pop_vlan,push_vlan:0x8100,{change},output:2");
        let control = control(&[&text]);
        let head = Head::of(&bytes);
        let sound = parse(head.bytes(), head.bytes().len(), PortId(1), Vni::default()).is_ok();
        if sound {
            run(&mut pipeline(&control), head.bytes(), offload);
        }
    }
}
