//! A node: a network namespace with a switch, and its tenants.

use std::time::Duration;

use blanket_system_tests::{program, until};
use blanket_testbed::{Client, Host, HostBuilder};
use serde_json::Value;

pub(super) const LONG: Duration = Duration::from_secs(60);

pub(super) fn nodes() -> HostBuilder {
    // Without guests' images: there are none here.
    ["blanket", "blanket-switch"]
        .into_iter()
        .fold(Host::builder("overlay"), |host, name| {
            host.inject(program(name).unwrap(), format!("/usr/bin/{name}"))
        })
}

/// A node: a namespace `nN` with a switch.
pub(super) struct Node<'a> {
    pub(super) host: &'a Client,
    pub(super) number: u32,
}

impl<'a> Node<'a> {
    /// Makes the namespace, without a switch.
    pub(super) fn new(host: &'a Client, number: u32) -> Self {
        let n = number;
        host.sh(format!(
            "ip netns add n{n} && ip -n n{n} link set lo up && mkdir -p /run/h{n}"
        ))
        .text()
        .unwrap();
        Self { host, number }
    }

    /// Starts the switch, and waits until it takes commands.
    pub(super) fn start(&self, flags: &str) {
        let n = self.number;
        let run = format!(
            "echo $$ > /run/h{n}/pid; exec ip netns exec n{n} blanket-switch \
             --socket /run/h{n}/blanket-switch.sock --state /run/h{n}/switch {flags}"
        );
        self.host.sh(run).spawn(format!("/run/h{n}/log")).unwrap();
        until("the switch takes commands", || {
            self.try_net("info").is_some()
        });
    }

    /// Starts the switch with a way to others at `192.0.2.N` on the interface `u`.
    pub(super) fn start_remote(&self, flags: &str) {
        let n = self.number;
        self.start(&format!("--listen 192.0.2.{n}:4790 --interface u {flags}"));
    }

    /// Makes another node's switch known to this one.
    pub(super) fn add_peer(&self, other: &Node<'_>) {
        let info: Value = serde_json::from_str(&other.net("info --json")).unwrap();
        let key = info["key"].as_str().unwrap();
        let n = other.number;
        self.net(&format!(
            "peer add n{n} --key {key} --endpoint 192.0.2.{n}:4790"
        ));
    }

    /// Kills the switch: it has no time to say anything.
    pub(super) fn kill(&self) {
        let pid = format!("/run/h{}/pid", self.number);
        let kill =
            format!("p=$(cat {pid}); kill -9 $p; while [ -d /proc/$p ]; do sleep 0.05; done");
        self.host.sh(kill).text().unwrap();
    }

    pub(super) fn command(&self, arguments: &str) -> String {
        let n = self.number;
        format!("ip netns exec n{n} blanket --home /run/h{n} net {arguments}")
    }

    pub(super) fn try_net(&self, arguments: &str) -> Option<String> {
        self.host.sh(self.command(arguments)).text().ok()
    }

    pub(super) fn net(&self, arguments: &str) -> String {
        let said = self
            .host
            .sh(self.command(arguments))
            .timeout(LONG)
            .run()
            .unwrap();
        assert!(said.status.success(), "{arguments}: {said}");
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// What it says when it refuses.
    pub(super) fn refusal(&self, arguments: &str) -> String {
        let said = self.host.sh(self.command(arguments)).run().unwrap();
        assert!(!said.status.success(), "{arguments}: {said}");
        String::from_utf8_lossy(&said.stderr).into_owned()
    }

    /// A port, from `net port --json`.
    pub(super) fn port(&self, name: &str) -> Value {
        let ports: Value = serde_json::from_str(&self.net("port --json")).unwrap();
        let port = ports
            .as_array()
            .unwrap()
            .iter()
            .find(|port| port["name"] == name);
        port.unwrap_or_else(|| panic!("no port {name}: {ports}"))
            .clone()
    }

    /// Attaches a tenant: a namespace `NAME` with this address on a TAP of the
    /// same name.
    pub(super) fn tenant(&self, network: &str, name: &str, address: &str, flags: &str) {
        let n = self.number;
        self.net(&format!("attach {network} {name} --tap {name} {flags}"));
        let script = format!(
            "ip netns add {name} && ip -n n{n} link set dev {name} netns {name} && \
             ip -n {name} link set lo up && ip -n {name} link set dev {name} up && \
             ip -n {name} addr add {address} dev {name}"
        );
        self.host.sh(script).text().unwrap();
    }
}

/// Nodes with a cable each to a bridge between them (`br` of this machine's own namespace), with
/// switches that know each other.
pub(super) fn cluster(host: &Client, count: u32) -> Vec<Node<'_>> {
    host.sh("ip link add name br type bridge && ip link set dev br up")
        .text()
        .unwrap();
    let nodes: Vec<_> = (1..=count).map(|number| Node::new(host, number)).collect();
    for n in 1..=count {
        let script = format!(
            "ip link add name u{n} type veth peer name u netns n{n} && ip link set dev u{n} master br up && \
             ip -n n{n} addr add 192.0.2.{n}/24 dev u && ip -n n{n} link set dev u up"
        );
        host.sh(script).text().unwrap();
    }
    for node in &nodes {
        node.start_remote("");
    }
    for (node, other) in nodes
        .iter()
        .flat_map(|node| nodes.iter().map(move |other| (node, other)))
    {
        if node.number != other.number {
            node.add_peer(other);
        }
    }
    nodes
}

/// Whether a tenant has an answer from an address.
pub(super) fn pings(host: &Client, tenant: &str, to: &str) -> bool {
    let ping = format!("ip netns exec {tenant} ping -c 1 -W 1 {to}");
    host.sh(ping).run().unwrap().status.success()
}

/// Bytes of a TCP stream of a second, which must have come whole.
pub(super) fn stream(host: &Client, from: &str, to: &str, address: &str) -> f64 {
    host.sh(format!(
        "ip netns exec {to} iperf3 -s -1 -D --logfile /dev/null"
    ))
    .text()
    .unwrap();
    // The server may not listen yet; iperf3's reports of failures end well.
    let run = format!(
        "while ip netns exec {from} iperf3 -J -c {address} -t 1 > /run/iperf.json; \
         grep -q 'Connection refused' /run/iperf.json; do sleep 0.1; done; cat /run/iperf.json"
    );
    let said = host.sh(run).timeout(LONG).text().unwrap();
    let report: Value = serde_json::from_str(&said).unwrap();
    let bytes = report["end"]["sum_received"]["bytes"].as_f64();
    bytes.unwrap_or_else(|| panic!("{report}"))
}
