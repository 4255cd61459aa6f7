//! The switch without its thread, with ports in memory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod moving;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{Error, Switch};
use crate::api::types::{Attachment, NetworkSpec, PortSpec};
use crate::bridge::PortConfig;
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, Head, Mac, Offload, PortId, Vni};
use crate::port::Port;

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
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(Frame<'_>)) -> io::Result<usize> {
        for count in 0..most {
            let next = {
                let mut wire = self.wire.lock().unwrap();
                if wire.broken {
                    return Err(io::Error::other("the cable is cut"));
                }
                wire.sent.pop_front()
            };
            let Some(bytes) = next else { return Ok(count) };
            each(Frame {
                head: Head::of(&bytes),
                body: &[],
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

fn plug(switch: &mut Switch, name: &str, network: &str) -> (PortId, Ends) {
    let wire = Ends::default();
    let port = Memory {
        wire: Arc::clone(&wire),
        waker: File::open("/dev/null").unwrap(),
        drops: Drops::default(),
    };
    let status = switch.add_port(name, spec(network), Ok(Box::new(port)));
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
