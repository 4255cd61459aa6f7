//! The switch with sockets in place of nodes.

use std::io::{ErrorKind, Read};
use std::time::Instant;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const BROADCAST: u8 = 0xff;

struct Card {
    stream: UnixStream,
    mac: u8,
}

impl Card {
    fn new(network: &Network, folder: &Path, name: &str, mac: u8) -> Self {
        let path = folder.join(name);
        network.plug_in(name, &path).unwrap();
        Self::connect(&path, mac)
    }

    /// A service of the node `name`.
    fn service(network: &Network, folder: &Path, name: &str, mac: u8) -> Self {
        let path = folder.join(format!("{name}-service"));
        network.plug_in_service(name, &path).unwrap();
        Self::connect(&path, mac)
    }

    fn connect(path: &Path, mac: u8) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, mac }
    }

    fn send(&mut self, to: u8, content: &[u8]) {
        self.send_kind(to, [0x88, 0xb5], content);
    }

    fn send_ip(&mut self, to: u8, content: &[u8]) {
        self.send_kind(to, [0x08, 0x00], content);
    }

    fn send_kind(&mut self, to: u8, kind: [u8; 2], content: &[u8]) {
        let mut frame = vec![to; 6];
        frame.extend([self.mac & 0xfe; 6]);
        frame.extend(kind);
        frame.extend(content);
        let mut wire = (frame.len() as u32).to_be_bytes().to_vec();
        wire.extend(frame);
        self.stream.write_all(&wire).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        self.stream.read_exact(&mut frame).unwrap();
        frame.split_off(14)
    }

    fn is_silent(&mut self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let error = self.stream.read(&mut [0]).map_err(|error| error.kind());
        self.stream.set_nonblocking(false).unwrap();
        error == Err(ErrorKind::WouldBlock)
    }
}

