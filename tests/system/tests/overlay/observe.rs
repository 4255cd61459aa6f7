//! Captures, mirrors, figures, and pings.

use blanket_system_tests::{natively, until};
use blanket_testbed::Host;

use crate::node::{LONG, Node, cluster, nodes, pings, stream};

/// Runs `blanket net capture` in the background until `capture` has been `done`; what it said.
fn captured(node: &Node<'_>, arguments: &str, done: impl FnOnce()) -> String {
    let said = format!("/run/capture{}", node.number);
    let command = node.command(&format!("capture {arguments}"));
    let script = format!("echo $$ > {said}.pid; exec {command} > {said} 2> {said}.err");
    // Another one's, that has ended.
    let clean = format!("rm -f {said} {said}.*");
    node.host.sh(clean).text().unwrap();
    node.host.sh(script).spawn(format!("{said}.log")).unwrap();
    until("the capture has begun", || {
        let begun = format!("[ -s {said} ] || grep -q capturing {said}.err");
        node.host.sh(begun).run().unwrap().status.success()
    });
    done();
    // It ends with its summary.
    let end = format!(
        "sleep 0.3; kill -INT $(cat {said}.pid); \
         while [ -d /proc/$(cat {said}.pid) ]; do sleep 0.05; done; cat {said}.err"
    );
    node.host.sh(end).timeout(LONG).text().unwrap()
}

#[test]
fn a_capture_shows_what_tcpdump_shows() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        assert!(pings(host, "a", "10.0.0.2"));
        // As lines.
        let said = captured(&node, "a icmp", || {
            assert!(pings(host, "a", "10.0.0.2"));
        });
        let lines = host.sh("cat /run/capture1").text().unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(
            lines.contains("a In  IP 10.0.0.1 > 10.0.0.2: ICMP echo request"),
            "{lines}"
        );
        assert!(
            lines.contains("a Out IP 10.0.0.2 > 10.0.0.1: ICMP echo reply"),
            "{lines}"
        );
        assert!(said.contains("2 frames captured"), "{said}");
        assert!(said.contains("0 frames left out"), "{said}");
        // As a file that tcpdump reads: a stream of large frames, whole.
        let tcpdump = host.sh("command -v tcpdump").run().unwrap();
        if !tcpdump.status.success() {
            println!("the rest is skipped, because tcpdump is not installed");
            return;
        }
        let said = captured(&node, "port:b tcp -w - -Q out", || {
            stream(host, "a", "b", "10.0.0.2");
        });
        let read = "tcpdump -nn -r /run/capture1 2> /run/tcpdump.err | tee /run/lines | wc -l";
        let lines: u64 = host.sh(read).text().unwrap().trim().parse().unwrap();
        let (complaint, first) = (
            host.sh("cat /run/tcpdump.err").text().unwrap(),
            host.sh("head -n 1 /run/lines").text().unwrap(),
        );
        assert!(lines > 10, "{lines} lines: {complaint}");
        assert!(!complaint.contains("truncated"), "{complaint}");
        assert!(
            first.contains("IP 10.0.0.1.") && first.contains("> 10.0.0.2.5201: Flags [S]"),
            "{first}"
        );
        assert!(
            said.contains(&format!("{lines} frames captured")),
            "{lines} lines, and {said}"
        );
        // A pipe, and so many frames.
        let pipe = node.command("capture blue arp -w - -c 2 2>/dev/null")
            + " | tcpdump -nn -e -r - 2>/dev/null";
        let script = format!(
            "({pipe}) > /run/piped & p=$!; while kill -0 $p 2> /dev/null; do \
             ip netns exec a ip neigh flush all; ip netns exec a ping -c 1 10.0.0.2 > /dev/null; \
             sleep 0.2; done; cat /run/piped"
        );
        let lines = host.sh(script).timeout(LONG).text().unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(lines.contains("ethertype ARP"), "{lines}");
        let said = node.refusal("capture nobody");
        assert!(said.contains("no port, network or peer"), "{said}");
        let said = node.refusal("capture a tcp,tp_dst=x");
        assert!(said.contains("column"), "{said}");
        // Why something is dropped.
        node.net("flow add blue priority=100,icmp,actions=drop");
        captured(&node, "--drops", || {
            assert!(!pings(host, "a", "10.0.0.2"));
        });
        let lines = host.sh("cat /run/capture1").text().unwrap();
        assert!(lines.contains("(dropped: flow_drop)"), "{lines}");
    });
}

