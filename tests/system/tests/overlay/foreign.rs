//! The kernel's own tunnels as peers.

use blanket_system_tests::{natively, until};
use blanket_testbed::{Client, Host};

use crate::node::{Node, cluster, nodes, pings, stream};

/// A node `n1` with a tenant `t1` in the network 42, and the kernel's device of a kind (`t2`, with
/// the tenant's address) in a namespace `t2`, joined by a cable. The node's switch.
///
/// The cable's ends leave checksums and segmentation to each other, within tunnels too; who takes
/// datagrams from a socket does not see that. What leaves `t2` is as it would be on a wire.
fn joined<'a>(host: &'a Client, device: &str) -> Node<'a> {
    let node = Node::new(host, 1);
    let script = format!(
        "ip netns add t2 && ip -n t2 link set lo up && \
         ip link add name u netns n1 type veth peer name u netns t2 && \
         ip -n n1 addr add 192.0.2.1/24 dev u && ip -n n1 link set dev u up && \
         ip -n t2 addr add 192.0.2.2/24 dev u && ip -n t2 link set dev u up && \
         ip netns exec t2 ethtool -K u tx off > /dev/null && \
         ip -n t2 link add name t2 type {device} && \
         ip -n t2 addr add 10.0.0.2/24 dev t2 && ip -n t2 link set dev t2 up"
    );
    host.sh(script).text().unwrap();
    node.start_remote("");
    node.net("create blue --vni 42");
    node.tenant("blue", "t1", "10.0.0.1/24", "");
    node
}

/// Whether a packet of so many bytes in all, which must not be cut, has an answer.
fn fits(host: &Client, bytes: usize) -> bool {
    let ping = format!(
        "ip netns exec t1 ping -c 1 -W 1 -M do -s {} 10.0.0.2",
        bytes - 28
    );
    host.sh(ping).run().unwrap().status.success()
}

fn both_ways(host: &Client, node: &Node<'_>) {
    until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
    assert!(pings(host, "t2", "10.0.0.1"));
    // What fits is what the kernel's device has, and the tenant is told.
    assert!(fits(host, 1450));
    let too_big = host
        .sh("ip netns exec t1 ping -c 1 -W 1 -M do -s 1423 10.0.0.2 2>&1")
        .run()
        .unwrap();
    let said = String::from_utf8_lossy(&too_big.stdout).into_owned();
    assert!(
        said.contains("mtu = 1450") || said.contains("mtu=1450"),
        "{said}"
    );
    assert!(fits(host, 1450));
    assert!(stream(host, "t1", "t2", "10.0.0.2") > 1e6);
    assert!(stream(host, "t2", "t1", "10.0.0.1") > 1e6);
    let macs = node.net("mac blue");
    assert!(macs.contains("peer k"), "{macs}");
    let peers = node.net("peer ls");
    assert!(peers.contains("NOT ENCRYPTED"), "{peers}");
}

#[test]
fn the_kernels_vxlan_is_a_peer() {
    natively(nodes, |host: &Host| {
        let device = "vxlan id 42 remote 192.0.2.1 local 192.0.2.2 dstport 4789 dev u";
        let node = joined(host, device);
        let add = node.command("peer add k --vxlan 192.0.2.2 --vni 42");
        let said = host.sh(add).run().unwrap();
        let warned = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.success(), "{said}");
        assert!(warned.contains("VXLAN IS NOT ENCRYPTED"), "{warned}");
        both_ways(host, &node);
        // It is again when the switch is, and nobody else is in the network.
        let again = "peer add other --vxlan 192.0.2.2:4789 --vni 42";
        assert!(
            node.refusal(again)
                .contains("another peer has that address")
        );
        assert!(
            node.refusal("peer add other --vxlan 192.0.2.3 --vni 0")
                .contains("VNI 0")
        );
        node.net("peer rm k");
        assert!(!pings(host, "t2", "10.0.0.1"));
        let info = node.net("info");
        assert!(info.contains("dropped, stranger"), "{info}");
        node.net("peer add k --vxlan 192.0.2.2 --vni 7,42");
        node.kill();
        host.sh("ip netns del t1").text().unwrap();
        node.start_remote("");
        node.net("detach t1");
        node.tenant("blue", "t1", "10.0.0.1/24", "");
        until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
    });
}

#[test]
fn the_kernels_geneve_is_a_peer() {
    natively(nodes, |host: &Host| {
        let device = "geneve id 42 remote 192.0.2.1 dstport 6081";
        let known = host.sh("ip link add name g type geneve id 1 remote 192.0.2.9");
        if !known.run().unwrap().status.success() {
            println!("skipped, because this kernel has no Geneve");
            return;
        }
        let node = joined(host, device);
        node.net("peer add k --geneve 192.0.2.2 --vni 42");
        both_ways(host, &node);
    });
}

#[test]
fn switches_are_joined_by_geneve_and_only_what_fits_goes() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 2);
        for (node, other) in [(&nodes[0], 2), (&nodes[1], 1)] {
            let n = node.number;
            node.net(&format!("peer rm n{other}"));
            node.net("create blue --vni 42");
            node.net("create red --vni 43");
            node.net(&format!("peer add k --geneve 192.0.2.{other} --vni 42"));
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
            node.tenant("red", &format!("r{n}"), &format!("10.0.0.{n}/24"), "");
        }
        both_ways(host, &nodes[0]);
        assert!(
            !pings(host, "r1", "10.0.0.2"),
            "a network that the peer is not in"
        );
        let capture = nodes[0].command("capture peer:k icmp -c 2");
        let lines = format!(
            "({capture} 2> /dev/null) & c=$!; sleep 0.5; \
             ip netns exec t1 ping -c 1 10.0.0.2 > /dev/null; wait $c"
        );
        let lines = host.sh(lines).text().unwrap();
        assert!(
            lines.contains("peer:k Out IP 10.0.0.1 > 10.0.0.2"),
            "{lines}"
        );
    });
}
