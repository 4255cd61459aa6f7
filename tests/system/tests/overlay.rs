//! The overlay: switches in network namespaces, and what is attached to them.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

use blanket_system_tests::{native, natively, program, until};
use blanket_testbed::{Client, Host, HostBuilder};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(60);

fn nodes() -> HostBuilder {
    let switch = program("blanket-switch").unwrap();
    native("overlay")
        .unwrap()
        .inject(switch, "/usr/bin/blanket-switch")
}

/// A node: a namespace `nN` with a switch.
struct Node<'a> {
    host: &'a Client,
    number: u32,
}

impl<'a> Node<'a> {
    /// Makes the namespace, without a switch.
    fn new(host: &'a Client, number: u32) -> Self {
        let n = number;
        host.sh(format!(
            "ip netns add n{n} && ip -n n{n} link set lo up && mkdir -p /run/h{n}"
        ))
        .text()
        .unwrap();
        Self { host, number }
    }

    /// Starts the switch, and waits until it takes commands.
    fn start(&self, flags: &str) {
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
    fn start_remote(&self, flags: &str) {
        let n = self.number;
        self.start(&format!("--listen 192.0.2.{n}:4790 --interface u {flags}"));
    }

    /// Makes another node's switch known to this one.
    fn add_peer(&self, other: &Node<'_>) {
        let info: Value = serde_json::from_str(&other.net("info --json")).unwrap();
        let key = info["key"].as_str().unwrap();
        let n = other.number;
        self.net(&format!(
            "peer add n{n} --key {key} --endpoint 192.0.2.{n}:4790"
        ));
    }

    /// Kills the switch: it has no time to say anything.
    fn kill(&self) {
        let pid = format!("/run/h{}/pid", self.number);
        let kill =
            format!("p=$(cat {pid}); kill -9 $p; while [ -d /proc/$p ]; do sleep 0.05; done");
        self.host.sh(kill).text().unwrap();
    }

    fn command(&self, arguments: &str) -> String {
        let n = self.number;
        format!("ip netns exec n{n} blanket --home /run/h{n} net {arguments}")
    }

    fn try_net(&self, arguments: &str) -> Option<String> {
        self.host.sh(self.command(arguments)).text().ok()
    }

    fn net(&self, arguments: &str) -> String {
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
    fn refusal(&self, arguments: &str) -> String {
        let said = self.host.sh(self.command(arguments)).run().unwrap();
        assert!(!said.status.success(), "{arguments}: {said}");
        String::from_utf8_lossy(&said.stderr).into_owned()
    }

    /// A port, from `net port --json`.
    fn port(&self, name: &str) -> Value {
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
    fn tenant(&self, network: &str, name: &str, address: &str, flags: &str) {
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
fn cluster(host: &Client, count: u32) -> Vec<Node<'_>> {
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
fn pings(host: &Client, tenant: &str, to: &str) -> bool {
    let ping = format!("ip netns exec {tenant} ping -c 1 -W 1 {to}");
    host.sh(ping).run().unwrap().status.success()
}

/// Bytes of a TCP stream of a second, which must have come whole.
fn stream(host: &Client, from: &str, to: &str, address: &str) -> f64 {
    host.sh(format!(
        "ip netns exec {to} iperf3 -s -1 -D --logfile /dev/null"
    ))
    .text()
    .unwrap();
    let run = format!(
        "until ip netns exec {from} iperf3 -J -c {address} -t 1 > /run/iperf.json; do \
         grep -q refused /run/iperf.json || break; sleep 0.1; done; cat /run/iperf.json"
    );
    let said = host.sh(run).timeout(LONG).text().unwrap();
    let report: Value = serde_json::from_str(&said).unwrap();
    let bytes = report["end"]["sum_received"]["bytes"].as_f64();
    bytes.unwrap_or_else(|| panic!("{report}"))
}

#[test]
fn tenants_of_a_network_reach_each_other_and_nobody_else() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.net("create red --vni 9");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        node.tenant("blue", "c", "10.0.0.3/24", "--vlan 5");
        node.tenant("blue", "d", "10.0.0.4/24", "--vlan 5");
        node.tenant("red", "e", "10.0.0.5/24", "");
        assert!(pings(host, "a", "10.0.0.2"));
        assert!(pings(host, "c", "10.0.0.4"));
        for (from, to) in [("a", 3), ("c", 1), ("a", 5), ("e", 2)] {
            assert!(
                !pings(host, from, &format!("10.0.0.{to}")),
                "{from} to {to}"
            );
        }
        // Large frames stay whole: there are far fewer than packets of 1500 bytes.
        let before = node.port("a")["rx"]["frames"].as_u64().unwrap();
        let bytes = stream(host, "a", "b", "10.0.0.2");
        let frames = node.port("a")["rx"]["frames"].as_u64().unwrap() - before;
        assert!(
            bytes / (frames as f64) > 6000.0,
            "{bytes} bytes in {frames} frames"
        );
    });
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        let said = node.refusal("ls");
        assert!(said.contains("no switch runs here"), "{said}");
        node.start("");
        node.net("create blue --vni 7");
        for (wrong, why) in [
            ("create red --vni 7", "VNI 7 is the network `blue` already"),
            ("create blue --vni 8", "has VNI 7"),
            ("create -- -x", "is no name"),
            ("create red --vni 16777216", "at most 16777215"),
            ("create red --mtu 100", "576"),
            ("attach red x --tap x", "no network `red`"),
            ("attach blue x --tap a/b", "not an interface name"),
            ("attach blue x", "--tap"),
            ("detach x", "no port `x`"),
            ("rm red", "no network `red`"),
        ] {
            let said = node.refusal(wrong);
            assert!(said.contains(why), "{wrong}: {said}");
        }
        node.net("attach blue x --tap x");
        let said = node.refusal("rm blue");
        assert!(said.contains("has 1 ports; detach them first"), "{said}");
        node.net("detach x");
        node.net("rm blue");
    });
}

