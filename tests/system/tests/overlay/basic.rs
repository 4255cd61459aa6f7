//! Networks, tenants, tunnels and flows.

use blanket_system_tests::{natively, until};
use blanket_testbed::Host;

use crate::node::{Node, cluster, nodes, pings, stream};

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