fn three() -> (Network, Card, Card, Card, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let network = Network::new(1).unwrap();
    let mut cards = ["a", "b", "c"]
        .iter()
        .zip([2, 4, 6])
        .map(|(name, mac)| Card::new(&network, folder.path(), name, mac));
    let (a, b, c) = (
        cards.next().unwrap(),
        cards.next().unwrap(),
        cards.next().unwrap(),
    );
    drop(cards);
    let (mut a, mut b, mut c) = (a, b, c);
    // A first frame may be lost while the others' sockets are still being accepted.
    for card in [&mut a, &mut b, &mut c] {
        card.stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
    }
    loop {
        a.send(BROADCAST, b"hello");
        let mut buffer = [0; 4096];
        if b.stream.read(&mut buffer).is_ok() && c.stream.read(&mut buffer).is_ok() {
            break;
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    for card in [&mut a, &mut b, &mut c] {
        let mut buffer = [0; 65536];
        while card.stream.read(&mut buffer).is_ok() {}
        card.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    (network, a, b, c, folder)
}

#[test]
fn a_broadcast_reaches_all_and_an_answer_only_its_target() {
    let (_network, mut a, mut b, mut c, _folder) = three();
    a.send(BROADCAST, b"who");
    assert_eq!(b.receive(), b"who");
    assert_eq!(c.receive(), b"who");
    b.send(2, b"me");
    assert_eq!(a.receive(), b"me");
    assert!(c.is_silent());
}

#[test]
fn each_node_sees_its_own_service_although_all_have_the_same_address() {
    const SERVICE: u8 = 8;
    let (network, mut a, mut b, mut c, folder) = three();
    let mut of_a = Card::service(&network, folder.path(), "a", SERVICE);
    let mut of_b = Card::service(&network, folder.path(), "b", SERVICE);
    for (node, service) in [(&mut a, &mut of_a), (&mut b, &mut of_b)] {
        // Until the switch has accepted the service's connection.
        service
            .stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        while service.stream.read(&mut [0; 4096]).is_err() {
            node.send(BROADCAST, b"who");
        }
        service.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    for card in [&mut a, &mut b, &mut c, &mut of_a, &mut of_b] {
        card.stream.set_nonblocking(true).unwrap();
        while card.stream.read(&mut [0; 65536]).is_ok() {}
        card.stream.set_nonblocking(false).unwrap();
    }
    of_a.send(a.mac, b"of a");
    assert_eq!(a.receive(), b"of a");
    of_b.send(BROADCAST, b"of b");
    assert_eq!(b.receive(), b"of b");
    a.send(SERVICE, b"from a");
    assert_eq!(of_a.receive(), b"from a");
    b.send(SERVICE, b"from b");
    assert_eq!(of_b.receive(), b"from b");
    for card in [&mut a, &mut b, &mut c, &mut of_a, &mut of_b] {
        assert!(card.is_silent());
    }
}

#[test]
fn latency_holds_frames_back_until_it_is_taken_away() {
    let (network, mut a, mut b, mut c, _folder) = three();
    network.set_latency("a", "b", Duration::from_millis(300));
    let start = Instant::now();
    a.send(BROADCAST, b"far");
    assert_eq!(c.receive(), b"far");
    assert!(b.is_silent());
    assert_eq!(b.receive(), b"far");
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn a_partition_cuts_two_nodes_and_no_others_until_it_is_healed() {
    let (network, mut a, mut b, mut c, _folder) = three();
    network.partition("a", "b");
    let before = network.counters("a", "b");
    for _ in 0..10 {
        a.send(BROADCAST, b"cut");
        assert_eq!(c.receive(), b"cut");
    }
    assert!(b.is_silent());
    network.heal("b", "a");
    a.send(BROADCAST, b"healed");
    assert_eq!(b.receive(), b"healed");
    assert_eq!(c.receive(), b"healed");
    let after = network.counters("a", "b");
    assert_eq!(after.dropped - before.dropped, 10);
}

#[test]
fn loss_takes_the_given_part_of_many_frames() {
    let (network, mut a, b, mut c, _folder) = three();
    network.set_link(
        "a",
        "c",
        Link {
            loss: 0.5,
            ..Link::default()
        },
    );
    drop(b);
    let before = network.counters("a", "c");
    let of_these = |network: &Network| {
        let now = network.counters("a", "c");
        (now.passed - before.passed, now.dropped - before.dropped)
    };
    for n in 0..1000u32 {
        a.send(BROADCAST, &n.to_le_bytes());
    }
    let start = Instant::now();
    while of_these(&network).0 + of_these(&network).1 < 1000 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
    let (passed, dropped) = of_these(&network);
    assert!((400..600).contains(&dropped), "{dropped} of 1000 were lost");
    for _ in 0..passed {
        c.receive();
    }
    assert!(c.is_silent());
}

#[test]
fn garbage_from_one_node_does_not_disturb_the_others() {
    let (_network, mut a, mut b, mut c, _folder) = three();
    c.stream.write_all(&[0xff; 100]).unwrap();
    a.send(4, b"short");
    b.send(2, b"x");
    assert_eq!(a.receive(), b"x");
}

#[test]
fn a_gateway_hides_a_nodes_address_from_others() {
    let (network, mut a, mut b, mut c, _folder) = three();
    let (inside, outside) = ([10, 1, 0, 2], [10, 1, 0, 99]);
    network.translate("a", inside.into(), outside.into());
    // What a UDP datagram's IP header begins with, without checksums that anybody looks at.
    let packet = |from: [u8; 4], to: [u8; 4]| {
        let mut packet = [0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0].to_vec();
        packet.extend(from.into_iter().chain(to));
        packet.extend([0; 8]);
        packet
    };
    let addresses = |packet: Vec<u8>| packet[12..20].to_vec();
    a.send_ip(BROADCAST, &packet(inside, [10, 1, 0, 1]));
    for card in [&mut b, &mut c] {
        assert_eq!(addresses(card.receive()), [10, 1, 0, 99, 10, 1, 0, 1]);
    }
    b.send_ip(2, &packet([10, 1, 0, 1], inside));
    b.send_ip(2, &packet([10, 1, 0, 1], outside));
    assert_eq!(addresses(a.receive()), [10, 1, 0, 1, 10, 1, 0, 2]);
    assert!(a.is_silent());
    network.translate_no_more("a");
    b.send_ip(2, &packet([10, 1, 0, 1], inside));
    assert_eq!(addresses(a.receive()), [10, 1, 0, 1, 10, 1, 0, 2]);
}
