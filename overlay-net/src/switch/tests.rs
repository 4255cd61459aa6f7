//! The switch without its thread, with ports in memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod moving;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::{Error, Stream, Switch};
use crate::api::metrics;
use crate::api::observe::{CaptureSpec, MirrorSpec, PingSpec};
use crate::api::services::{Protocol, VipBackend, VipSpec};
use crate::api::types::{Attachment, NetworkSpec, PortSpec};
use crate::bridge::PortConfig;
use crate::capture::{Block, Direction, Reader};
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, HEAD, Head, Mac, Offload, PortId, Vni};
use crate::port::Port;

mod alike;
mod controllers;
mod groups;

/// What the other side of a port has sent, and got; it can break.
#[derive(Default)]
struct Wire {
    sent: VecDeque<Vec<u8>>,
    got: Vec<Vec<u8>>,
    flushes: usize,
    broken: bool,
    /// Nobody takes frames there.
    down: bool,
    /// So many frames are taken.
    room: Option<usize>,
}

type Ends = Arc<Mutex<Wire>>;

struct Memory {
    wire: Ends,
    waker: File,
    drops: Drops,
}

impl Port for Memory {
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(&mut Frame<'_>)) -> io::Result<usize> {
        for count in 0..most {
            let next = {
                let mut wire = self.wire.lock().unwrap();
                if wire.broken {
                    return Err(io::Error::other("the cable is cut"));
                }
                wire.sent.pop_front()
            };
            let Some(mut bytes) = next else {
                return Ok(count);
            };
            let head = Head::of(&bytes);
            let rest = VolatileSlice::from(bytes.get_mut(HEAD..).unwrap_or_default());
            each(&mut Frame {
                head,
                body: &[rest],
                offload: Offload::default(),
            });
        }
        Ok(most)
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        let mut wire = self.wire.lock().unwrap();
        if wire.down {
            return Err(Reason::Down);
        }
        if wire.room.is_some_and(|room| wire.got.len() >= room) {
            return Err(Reason::Full);
        }
        wire.got.push(frame.to_vec());
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wire.lock().unwrap().flushes += 1;
        Ok(())
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.wire.lock().unwrap().sent.is_empty())
    }

    fn is_up(&self) -> bool {
        !self.wire.lock().unwrap().down
    }

    fn waker(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }

    fn max_frame(&self) -> usize {
        1522
    }

    fn drops(&self) -> &Drops {
        &self.drops
    }
}

fn network(vni: u32) -> NetworkSpec {
    NetworkSpec {
        vni: Vni::new(vni).unwrap(),
        mtu: 1500,
    }
}

fn spec(network: &str) -> PortSpec {
    PortSpec {
        network: network.to_owned(),
        attachment: Attachment::Tap("none".to_owned()),
        bridge: PortConfig::default(),
        groups: Vec::new(),
        owner: None,
    }
}

/// A switch with the networks `blue` and `red`.
fn switch() -> Switch {
    let mut switch = Switch::new(Instant::now(), None);
    switch.add_network("blue", network(1)).unwrap();
    switch.add_network("red", network(2)).unwrap();
    switch
}

fn end() -> (Ends, Box<Memory>) {
    let wire = Ends::default();
    let port = Memory {
        wire: Arc::clone(&wire),
        waker: File::open("/dev/null").unwrap(),
        drops: Drops::default(),
    };
    (wire, Box::new(port))
}

fn plug(switch: &mut Switch, name: &str, network: &str) -> (PortId, Ends) {
    let (wire, port) = end();
    let status = switch.add_port(name, spec(network), Ok(port));
    (status.unwrap().id, wire)
}

fn frame(from: u8, to: Mac) -> Vec<u8> {
    let mut bytes = [&to.0[..], &[2, 0, 0, 0, 0, from], &[0x88, 0xb6]].concat();
    bytes.resize(60, from);
    bytes
}

/// Sends a frame from a port's other side, and gives the port its turn.
fn put(switch: &mut Switch, (id, wire): &(PortId, Ends), frame: Vec<u8>) {
    wire.lock().unwrap().sent.push_back(frame);
    assert_eq!(switch.service(Some(*id)), 1);
    switch.flush();
}

fn got(port: &(PortId, Ends)) -> Vec<Vec<u8>> {
    std::mem::take(&mut port.1.lock().unwrap().got)
}