#[test]
fn tunnels_are_captured_and_networks_mirrored() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 2);
        for node in &nodes {
            node.net("create blue");
            let n = node.number;
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
        }
        until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
        captured(&nodes[0], "n2 icmp", || {
            assert!(pings(host, "t1", "10.0.0.2"));
        });
        let lines = host.sh("cat /run/capture1").text().unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(
            lines.contains("peer:n2 Out") && lines.contains("peer:n2 In"),
            "{lines}"
        );
        // A mirror of the network, to a port of another one; it is there again after a restart.
        let node = &nodes[0];
        node.net("create watchers");
        node.tenant("watchers", "w", "192.0.2.99/24", "");
        node.net("mirror add m --network blue --to w");
        node.kill();
        host.sh("ip netns del w; ip netns del t1").text().unwrap();
        node.start_remote("");
        for (name, address) in [("w", "192.0.2.99/24"), ("t1", "10.0.0.1/24")] {
            let script = format!(
                "ip netns add {name} && ip -n n1 link set dev {name} netns {name} && \
                 ip -n {name} link set dev {name} up && ip -n {name} addr add {address} dev {name}"
            );
            host.sh(script).text().unwrap();
        }
        let mirrors = node.net("mirror ls");
        assert!(mirrors.contains("network blue  in   w   up"), "{mirrors}");
        until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
        let packets = "cat /sys/class/net/w/statistics/rx_packets";
        let count = || -> u64 {
            let said = host.sh(format!("ip netns exec w {packets}")).text();
            said.unwrap().trim().parse().unwrap()
        };
        let before = count();
        assert!(pings(host, "t1", "10.0.0.2"));
        until("both are mirrored", || count() >= before + 2);
        node.net("mirror rm m");
        let before = count();
        assert!(pings(host, "t1", "10.0.0.2"));
        assert_eq!(count(), before);
    });
}

#[test]
fn figures_rates_and_pings_tell_how_it_is() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 2);
        for node in &nodes {
            node.net("create blue");
            let n = node.number;
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
        }
        let node = &nodes[0];
        // Through the tunnel.
        until("n2 is connected", || node.try_net("ping n2 -c 1").is_some());
        let said = node.net("ping n2 -c 3 -i 0.05 -s 1000");
        assert!(said.contains("1000 bytes from n2: seq=3 time="), "{said}");
        assert!(said.contains("3 sent, 3 received, 0% loss"), "{said}");
        assert!(said.contains("rtt min/avg/max/mdev"), "{said}");
        // Whoever has an address, here and there.
        let mac = |tenant: &str| {
            let path = format!("ip netns exec {tenant} cat /sys/class/net/{tenant}/address");
            host.sh(path).text().unwrap().trim().to_owned()
        };
        for (tenant, address) in [("t1", "10.0.0.1"), ("t2", "10.0.0.2")] {
            let said = node.net(&format!("ping blue {address} -c 2 -i 0.05"));
            let is_at = format!("{address} is at {}: seq=2", mac(tenant));
            assert!(said.contains(&is_at), "{said}");
        }
        let link = "ip -n t2 -6 -o addr show dev t2 scope link -tentative";
        until("t2 has an IPv6 address", || {
            host.sh(link).text().unwrap().contains("fe80")
        });
        let six = host.sh(link).text().unwrap();
        let six = six
            .split_whitespace()
            .find(|word| word.starts_with("fe80"))
            .unwrap();
        let six = six.split('/').next().unwrap();
        let said = node.net(&format!("ping blue {six} -c 1"));
        assert!(said.contains(&mac("t2")), "{said}");
        let gone = node.command("ping blue 10.0.0.77 -c 1 -W 0.3");
        let gone = host.sh(gone).run().unwrap();
        let said = String::from_utf8_lossy(&gone.stdout).into_owned();
        assert!(
            !gone.status.success() && said.contains("100% loss"),
            "{said}"
        );
        // Figures, by the command and as a scraper gets them.
        let figures = node.net("metrics");
        for begin in [
            "blanket_switch_peer_up{peer=\"n2\"} 1",
            "blanket_switch_path_rtt_seconds{peer=\"n2\"",
            "blanket_switch_port_frames_total{port=\"t1\",network=\"blue\",direction=\"in\"} ",
        ] {
            assert!(figures.contains(begin), "{begin}: {figures}");
        }
        let scraped = host
            .sh("curl -sSi --unix-socket /run/h1/blanket-switch.sock http://switch/metrics")
            .text()
            .unwrap();
        assert!(scraped.contains("version=0.0.4"), "{scraped}");
        // Rates while something goes on.
        host.sh("ip netns exec t2 iperf3 -s -1 -D --logfile /dev/null; \
             until ip netns exec t1 iperf3 -c 10.0.0.2 -t 4; do sleep 0.1; done > /dev/null 2>&1 &")
            .text()
            .unwrap();
        until("there is traffic", || {
            let said = node.net("top --once --json --delay 0.3");
            let lines: serde_json::Value = serde_json::from_str(&said).unwrap();
            let lines = lines.as_array().unwrap();
            let rate = |name: &str, what: &str| {
                let line = lines.iter().find(|line| line["name"] == name);
                line.unwrap()[what].as_f64().unwrap()
            };
            rate("t1", "in_bits_per_second") > 1e6 && rate("n2", "out_bits_per_second") > 1e6
        });
        let said = node.net("top --once");
        assert!(said.contains("IN bit/s") && said.contains("peer"), "{said}");
    });
}

