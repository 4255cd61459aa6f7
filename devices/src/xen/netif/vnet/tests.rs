use super::*;

/// All that a frontend may take.
const ALL: Features = Features {
    sg: true,
    checksum: true,
    gso4: true,
    gso6: true,
};

/// A TCP packet over IPv4, with a VLAN tag if `tagged`, and `payload` bytes.
fn tcp(tagged: bool, payload: usize) -> Vec<u8> {
    let mut packet = vec![2; 12];
    if tagged {
        packet.extend([0x81, 0x00, 0, 5]);
    }
    packet.extend([8, 0, 0x45, 0]);
    packet.extend((40 + payload as u16).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([0; 12]);
    packet.push(5 << 4);
    packet.resize(packet.len() + 7 + payload, 0);
    packet
}

fn gso(kind: GsoKind) -> Option<Gso> {
    Some(Gso { kind, size: 1448 })
}

/// A header as a TAP writes it: flags, kind, size, start and offset.
fn header(flags: u32, kind: u32, size: u16, start: u16, offset: u16) -> [u8; HEADER_LEN] {
    Header {
        flags: flags as u8,
        gso_kind: kind as u8,
        gso_size: size,
        start,
        offset,
        ..Header::default()
    }
    .bytes()
}

fn received(header: &[u8; HEADER_LEN], packet: &mut [u8], features: Features) -> Option<Received> {
    let piece = IoVec::new(packet.as_mut_ptr(), packet.len());
    to_guest(header, &[piece], features)
}

#[test]
fn the_node_is_told_where_a_blank_checksum_is_and_how_to_segment() {
    let mut head = tcp(false, 100);
    assert_eq!(to_node(&mut head, 154, false, None), Some([0; HEADER_LEN]));
    assert_eq!(
        to_node(&mut head, 154, true, None).unwrap(),
        [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]
    );
    let [s0, s1] = 1448u16.to_le_bytes();
    assert_eq!(
        to_node(&mut head, 3000, true, gso(GsoKind::Tcp4)).unwrap(),
        [1, 1, 54, 0, s0, s1, 34, 0, 16, 0, 0, 0]
    );
    assert_eq!(head, tcp(false, 100));
}

#[test]
fn a_packet_to_be_segmented_gets_the_sum_that_its_frontend_forgot() {
    let mut head = tcp(false, 100);
    let header = to_node(&mut head, 154, false, gso(GsoKind::Tcp4)).unwrap();
    assert_eq!(header[0], 1);
    // 0a00 + 0001 + 0a00 + 0002, TCP, 120 bytes.
    assert_eq!(head[50..52], (0x1403u16 + 6 + 120).to_be_bytes());
}

#[test]
fn flags_that_do_not_fit_the_packet_are_refused() {
    let mut udp = tcp(false, 0);
    udp[23] = 17;
    assert_eq!(to_node(&mut udp, 54, true, gso(GsoKind::Tcp4)), None);
    let mut head = tcp(false, 0);
    assert_eq!(to_node(&mut head, 54, true, gso(GsoKind::Tcp6)), None);
    let mut arp = vec![0; 60];
    assert_eq!(to_node(&mut arp, 60, true, None), None);
    assert_eq!(to_node(&mut arp, 60, false, None), Some([0; HEADER_LEN]));
}

#[test]
fn the_guest_gets_flags_for_a_checksum_that_it_can_find() {
    let mut packet = tcp(false, 3000);
    let before = packet.clone();
    let blank = header(1, 0, 0, 34, 16);
    let got = received(&blank, &mut packet, ALL).unwrap();
    assert_eq!(
        (got.flags, got.gso),
        (RX_CSUM_BLANK | RX_DATA_VALIDATED, None)
    );
    let large = header(1, 1, 1448, 34, 16);
    let got = received(&large, &mut packet, ALL).unwrap();
    assert_eq!(got.gso, gso(GsoKind::Tcp4));
    let valid = received(&header(2, 0, 0, 0, 0), &mut packet, ALL).unwrap();
    assert_eq!(valid.flags, RX_DATA_VALIDATED);
    let plain = received(&[0; HEADER_LEN], &mut packet, ALL).unwrap();
    assert_eq!(plain.flags, 0);
    assert_eq!(packet, before);
}

#[test]
fn a_checksum_that_the_guest_would_not_find_is_completed() {
    let tagged = (tcp(true, 100), header(1, 0, 0, 38, 16), ALL);
    // The inner one of a tunnel: the headers in front lead elsewhere.
    let inner = (tcp(false, 100), header(1, 0, 0, 60, 6), ALL);
    let none = Features::default();
    let unable = (tcp(false, 100), header(1, 0, 0, 34, 16), none);
    for (mut packet, header, features) in [tagged, inner, unable] {
        let got = received(&header, &mut packet, features).unwrap();
        assert_eq!((got.flags, got.gso), (RX_DATA_VALIDATED, None));
        let at = usize::from(header[6] + header[8]);
        assert_ne!(packet[at..at + 2], [0, 0]);
    }
}

#[test]
fn packets_that_the_guest_cannot_take_are_refused() {
    let mut packet = tcp(false, 3000);
    let mut refused = |header, features| received(&header, &mut packet, features).is_none();
    // UDP to be segmented, TCP over IPv6 for a frontend that has only IPv4,
    // a segmented packet whose checksum is not blank or not to be found, a
    // checksum outside the packet.
    assert!(refused(header(1, 3, 1448, 34, 6), ALL));
    let four = Features { gso6: false, ..ALL };
    assert!(refused(header(1, 4, 1448, 54, 16), four));
    assert!(refused(header(0, 1, 1448, 34, 16), ALL));
    assert!(refused(header(1, 1, 1448, 35, 16), ALL));
    assert!(refused(header(1, 0, 0, 60_000, 16), ALL));
}

#[test]
fn the_tap_does_what_the_frontend_cannot() {
    assert_eq!(Features::default().offloads(), Offloads::default());
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    assert_eq!(ALL.offloads(), Offloads(all));
    let four = Features { gso6: false, ..ALL };
    assert_eq!(
        four.offloads(),
        Offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4)
    );
}