#[test]
fn frames_go_to_all_then_to_who_has_the_address_and_never_elsewhere() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let c = plug(&mut switch, "c", "blue");
    let r = plug(&mut switch, "r", "red");
    let to_b = frame(1, Mac([2, 0, 0, 0, 0, 2]));
    put(&mut switch, &a, to_b.clone());
    assert_eq!((got(&b), got(&c)), (vec![to_b.clone()], vec![to_b.clone()]));
    put(&mut switch, &b, frame(2, Mac::BROADCAST));
    assert_eq!((got(&a).len(), got(&c).len()), (1, 1));
    put(&mut switch, &a, to_b.clone());
    assert_eq!((got(&b), got(&c)), (vec![to_b], vec![]));
    assert_eq!(
        (got(&a), got(&r)),
        (vec![], vec![]),
        "nothing comes back, or leaves its network"
    );
    assert_eq!(
        b.1.lock().unwrap().flushes,
        2,
        "once for each turn with something"
    );
    let macs = switch.macs("blue").unwrap();
    let ports: Vec<_> = macs.iter().map(|line| line.port.as_deref()).collect();
    assert_eq!(ports, [Some("a"), Some("b")]);
}

#[test]
fn a_port_that_breaks_is_down_and_the_others_go_on() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let c = plug(&mut switch, "c", "blue");
    b.1.lock().unwrap().broken = true;
    assert_eq!(switch.service(Some(b.0)), 0);
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!((got(&b).len(), got(&c).len()), (0, 1));
    let ports = switch.ports();
    assert_eq!(ports[1].down.as_deref(), Some("the cable is cut"));
    assert_eq!(ports[1].drops.of(Reason::Down), 1);
    assert!(switch.wakers().all(|(id, _)| id != b.0));
    // It is there until it is taken away, and then its name is free.
    assert!(matches!(
        switch.add_port("b", spec("blue"), Err(String::new())),
        Err(Error::Exists(_))
    ));
    switch.remove_port("b").unwrap();
    plug(&mut switch, "b", "blue");
}

#[test]
fn what_is_no_frame_is_dropped_and_counted() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    put(&mut switch, &a, vec![0xff; 9]);
    put(&mut switch, &a, vec![0xff; 60]);
    assert_eq!(got(&b), Vec::<Vec<u8>>::new());
    assert_eq!(switch.ports()[0].drops.of(Reason::Malformed), 2);
}

#[test]
fn flows_never_lead_out_of_a_network() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let r = plug(&mut switch, "r", "red");
    switch
        .add_flow("blue", "priority=9,actions=output:b")
        .unwrap();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!(got(&b).len(), 1);
    let other = format!("priority=10,actions=output:{}", r.0);
    switch.add_flow("blue", &other).unwrap();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!((got(&b).len(), got(&r).len()), (0, 0));
    assert_eq!(switch.ports()[0].drops.of(Reason::NoPort), 1);
    // Names are those of the network's own ports.
    assert!(switch.add_flow("blue", "actions=output:r").is_err());
    assert_eq!(switch.remove_flows("blue", "priority=10", true), Ok(1));
}

/// What a capture has written by now, and whether that is all.
fn captured(stream: &mut Stream) -> (Vec<Block>, bool) {
    let mut context = Context::from_waker(Waker::noop());
    let (mut reader, mut blocks) = (Reader::default(), Vec::new());
    loop {
        match stream.poll(&mut context) {
            Poll::Ready(Some(bytes)) => reader.put(&bytes),
            Poll::Ready(None) => return (blocks, true),
            Poll::Pending => return (blocks, false),
        }
        while let Some(block) = reader.take().unwrap() {
            if !matches!(block, Block::Other) {
                blocks.push(block);
            }
        }
    }
}

