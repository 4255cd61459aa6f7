//! The switch's figures as text for Prometheus (exposition format 0.0.4).

use std::fmt::{Display, Write};

use super::types::{Info, Network, Peer, PortStatus, Traffic};
use crate::bridge::Counts;
use crate::drops::Drops;

/// The type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A network's flows.
#[derive(Clone, Debug, Default)]
pub struct FlowFigures {
    /// Entries of its tables.
    pub entries: usize,
    /// Frames whose decision was remembered.
    pub hits: u64,
    /// Frames that had to be looked up.
    pub misses: u64,
}

/// All figures.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The switch.
    pub info: Info,
    /// Its networks.
    pub networks: Vec<(Network, FlowFigures)>,
    /// Its ports, with how many addresses were learned at each.
    pub ports: Vec<(PortStatus, usize)>,
    /// Other nodes' switches.
    pub peers: Vec<Peer>,
    /// What the table of addresses did.
    pub counts: Counts,
    /// Questions for addresses that were answered here.
    pub answered: u64,
    /// Captures that go on.
    pub captures: usize,
}

/// A text that grows.
#[derive(Default)]
struct Text {
    text: String,
}

/// A label, its value quoted.
type Label<'a> = (&'a str, &'a dyn Display);

impl Text {
    /// Begins a family.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: impl Display) {
        self.text.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let begin = if index == 0 { '{' } else { ',' };
            let value = value.to_string();
            let value = value.replace('\\', "\\\\").replace('"', "\\\"");
            let value = value.replace('\n', "\\n");
            let _ = write!(self.text, "{begin}{label}=\"{value}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{end} {value}");
    }

    /// Frames and bytes in both directions.
    fn traffic<'a>(&mut self, name: &str, what: &str, all: &[(Vec<Label<'a>>, Traffic, Traffic)]) {
        let frames: fn(Traffic) -> u64 = |traffic| traffic.frames;
        let bytes: fn(Traffic) -> u64 = |traffic| traffic.bytes;
        for (unit, of) in [("frames", frames), ("bytes", bytes)] {
            let name = format!("{name}_{unit}_total");
            let help =
                format!("{what}: {unit} into the switch and out of it; a large frame is one.");
            self.family(&name, "counter", &help);
            for (labels, rx, tx) in all {
                for (direction, traffic) in [("in", *rx), ("out", *tx)] {
                    let mut labels = labels.clone();
                    labels.push(("direction", &direction));
                    self.sample(&name, &labels, of(traffic));
                }
            }
        }
    }

    fn drops<'a>(
        &mut self,
        name: &str,
        help: &str,
        all: impl Iterator<Item = (Vec<Label<'a>>, &'a Drops)>,
    ) {
        self.family(name, "counter", help);
        for (labels, drops) in all {
            for (reason, count) in drops.iter() {
                let mut labels = labels.clone();
                labels.push(("reason", &reason));
                self.sample(name, &labels, count);
            }
        }
    }
}

fn port_labels(port: &PortStatus) -> Vec<Label<'_>> {
    vec![("port", &port.name), ("network", &port.spec.network)]
}

/// All figures as text.
#[must_use]
pub fn text(figures: &Figures) -> String {
    let mut text = Text::default();
    let name = "blanket_switch_info";
    text.family(name, "gauge", "The switch.");
    text.sample(name, &[("version", &figures.info.version)], 1);
    let name = "blanket_switch_captures";
    text.family(name, "gauge", "Captures that go on.");
    text.sample(name, &[], figures.captures);
    let all = [(Vec::new(), &figures.info.drops)];
    let help = "Frames dropped that belong to no port or peer, by reason.";
    text.drops("blanket_switch_drops_total", help, all.into_iter());
    table(&mut text, figures);
    networks(&mut text, &figures.networks);
    ports(&mut text, &figures.ports);
    peers(&mut text, &figures.peers);
    text.text
}

fn table(text: &mut Text, figures: &Figures) {
    let counts = figures.counts;
    let all = [
        ("learned", counts.learned, "Addresses learned."),
        (
            "moved",
            counts.moved,
            "Learned addresses that changed their place.",
        ),
        (
            "evicted",
            counts.evicted,
            "Learned addresses that made room for others.",
        ),
        (
            "held",
            counts.held,
            "Addresses held where they are, as they moved too often.",
        ),
        (
            "refused",
            counts.refused,
            "Addresses not learned for want of room.",
        ),
        (
            "answered",
            figures.answered,
            "Questions for addresses that were answered here.",
        ),
    ];
    for (what, count, help) in all {
        let name = format!("blanket_switch_macs_{what}_total");
        text.family(&name, "counter", help);
        text.sample(&name, &[], count);
    }
}