#[test]
fn a_switch_that_is_killed_is_as_it_was_when_it_is_started_again() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue --mtu 1400");
        node.tenant("blue", "a", "10.0.0.1/24", "--vlan 5");
        let before = node.port("a")["spec"].clone();
        node.kill();
        node.start("");
        assert_eq!(node.port("a")["spec"], before);
        assert!(node.net("ls").contains("1400"));
        node.tenant("blue", "b", "10.0.0.2/24", "--vlan 5");
    });
}

#[test]
fn tenants_on_different_nodes_are_on_one_network_and_nothing_of_it_can_be_read_between() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 3);
        for node in &nodes {
            node.net("create blue");
            let n = node.number;
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
        }
        nodes[2].net("create red");
        nodes[2].tenant("red", "r", "10.0.0.9/24", "");
        until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
        until("t1 reaches t3", || pings(host, "t1", "10.0.0.3"));
        assert!(pings(host, "t3", "10.0.0.2"));
        assert!(!pings(host, "t1", "10.0.0.9"), "another network");
        // What is large stays whole from end to end.
        let before = nodes[0].port("t1")["rx"]["frames"].as_u64().unwrap();
        let bytes = stream(host, "t1", "t2", "10.0.0.2");
        let frames = nodes[0].port("t1")["rx"]["frames"].as_u64().unwrap() - before;
        assert!(
            bytes / (frames as f64) > 6000.0,
            "{bytes} bytes in {frames} frames"
        );
        assert!(bytes > 1e6, "{bytes}");
        // Where it is was told to all, not asked of all.
        let known = nodes[2].net("mac blue");
        assert!(known.contains("peer n1"), "{known}");
    });
}

#[test]
fn flows_drop_rewrite_and_count_what_they_match() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        assert!(pings(host, "a", "10.0.0.2"));
        node.net("flow add blue priority=100,icmp,in_port=a,actions=drop");
        assert!(!pings(host, "a", "10.0.0.2"));
        let flows = node.net("flow ls blue");
        let line = flows.lines().find(|line| line.contains("icmp")).unwrap();
        assert!(line.contains("n_packets=1"), "{flows}");
        let trace = node.net("trace blue in_port=a,icmp,nw_dst=10.0.0.2");
        assert!(
            trace.contains("priority 100") && trace.contains("drop"),
            "{trace}"
        );
        // It is kept; the one for all others is, too.
        node.kill();
        node.start("");
        let again = node.net("flow ls blue");
        assert!(
            again.contains("icmp") && again.contains("NORMAL"),
            "{again}"
        );
        assert!(node.net("flow del blue icmp").contains("1 removed"));
        let said = node.refusal("flow add blue priority=1,ip,nw_dst=10.0.0.300,actions=drop");
        assert!(said.contains("column 22"), "{said}");
    });
}