#[test]
fn a_capture_has_the_frames_that_were_asked_for_and_says_what_became_of_them() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let r = plug(&mut switch, "r", "red");
    let spec = |of: &str, filter: &str| CaptureSpec {
        of: of.to_owned(),
        filter: filter.to_owned(),
        ..CaptureSpec::default()
    };
    let wrong = switch.capture(&spec("x", ""));
    assert!(matches!(wrong.err(), Some(Error::Nothing(_))));
    let wrong = switch.capture(&spec("a", "tcp,tp_dst=x"));
    assert!(matches!(wrong.err(), Some(Error::Flow(_))));
    let mut blue = switch.capture(&spec("network:blue", "")).unwrap();
    let mut at_b = switch
        .capture(&CaptureSpec {
            count: Some(1),
            ..spec("b", "dl_src=02:00:00:00:00:01")
        })
        .unwrap();
    put(&mut switch, &b, frame(2, Mac::BROADCAST));
    put(&mut switch, &r, frame(3, Mac::BROADCAST));
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    let frames = |blocks: &[Block]| {
        let frames = blocks.iter().filter_map(|block| match block {
            Block::Frame {
                interface,
                direction,
                bytes,
                ..
            } => Some((*interface, *direction, bytes[11])),
            _ => None,
        });
        frames.collect::<Vec<_>>()
    };
    let (blocks, over) = captured(&mut at_b);
    assert!(over, "after one frame");
    assert_eq!(frames(&blocks), [(0, Direction::Out, 1)]);
    let (blocks, over) = captured(&mut blue);
    assert!(!over);
    let (a, b) = (0, 1);
    assert_eq!(
        frames(&blocks),
        [
            (b, Direction::In, 2),
            (a, Direction::Out, 2),
            (a, Direction::In, 1),
            (b, Direction::Out, 1)
        ]
    );
    assert!(switch.end_capture(blue.id));
    assert!(!switch.end_capture(blue.id));
    let (blocks, over) = captured(&mut blue);
    let counts = |received| Block::Statistics {
        received,
        dropped: 0,
    };
    assert_eq!((blocks, over), (vec![counts(2), counts(2)], true));
}

#[test]
fn a_capture_that_nobody_takes_is_bounded_and_one_that_is_dropped_ends() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let spec = CaptureSpec::default();
    let mut stream = switch.capture(&spec).unwrap();
    let mut long = frame(1, Mac::BROADCAST);
    long.resize(192, 1);
    for _ in 0..400 {
        put(&mut switch, &a, long.clone());
    }
    switch.end_capture(stream.id);
    let (blocks, over) = captured(&mut stream);
    let Some(Block::Statistics { received, dropped }) = blocks.last() else {
        panic!("{} blocks", blocks.len());
    };
    assert!(over && *received == 400 && (50..=250).contains(dropped));
    assert_eq!(blocks.len() as u64, 2 + 400 - dropped);
    // Of a limited number at once, those that nobody listens to do not count.
    for _ in 0..40 {
        drop(switch.capture(&spec).unwrap());
        switch.flush();
    }
}

#[test]
fn what_is_dropped_can_be_captured_with_the_reason() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let spec = CaptureSpec {
        drops: true,
        ..CaptureSpec::default()
    };
    let mut stream = switch.capture(&spec).unwrap();
    switch
        .add_flow("blue", "dl_src=02:00:00:00:00:01,actions=drop")
        .unwrap();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    put(&mut switch, &a, frame(2, Mac::BROADCAST));
    put(&mut switch, &a, vec![0xff; 9]);
    b.1.lock().unwrap().broken = true;
    assert_eq!(switch.service(Some(b.0)), 0);
    put(&mut switch, &a, frame(3, Mac::BROADCAST));
    let comments: Vec<_> = captured(&mut stream)
        .0
        .into_iter()
        .filter_map(|block| match block {
            Block::Frame { comment, .. } => Some(comment),
            _ => None,
        })
        .collect();
    assert_eq!(
        comments,
        [
            "dropped: flow_drop",
            "dropped: malformed",
            "dropped: port_down"
        ]
    );
}

#[test]
fn mirrors_copy_once_and_wait_for_their_ports() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let spec = |port: Option<&str>, network: Option<&str>, to: &str| MirrorSpec {
        port: port.map(str::to_owned),
        network: network.map(str::to_owned),
        direction: None,
        to: to.to_owned(),
    };
    let of_a = spec(Some("a"), None, "w");
    assert!(switch.add_mirror("m", of_a.clone(), false).is_err());
    let made = switch.add_mirror("m", of_a, true).unwrap();
    assert!(made.down.is_some());
    // It is in another network, and takes no part in this one.
    let w = plug(&mut switch, "w", "red");
    assert!(switch.mirrors()[0].down.is_none());
    let itself = spec(Some("w"), None, "w");
    assert_eq!(switch.add_mirror("x", itself, false), Err(Error::Mirror));
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    put(&mut switch, &b, frame(2, Mac::BROADCAST));
    assert_eq!((got(&w).len(), got(&a).len(), got(&b).len()), (2, 1, 1));
    // Of a network, each frame is there once.
    let of_blue = spec(None, Some("blue"), "w");
    switch.add_mirror("m", of_blue, false).unwrap();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    put(&mut switch, &b, frame(2, Mac::BROADCAST));
    assert_eq!(got(&w).len(), 2);
    switch.remove_port("w").unwrap();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert!(switch.remove_mirror("m").is_ok());
    assert!(switch.remove_mirror("m").is_err());
}