#[test]
fn options_of_ports_hold_are_changed_and_stay() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "a", "10.0.0.1/24", "--rate 16mbit --max-macs 2");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        assert!(pings(host, "a", "10.0.0.2"));
        // 2 MB in a second, and what comes at once; without the limit it is far more.
        let limited = stream(host, "a", "b", "10.0.0.2");
        assert!((2e5..4e6).contains(&limited), "{limited}");
        node.net("set a --rate none");
        let free = stream(host, "a", "b", "10.0.0.2");
        assert!(free > 4.0 * limited, "{free} and {limited}");
        // Broadcasts: ten, and ten in a second.
        node.net("set a --storm-broadcast 10");
        let flood =
            "ip netns exec a ping -b -c 60 -i 0.01 -W 0.1 10.0.0.255 > /dev/null 2>&1 || true";
        host.sh(flood).timeout(LONG).text().unwrap();
        let dropped = node.port("a")["drops"]["storm_broadcast"].as_u64();
        assert!(dropped.is_some_and(|dropped| dropped > 5), "{dropped:?}");
        // What fits a port: packets of others are told, and connections from the first packet on.
        node.net("set b --mtu 1000 --clamp-mss");
        let said = host
            .sh("ip netns exec a ping -c 1 -W 1 -M do -s 1200 10.0.0.2 2>&1")
            .run()
            .unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(
            said.contains("mtu = 1000") || said.contains("mtu=1000"),
            "{said}"
        );
        assert!(stream(host, "a", "b", "10.0.0.2") > 1e5);
        // Customers' VLANs cross in a service VLAN.
        node.net("set b --mtu none --clamp-mss=false");
        let mut tagged = true;
        for (port, other) in [("a", "1"), ("b", "2")] {
            node.net(&format!("set {port} --qinq 100"));
            let vlan = format!(
                "ip -n {port} link add link {port} name v type vlan id 7 && \
                 ip -n {port} addr add 10.7.0.{other}/24 dev v && ip -n {port} link set dev v up"
            );
            tagged &= host.sh(vlan).run().unwrap().status.success();
        }
        if tagged {
            until("customers' VLAN 7", || pings(host, "a", "10.7.0.2"));
        } else {
            println!("without tags, because this kernel has no VLANs");
        }
        assert!(pings(host, "a", "10.0.0.2"));
        node.net("set b --vlan 0");
        assert!(!pings(host, "a", "10.0.0.2"));
        node.net("set a --weight 3 --isolated");
        let ports = node.net("port");
        for word in [
            "qinq 100",
            "weight 3",
            "isolated",
            "2 macs",
            "broadcast 10/s",
        ] {
            assert!(ports.contains(word), "{word}: {ports}");
        }
        let before = node.port("a")["spec"].clone();
        node.kill();
        node.start("");
        assert_eq!(node.port("a")["spec"], before);
        for (wrong, why) in [
            ("set x --weight 2", "no port `x`"),
            ("set a --rate fast", "100mbit"),
            ("set b --burst 100000", "--rate"),
            ("set a --qinq 5 --vlan 3", "cannot be used with"),
        ] {
            let said = node.refusal(wrong);
            assert!(said.contains(why), "{wrong}: {said}");
        }
    });
}
