//! Tunnels: datagrams of any bytes, sound ones with changes, sound ones again
//! and out of order: nothing comes out that was not sealed, none twice, and
//! afterwards a frame gets through. Records, VXLAN and Geneve: any bytes are read or refused.
#![no_main]

use std::net::SocketAddr;
use std::time::Duration;

use arbitrary::Arbitrary;
use blanket_overlay::frame::{Frame, Head, Offload, Vni};
use blanket_overlay::tunnel::wire::{Datagram, Record};
use blanket_overlay::tunnel::{
    Config, Costs, PathConfig, PeerConfig, PeerId, Received, TrainBuffer, Tunnels, generate,
    geneve, public, vxlan,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any bytes, from some address.
    Bytes {
        bytes: Vec<u8>,
        port: u8,
        segment: u16,
    },
    /// A frame.
    Frame {
        len: u16,
        one_by_one: bool,
        backwards: bool,
    },
    /// A datagram that was sent before, with changes.
    Again {
        which: u8,
        changes: Vec<(u16, u8)>,
        cut: Option<u16>,
        port: u8,
    },
    /// Time passes.
    Time(u16),
    /// The parsers, as if a peer had sealed it.
    Parse(Vec<u8>),
}

fn tunnels(private: [u8; 32]) -> Tunnels {
    Tunnels::new(Config {
        private,
        epoch: Duration::from_secs(1),
        uplinks: vec![1472],
        costs: Costs { aes: 1, chacha: 2 },
    })
}

fn address(node: usize, port: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, node as u8], 4790 + u16::from(port)))
}

struct Net {
    now: Duration,
    nodes: [Tunnels; 2],
    out: [TrainBuffer; 2],
    sent: Vec<Vec<u8>>,
    frames: usize,
    got: usize,
}

impl Net {
    fn open(&mut self, node: usize, from: SocketAddr, bytes: &mut [u8], segment: usize) {
        let received = Received {
            uplink: 0,
            from,
            bytes,
            segment,
        };
        let got = &mut self.got;
        self.nodes[node].open(
            self.now,
            [received],
            &mut self.out[node],
            &mut |_, vni, frame| {
                assert_eq!(vni, Vni::new(5).expect("24 bits"));
                assert!(frame.to_vec().iter().all(|byte| *byte == 0x5a));
                *got += 1;
            },
        );
    }

    fn exchange(&mut self) {
        for _ in 0..8 {
            for node in 0..2 {
                let out = &mut self.out[node];
                self.nodes[node].tick(self.now, out);
                self.nodes[node].finish(self.now, out);
                let packets: Vec<(Vec<u8>, usize)> = out
                    .packets()
                    .map(|(_, packet)| (packet.bytes.to_vec(), packet.segment))
                    .collect();
                out.clear();
                for (mut bytes, segment) in packets {
                    self.open(1 - node, address(node, 0), &mut bytes, segment);
                }
            }
        }
    }

    fn frame(&mut self, len: usize, one_by_one: bool, backwards: bool) {
        let mut bytes = vec![0x5a; len.max(1)];
        let head = Head::of(&bytes);
        let at = head.bytes().len();
        let piece = [(&mut bytes[at..]).into()];
        let frame = Frame {
            head,
            body: &piece,
            offload: Offload::default(),
        };
        let vni = Vni::new(5).expect("24 bits");
        let out = &mut self.out[0];
        let sealed = self.nodes[0].seal(self.now, PeerId(0), vni, 0, &frame, out);
        self.nodes[0].finish(self.now, out);
        self.frames += usize::from(sealed.is_ok());
        let mut packets: Vec<(Vec<u8>, usize)> = Vec::new();
        for (_, packet) in out.packets() {
            if one_by_one {
                packets.extend(packet.iter().map(|bytes| (bytes.to_vec(), 0)));
            } else {
                packets.push((packet.bytes.to_vec(), packet.segment));
            }
        }
        out.clear();
        if backwards {
            packets.reverse();
        }
        for (mut bytes, segment) in packets {
            if self.sent.len() < 100 {
                self.sent.push(bytes.clone());
            }
            self.open(1, address(0, 0), &mut bytes, segment);
        }
        assert!(
            self.got <= self.frames,
            "a frame came twice, or from nowhere"
        );
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let keys = [generate(), generate()];
    let mut net = Net {
        now: Duration::ZERO,
        nodes: keys.map(tunnels),
        out: [TrainBuffer::default(), TrainBuffer::default()],
        sent: Vec::new(),
        frames: 0,
        got: 0,
    };
    for node in 0..2 {
        let peer = PeerConfig {
            public: public(&keys[1 - node]),
            psk: None,
            paths: vec![PathConfig {
                uplink: 0,
                remote: address(1 - node, 0),
                weight: 1,
            }],
        };
        net.nodes[node].add(net.now, &peer).expect("a peer");
    }
    net.exchange();
    for step in steps.into_iter().take(64) {
        match step {
            Step::Bytes {
                mut bytes,
                port,
                segment,
            } => net.open(1, address(0, port), &mut bytes, segment.into()),
            Step::Frame {
                len,
                one_by_one,
                backwards,
            } => net.frame(len.into(), one_by_one, backwards),
            Step::Again {
                which,
                changes,
                cut,
                port,
            } => {
                let Some(bytes) = net.sent.get(usize::from(which)) else {
                    continue;
                };
                let mut bytes = bytes.clone();
                for (at, change) in changes {
                    if let Some(byte) = bytes.get_mut(usize::from(at)) {
                        *byte ^= change;
                    }
                }
                bytes.truncate(cut.map_or(usize::MAX, usize::from));
                net.open(1, address(0, port), &mut bytes, 1472);
            }
            Step::Time(by) => {
                net.now += Duration::from_millis(by.into());
                net.exchange();
            }
            Step::Parse(mut bytes) => {
                let _ = Datagram::parse(&bytes);
                let _ = vxlan::parse(&mut bytes);
                let _ = geneve::parse(&mut bytes);
                let mut rest = &mut bytes[..];
                while !rest.is_empty() {
                    let Ok((_, _, next)) = Record::split(rest) else {
                        break;
                    };
                    rest = next;
                }
            }
        }
        assert!(net.got <= net.frames, "a frame came twice, or from nowhere");
    }
    for _ in 0..2 {
        net.now += Duration::from_secs(10);
        net.exchange();
    }
    let before = net.got;
    net.frame(3000, false, false);
    assert_eq!(net.got, before + 1, "nothing gets through any more");
});