#[test]
fn who_has_an_address_is_asked_for_it_and_the_answer_goes_to_nobody_else() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let ip = std::net::Ipv4Addr::new(10, 0, 0, 2);
    let spec = PingSpec {
        network: Some("blue".to_owned()),
        address: Some(ip.into()),
        ..PingSpec::default()
    };
    let (_, mut told) = switch.ping(&spec).unwrap();
    switch.flush();
    let asked = got(&a).remove(0);
    assert_eq!(got(&b).len(), 1);
    assert_eq!(
        (&asked[..6], &asked[38..42]),
        (&[0xff; 6][..], &ip.octets()[..])
    );
    assert!(told.try_recv().is_err());
    let mut answer = [&asked[6..12], &[2, 0, 0, 0, 0, 2], &asked[12..20], &[0, 2]].concat();
    answer.extend([2, 0, 0, 0, 0, 2]);
    answer.extend(ip.octets());
    answer.extend([&asked[22..32], &[0; 18]].concat());
    put(&mut switch, &a, answer.clone());
    assert_eq!(told.try_recv().unwrap().mac, Some(Mac([2, 0, 0, 0, 0, 2])));
    assert_eq!(got(&b).len(), 0);
    // Nobody waits any more, and later the address is forgotten.
    put(&mut switch, &a, answer);
    let later = Instant::now() + std::time::Duration::from_secs(20);
    switch.tick(later);
    assert_eq!(switch.macs("blue").unwrap().len(), 1);
    let nobody = PingSpec {
        peer: Some("n2".to_owned()),
        ..PingSpec::default()
    };
    assert!(matches!(switch.ping(&nobody).err(), Some(Error::NoPeer(_))));
    let both = PingSpec {
        peer: Some("n2".to_owned()),
        ..spec
    };
    assert!(matches!(switch.ping(&both).err(), Some(Error::Ping)));
}

#[test]
fn figures_are_as_prometheus_reads_them() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    plug(&mut switch, "b", "blue");
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    put(&mut switch, &a, vec![0xff; 9]);
    let text = metrics::text(&switch.figures());
    for line in [
        "# TYPE blanket_switch_port_frames_total counter",
        r#"blanket_switch_port_frames_total{port="a",network="blue",direction="in"} 2"#,
        r#"blanket_switch_port_bytes_total{port="b",network="blue",direction="out"} 60"#,
        r#"blanket_switch_port_drops_total{port="a",network="blue",reason="malformed"} 1"#,
        r#"blanket_switch_port_up{port="b",network="blue"} 1"#,
        r#"blanket_switch_port_macs{port="a",network="blue"} 1"#,
        r#"blanket_switch_network_flows{network="blue",vni="1"} 1"#,
        "blanket_switch_captures 0",
    ] {
        assert!(text.lines().any(|is| is == line), "no {line} in {text}");
    }
    // Each family once, described, and each sample a number.
    let mut families = std::collections::HashSet::new();
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(family) => assert!(families.insert(family.to_owned()), "{line}"),
            None if line.starts_with('#') => {}
            None => assert!(line.rsplit_once(' ').unwrap().1.parse::<f64>().is_ok()),
        }
    }
}

#[test]
fn turns_are_by_weight() {
    let mut switch = switch();
    let ports: Vec<_> = ["a", "b"]
        .map(|name| plug(&mut switch, name, "blue"))
        .into();
    let heavy = PortConfig {
        weight: 3,
        ..PortConfig::default()
    };
    assert_eq!(
        switch.set_port("b", heavy.clone()).unwrap().spec.bridge,
        heavy
    );
    assert!(matches!(switch.set_port("x", heavy), Err(Error::NoPort(_))));
    for (number, (_, wire)) in ports.iter().enumerate() {
        let frames = (0..20_000).map(|_| frame(number as u8 + 1, Mac::BROADCAST));
        wire.lock().unwrap().sent.extend(frames);
    }
    for _ in 0..5 {
        for (id, _) in &ports {
            assert!(switch.service(Some(*id)) > 0);
        }
    }
    let rx = |port: usize| switch.ports()[port].rx.frames as f64;
    let share = rx(1) / rx(0);
    assert!((2.8..3.2).contains(&share), "{} and {}", rx(0), rx(1));
}