fn networks(text: &mut Text, networks: &[(Network, FlowFigures)]) {
    type Of = fn(&Network, &FlowFigures) -> u64;
    let all: [(&str, &str, &str, Of); 5] = [
        (
            "ports",
            "gauge",
            "Ports of a network on this node.",
            |its, _| its.ports as u64,
        ),
        (
            "macs",
            "gauge",
            "Addresses that are known in a network.",
            |its, _| its.macs as u64,
        ),
        (
            "flows",
            "gauge",
            "Entries of a network's flow tables.",
            |_, flows| flows.entries as u64,
        ),
        (
            "flow_cache_hits_total",
            "counter",
            "Frames whose decision was remembered.",
            |_, flows| flows.hits,
        ),
        (
            "flow_cache_misses_total",
            "counter",
            "Frames that were looked up in the flow tables.",
            |_, flows| flows.misses,
        ),
    ];
    for (what, kind, help, of) in all {
        let name = format!("blanket_switch_network_{what}");
        text.family(&name, kind, help);
        for (network, flows) in networks {
            let labels: [Label<'_>; 2] = [("network", &network.name), ("vni", &network.spec.vni)];
            text.sample(&name, &labels, of(network, flows));
        }
    }
}

fn ports(text: &mut Text, ports: &[(PortStatus, usize)]) {
    let name = "blanket_switch_port_up";
    text.family(name, "gauge", "Whether a port is of use.");
    for (port, _) in ports {
        text.sample(name, &port_labels(port), u8::from(port.down.is_none()));
    }
    let name = "blanket_switch_port_macs";
    text.family(name, "gauge", "Addresses that were learned at a port.");
    for (port, learned) in ports {
        text.sample(name, &port_labels(port), learned);
    }
    let traffic = ports
        .iter()
        .map(|(port, _)| (port_labels(port), port.rx, port.tx));
    let traffic: Vec<_> = traffic.collect();
    text.traffic("blanket_switch_port", "A port", &traffic);
    let drops = ports
        .iter()
        .map(|(port, _)| (port_labels(port), &port.drops));
    let help = "Frames from a port, or to it, that were dropped, by reason.";
    text.drops("blanket_switch_port_drops_total", help, drops);
}

fn peers(text: &mut Text, peers: &[Peer]) {
    let name = "blanket_switch_peer_up";
    text.family(name, "gauge", "Whether there are keys with a peer.");
    for peer in peers {
        let up = u8::from(peer.status.connected);
        text.sample(name, &[("peer", &peer.name)], up);
    }
    let name = "blanket_switch_peer_handshakes_total";
    text.family(
        name,
        "counter",
        "Handshakes that made new keys with a peer.",
    );
    for peer in peers {
        let count = peer.status.stats.handshakes;
        text.sample(name, &[("peer", &peer.name)], count);
    }
    let traffic = peers.iter().map(|peer| {
        let stats = peer.status.stats;
        let (rx, tx) = (
            Traffic {
                frames: stats.frames_in,
                bytes: stats.bytes_in,
            },
            Traffic {
                frames: stats.frames_out,
                bytes: stats.bytes_out,
            },
        );
        let labels: Vec<Label<'_>> = vec![("peer", &peer.name)];
        (labels, rx, tx)
    });
    let traffic: Vec<_> = traffic.collect();
    text.traffic("blanket_switch_peer", "A peer", &traffic);
    let drops = peers.iter().map(|peer| {
        let labels: Vec<Label<'_>> = vec![("peer", &peer.name)];
        (labels, &peer.drops)
    });
    let help = "Frames from a peer that were dropped, by reason.";
    text.drops("blanket_switch_peer_drops_total", help, drops);
    paths(text, peers);
}

fn paths(text: &mut Text, peers: &[Peer]) {
    type Of = fn(&crate::tunnel::PathStatus) -> Option<f64>;
    let all: [(&str, &str, Of); 3] = [
        ("up", "Whether a path to a peer is there.", |path| {
            Some(f64::from(u8::from(path.up)))
        }),
        ("rtt_seconds", "Round trip on a path to a peer.", |path| {
            path.rtt_us.map(|rtt| rtt as f64 / 1e6)
        }),
        (
            "loss_ratio",
            "Parts of one that a path to a peer loses.",
            |path| Some(f64::from(path.loss)),
        ),
    ];
    for (what, help, of) in all {
        let name = format!("blanket_switch_path_{what}");
        text.family(&name, "gauge", help);
        for peer in peers {
            for path in &peer.status.paths {
                let labels: [Label<'_>; 3] = [
                    ("peer", &peer.name),
                    ("uplink", &path.uplink),
                    ("remote", &path.remote),
                ];
                if let Some(value) = of(path) {
                    text.sample(&name, &labels, value);
                }
            }
        }
    }
}
