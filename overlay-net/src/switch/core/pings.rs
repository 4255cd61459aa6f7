//! Pings: of other switches through their tunnels, and of stations in a
//! network.
//!
//! A switch is sent a frame of [`ECHO`] in the network that switches talk to
//! each other in, and sends it back:
//!
//! | bytes | |
//! |---|---|
//! | 0-13 | [`ECHO`] |
//! | 14 | 1: it is to be sent back; 2: it was |
//! | 15-21 | 0 |
//! | 22-29 | its number |
//! | 30- | 0, as many as were asked for |
//!
//! A station is asked for its address (ARP, neighbour solicitation) by a port
//! of the bridge that only pings have, with an address of its own.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Switch;
use crate::api::observe::{PingSpec, Pong};
use crate::bridge::{Mode, Place, PortConfig, Vlan, asked_by, question};
use crate::directory::NodeId;
use crate::frame::{Frame, Head, Mac, Offload, PortId, Vni, parse};
use crate::switch::Error;

/// How a ping of a switch begins: as [`super::CONTROL_HEAD`], with the other
/// experimental ethertype.
const ECHO: [u8; 14] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 0xb6];

/// Bytes of an echo without those that were asked for.
const ECHO_LEN: usize = 30;

/// Bytes that may be asked for.
const MOST_BYTES: usize = 65_000;

/// Pings that may wait for answers.
const MOST: usize = 64;

/// How long a port of the bridge stays after its last ping.
const STAY: Duration = Duration::from_secs(10);

/// Who is to answer.
enum Asked {
    Node(NodeId),
    Station(PortId, IpAddr),
}

struct Waiting {
    number: u64,
    asked: Asked,
    sent: Instant,
    tell: oneshot::Sender<Pong>,
}

/// A port of the bridge for pings.
struct Probe {
    id: PortId,
    vni: Vni,
    vlan: u16,
    mac: Mac,
    used: Duration,
}

/// All that wait, and their ports.
#[derive(Default)]
pub(super) struct Pings {
    waiting: Vec<Waiting>,
    probes: Vec<Probe>,
    last: u64,
    /// Ports so far: their numbers are counted from the greatest one.
    ports: u32,
}

impl Pings {
    /// Tells those who wait for `asked`.
    fn answer(&mut self, asked: impl Fn(&Waiting) -> bool, mac: Option<Mac>) {
        while let Some(at) = self.waiting.iter().position(&asked) {
            let waiting = self.waiting.swap_remove(at);
            let pong = Pong {
                nanos: u64::try_from(waiting.sent.elapsed().as_nanos()).unwrap_or(u64::MAX),
                mac,
            };
            // Who does not wait any more does not hear it.
            let _ = waiting.tell.send(pong);
        }
    }
}

impl Switch {
    /// Sends a ping; its number, and who is told of the answer.
    ///
    /// # Errors
    ///
    /// There is no such peer or network, or too many wait.
    pub fn ping(&mut self, spec: &PingSpec) -> Result<(u64, oneshot::Receiver<Pong>), Error> {
        self.pings.waiting.retain(|one| !one.tell.is_closed());
        if self.pings.waiting.len() == MOST {
            return Err(Error::TooMany(MOST, "pings"));
        }
        self.pings.last += 1;
        let number = self.pings.last;
        let (tell, told) = oneshot::channel();
        let wait = |pings: &mut Pings, asked| {
            pings.waiting.push(Waiting {
                number,
                asked,
                sent: Instant::now(),
                tell,
            });
        };
        match (&spec.peer, &spec.network, spec.address) {
            (Some(peer), None, None) => {
                let node = self.peers.get(peer).copied();
                let node = node.ok_or_else(|| Error::NoPeer(peer.clone()))?;
                wait(&mut self.pings, Asked::Node(node));
                let mut bytes = ECHO.to_vec();
                bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
                bytes.extend(number.to_be_bytes());
                bytes.resize(ECHO_LEN + spec.bytes.min(MOST_BYTES), 0);
                let to = Place::Node(node);
                self.put_off(to, Vni::default(), 0, bytes, Offload::default());
                self.catch_up();
            }
            (None, Some(network), Some(ip)) => {
                let vni = self.vni(network)?;
                let (port, mac) = self.probe(vni, spec.vlan)?;
                wait(&mut self.pings, Asked::Station(port, ip));
                let vlan = Vlan::new(spec.vlan).unwrap_or_default();
                let known = self.bridge.neighbour(vni, vlan, ip);
                let head = question(ip, mac, known);
                self.ask(port, vni, &head);
            }
            _ => return Err(Error::Ping),
        }
        Ok((number, told))
    }