/// A segment of a connection from this port to 10.0.0.100:80, sent to `to`.
fn segment(to: Mac, port: u16, flags: u8) -> Vec<u8> {
    let mut bytes = [&to.0[..], &[2, 0, 0, 0, 0, 1, 8, 0]].concat();
    bytes.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 100]);
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    bytes.resize(60, 0);
    bytes
}

#[test]
fn connections_stay_with_a_server_that_drains_on_the_same_node_and_over_a_restart() {
    let spec = |draining: Option<u64>| VipSpec {
        network: "blue".to_owned(),
        address: std::net::Ipv4Addr::new(10, 0, 0, 100).into(),
        port: 80,
        protocol: Protocol::Tcp,
        sticky: false,
        drain: 60,
        backends: (2..5)
            .map(|last| VipBackend {
                mac: Mac([2, 0, 0, 0, 0, last]),
                weight: 1,
                draining: draining.filter(|_| last == 2),
            })
            .collect(),
    };
    let mut switch = switch();
    let client = plug(&mut switch, "client", "blue");
    let servers: Vec<_> = ["s2", "s3", "s4"]
        .map(|name| plug(&mut switch, name, "blue"))
        .into();
    let hello = |switch: &mut Switch, servers: &[(PortId, Ends)], client: &(PortId, Ends)| {
        for (server, last) in servers.iter().zip(2..) {
            put(switch, server, frame(last, Mac::BROADCAST));
        }
        for port in servers.iter().chain([client]) {
            got(port);
        }
    };
    hello(&mut switch, &servers, &client);
    let vip = switch.add_vip("web", spec(None), false).unwrap();
    assert!(vip.shares.iter().all(|share| (300..370).contains(share)));
    assert!(matches!(
        switch.add_vip("other", spec(None), false),
        Err(Error::VipAddress(_))
    ));
    assert!(matches!(
        switch.remove_network("blue"),
        Err(Error::HasVips(..) | Error::InUse(..))
    ));
    // Who got it.
    let send =
        |switch: &mut Switch, servers: &[(PortId, Ends)], client: &(PortId, Ends), port, flags| {
            put(switch, client, segment(vip.mac, port, flags));
            let counts: Vec<usize> = servers.iter().map(|server| got(server).len()).collect();
            assert_eq!(counts.iter().sum::<usize>(), 1, "port {port}: {counts:?}");
            counts.iter().position(|count| *count == 1).unwrap()
        };
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let begun: Vec<_> = (1000..1060)
        .map(|port| (port, send(&mut switch, &servers, &client, port, SYN)))
        .collect();
    assert!((0..3).all(|server| begun.iter().any(|(_, its)| *its == server)));
    let since = Some(1_700_000_000);
    switch.add_vip("web", spec(since), false).unwrap();
    let stays = |switch: &mut Switch, servers: &[(PortId, Ends)], client: &(PortId, Ends)| {
        for (port, server) in &begun {
            assert_eq!(
                send(switch, servers, client, *port, ACK),
                *server,
                "port {port}"
            );
        }
        for port in 2000..2060 {
            assert_ne!(send(switch, servers, client, port, SYN), 0, "port {port}");
            assert_ne!(send(switch, servers, client, port, ACK), 0, "port {port}");
        }
    };
    stays(&mut switch, &servers, &client);
    // Who asks for the address is told, whomever he asks.
    let mut question = [&vip.mac.0[..], &[2, 0, 0, 0, 0, 1, 8, 6]].concat();
    question.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1]);
    question.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, 100]);
    put(&mut switch, &client, question);
    let answers = got(&client);
    assert_eq!(answers[0][22..28], vip.mac.0);
    // Again, with nothing but what was saved.
    let mut switch = self::switch();
    let client = plug(&mut switch, "client", "blue");
    let servers: Vec<_> = ["s2", "s3", "s4"]
        .map(|name| plug(&mut switch, name, "blue"))
        .into();
    hello(&mut switch, &servers, &client);
    switch.add_vip("web", spec(since), true).unwrap();
    stays(&mut switch, &servers, &client);
    // Without servers, nobody gets anything, and it is said why.
    let nobody = VipSpec {
        backends: Vec::new(),
        drain: 0,
        ..spec(None)
    };
    switch.remove_vip("web").unwrap();
    switch.add_vip("web", nobody, false).unwrap();
    put(&mut switch, &client, segment(vip.mac, 1000, SYN));
    assert!(servers.iter().all(|server| got(server).is_empty()));
    let ports = switch.ports();
    let dropped = ports[0].drops.of(Reason::NoBackend);
    assert_eq!((ports[0].name.as_str(), dropped), ("client", 1));
}