    /// A frame of this switch's own, from a port that only pings have.
    fn ask(&mut self, port: PortId, vni: Vni, head: &Head) {
        let mut frame = Frame {
            head: head.clone(),
            body: &[],
            offload: Offload::default(),
        };
        // It is sound: it was made here.
        if let Ok((key, layers)) = parse(head.bytes(), frame.len(), port, vni) {
            self.bridge(Place::Port(port), &key, &layers, &mut frame);
        }
    }

    /// The port for pings in a VLAN of a network, and its address.
    fn probe(&mut self, vni: Vni, vlan: u16) -> Result<(PortId, Mac), Error> {
        let now = self.now;
        let mut probes = self.pings.probes.iter_mut();
        if let Some(probe) = probes.find(|probe| (probe.vni, probe.vlan) == (vni, vlan)) {
            probe.used = now;
            return Ok((probe.id, probe.mac));
        }
        let id = PortId(u32::MAX - self.pings.ports);
        self.bridge.add_port(
            id,
            PortConfig {
                vni,
                vlan: Mode::Access { vlan },
                mtu: usize::from(u16::MAX),
                limit: 1,
                ..PortConfig::default()
            },
        )?;
        self.pings.ports += 1;
        // Always the same one, so that others have one more to know, not more and more.
        let [a, b, c, d, e, ..] = self.directory.me().0.to_be_bytes();
        let mac = Mac([0x06, a, b, c, d, e]);
        let used = now;
        self.pings.probes.push(Probe {
            id,
            vni,
            vlan,
            mac,
            used,
        });
        Ok((id, mac))
    }

    /// Nobody waits for this ping any more.
    pub fn end_ping(&mut self, number: u64) {
        self.pings.waiting.retain(|one| one.number != number);
    }

    /// Removes ports that have not been used for a while; those of a network
    /// at once.
    pub(super) fn end_probes(&mut self, of: Option<Vni>) {
        if self.pings.probes.is_empty() {
            return;
        }
        let now = self.now;
        let (bridge, probes) = (&mut self.bridge, &mut self.pings.probes);
        probes.retain(|probe| {
            let stays = now < probe.used + STAY && Some(probe.vni) != of;
            if !stays && bridge.remove_port(now, probe.id).is_err() {
                tracing::debug!("a port of pings has gone already");
            }
            stays
        });
    }

    /// A frame goes to a port that is none of the switch's: an answer, if
    /// anything.
    #[cold]
    pub(super) fn answered(&mut self, id: PortId, frame: &Frame<'_>) {
        let Some(probe) = self.pings.probes.iter().find(|probe| probe.id == id) else {
            return;
        };
        let parsed = parse(frame.head.bytes(), frame.len(), id, probe.vni);
        let Ok((key, _)) = parsed else { return };
        if let Some((ip, mac)) = asked_by(&key).filter(|_| key.dst == probe.mac) {
            let asked = |one: &Waiting| match one.asked {
                Asked::Station(port, of) => port == id && of == ip,
                Asked::Node(_) => false,
            };
            self.pings.answer(asked, Some(mac));
        }
    }

    /// A frame from another switch. False: it is no ping.
    pub(super) fn echo(&mut self, node: NodeId, bytes: &[u8]) -> bool {
        let Some(rest) = bytes.strip_prefix(&ECHO) else {
            return false;
        };
        let Some(number) = rest.get(8..).and_then(|rest| rest.first_chunk()) else {
            return false;
        };
        let number = u64::from_be_bytes(*number);
        match rest.first() {
            Some(1) => {
                let mut back = bytes.to_vec();
                back[ECHO.len()] = 2;
                let to = Place::Node(node);
                self.put_off(to, Vni::default(), 0, back, Offload::default());
                true
            }
            Some(2) => {
                let asked = |one: &Waiting| {
                    one.number == number && matches!(one.asked, Asked::Node(of) if of == node)
                };
                self.pings.answer(asked, None);
                true
            }
            _ => false,
        }
    }
}
