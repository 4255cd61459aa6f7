//! What nobody should send: captures of it, replayed into tenants' ports and at the tunnels.

use blanket_system_tests::{natively, until};
use blanket_testbed::Host;
use serde_json::Value;

use crate::hostile_frames::{Mac, Way, datagrams, frames_of, malformed, pcap, vxlan};
use crate::node::{LONG, Node, cluster, nodes, pings};

/// How often all of it is sent after it was sent once.
const AGAIN: u32 = 4;

/// Frames per second: what a switch that shares its processor with a test takes.
const PACE: u32 = 5000;

/// KiB that a switch may have more of after that: tables that grow and shrink.
const GROWTH: u64 = 6 * 1024;

/// Tenants that get nothing of it: of another network, and of another VLAN.
const OTHERS: [&str; 4] = ["red1", "red2", "six1", "six2"];

/// The address of a tenant's interface, or of a node's.
fn mac(host: &Host, namespace: &str, interface: &str) -> Mac {
    let read = format!("ip netns exec {namespace} cat /sys/class/net/{interface}/address");
    let text = host.sh(read).text().unwrap();
    let bytes = text.trim().split(':');
    let bytes: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// Puts a capture where it can be replayed.
fn save(host: &Host, name: &str, frames: &[Vec<u8>]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &pcap(frames)).unwrap();
    host.put(file.path(), &format!("/run/{name}.pcap")).unwrap();
}

/// Sends a capture so often; how many frames the kernel took.
fn replay(host: &Host, namespace: &str, interface: &str, name: &str, times: u32) -> u64 {
    let inside = match namespace {
        "" => String::new(),
        namespace => format!("ip netns exec {namespace} "),
    };
    let script = format!(
        "{inside}tcpreplay -q --pps={PACE} --loop={times} -i {interface} /run/{name}.pcap \
         > /run/{name}.log 2>&1 || true; sed -n 's/.*Successful packets: *//p' /run/{name}.log"
    );
    let said = host.sh(script).timeout(LONG).text().unwrap();
    said.trim().parse().unwrap_or_else(|_| {
        panic!(
            "{said}: {:?}",
            host.sh(format!("tail -n 20 /run/{name}.log")).text()
        )
    })
}

/// KiB of memory that a node's switch has.
fn memory(node: &Node<'_>) -> u64 {
    let pid = format!("/run/h{}/pid", node.number);
    let read = format!("sed -n 's/VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/$(cat {pid})/status");
    let said = node.host.sh(read).text().unwrap();
    said.trim().parse().unwrap()
}

/// Frames that have come to each of the tenants that are to get none.
fn leaked(host: &Host) -> Vec<u64> {
    let read = OTHERS.map(|name| {
        format!("ip netns exec {name} cat /sys/class/net/{name}/statistics/rx_packets; ")
    });
    let said = host.sh(read.concat()).text().unwrap();
    said.lines().map(|line| line.parse().unwrap()).collect()
}

/// What a switch has dropped for a reason, at its ports, of its peers, and otherwise.
fn dropped(node: &Node<'_>, reason: &str) -> u64 {
    let read = |command: &str| -> Value { serde_json::from_str(&node.net(command)).unwrap() };
    let info = read("info --json");
    let (ports, peers) = (read("port --json"), read("peer ls --json"));
    let all = [&ports, &peers].into_iter().filter_map(Value::as_array);
    let all = all.flatten().chain([&info]);
    all.filter_map(|it| it["drops"][reason].as_u64()).sum()
}

/// Two nodes. In `blue`, the tenants `good1` and `good2`; `evil`, who may send what it likes, and
/// `tied`, whose port is in VLAN 5 and guarded, both on the first node; those of VLAN 6 (`six`);
/// and those of `red`.
fn world(host: &Host) -> Vec<Node<'_>> {
    let nodes = cluster(host, 2);
    for node in &nodes {
        let n = node.number;
        node.net("create blue --vni 41");
        node.net("create red --vni 43");
        let tenant = |network: &str, name: &str, address: &str, flags: &str| {
            node.tenant(network, name, address, flags);
            // They say nothing by themselves.
            host.sh(format!(
                "ip netns exec {name} sysctl -qw net.ipv6.conf.all.disable_ipv6=1"
            ))
            .text()
            .unwrap();
        };
        // Its address is attached to its port.
        let (good, mac) = (format!("good{n}"), format!("02:00:00:00:00:0{n}"));
        tenant(
            "blue",
            &good,
            &format!("10.0.0.{n}/24"),
            &format!("--mac {mac}"),
        );
        host.sh(format!("ip -n {good} link set dev {good} address {mac}"))
            .text()
            .unwrap();
        tenant(
            "blue",
            &format!("five{n}"),
            &format!("10.0.5.{n}/24"),
            "--vlan 5",
        );
        tenant(
            "blue",
            &format!("six{n}"),
            &format!("10.0.6.{n}/24"),
            "--vlan 6",
        );
        tenant("red", &format!("red{n}"), &format!("10.0.0.{n}/24"), "");
        if n == 1 {
            tenant("blue", "evil", "10.0.0.66/24", "");
            tenant(
                "blue",
                "tied",
                "10.0.5.66/24",
                "--vlan 5 --mac 02:00:00:00:05:66 --ip 10.0.5.66 --guard",
            );
            let address = "ip -n tied link set dev tied address 02:00:00:00:05:66";
            host.sh(address).text().unwrap();
            for name in ["evil", "tied"] {
                host.sh(format!("ip -n {name} link set dev {name} mtu 65521"))
                    .text()
                    .unwrap();
            }
        }
    }
    until("the nodes are joined", || pings(host, "good1", "10.0.0.2"));
    nodes
}

/// Frames that a switch has seen of a port.
fn came(node: &Node<'_>, name: &str) -> u64 {
    let port = node.port(name);
    let own = ["too_big", "bad_offload"].map(|reason| port["drops"][reason].as_u64());
    port["rx"]["frames"].as_u64().unwrap() + own.into_iter().flatten().sum::<u64>()
}

/// What comes of it: nobody else gets anything, and who is well behaved is served.
fn all_is_well(host: &Host, nodes: &[Node<'_>], pids: &[String], before: &[u64]) {
    let now = &leaked(host)[..before.len()];
    assert_eq!(now, before, "frames in another network or VLAN");
    let now: Vec<_> = nodes.iter().map(pid).collect();
    assert_eq!(now, pids, "a switch was started again");
    for (from, to) in [
        ("good1", "10.0.0.2"),
        ("good2", "10.0.0.1"),
        ("five1", "10.0.5.2"),
    ] {
        until("well-behaved tenants reach each other", || {
            pings(host, from, to)
        });
    }
}

fn pid(node: &Node<'_>) -> String {
    let info: Value = serde_json::from_str(&node.net("info --json")).unwrap();
    info["pid"].to_string()
}

/// How much memory it takes to get a capture again and again.
fn again(nodes: &[Node<'_>], mut send: impl FnMut(u32)) {
    let before: Vec<_> = nodes.iter().map(memory).collect();
    send(AGAIN);
    let after: Vec<_> = nodes.iter().map(memory).collect();
    println!("{before:?} KiB before, {after:?} after");
    for (before, after) in before.into_iter().zip(after) {
        assert!(after < before + GROWTH, "{before} KiB, then {after}");
    }
}

#[test]
fn malformed_frames_of_a_tenant_reach_nobody_else_and_are_dropped_by_reason() {
    natively(nodes, |host: &Host| {
        let nodes = world(host);
        let pids: Vec<_> = nodes.iter().map(pid).collect();
        let (before, node) = (leaked(host), &nodes[0]);
        let good = mac(host, "good1", "good1");
        for name in ["evil", "tied"] {
            let frames = malformed(mac(host, name, name), good);
            save(host, name, &frames);
            let had = came(node, name);
            let sent = replay(host, name, name, name, 1);
            // The kernel itself refuses few.
            assert!(
                sent > frames.len() as u64 * 9 / 10,
                "{sent} of {}",
                frames.len()
            );
            // Those that its queue had no room for are the kernel's to count.
            let kernel =
                format!("ip netns exec {name} cat /sys/class/net/{name}/statistics/tx_dropped");
            until("all others have come", || {
                let kernel: u64 = host.sh(&kernel).text().unwrap().trim().parse().unwrap();
                came(node, name) - had + kernel >= sent
            });
            let port = node.port(name);
            println!("{name}: {sent} of {} sent, {}", frames.len(), port["drops"]);
            all_is_well(host, &nodes, &pids, &before);
            again(&nodes, |times| {
                replay(host, name, name, name, times);
            });
            all_is_well(host, &nodes, &pids, &before);
        }
        let drops = |name: &str| node.port(name)["drops"].clone();
        let (evil, tied) = (drops("evil"), drops("tied"));
        println!("in the end: {evil}, {tied}");
        for (drops, reason) in [
            (&evil, "vlan_refused"),
            (&evil, "link_local_group"),
            (&evil, "mac_spoofed"),
            (&tied, "vlan_refused"),
            (&tied, "mac_spoofed"),
            (&tied, "link_local_group"),
        ] {
            assert!(drops[reason].as_u64() > Some(0), "{reason}: {drops}");
        }
        assert!(dropped(node, "too_big") > 0);
        assert!(dropped(node, "malformed") > 0);
        // What a port may learn, and no more.
        let macs = node.net("metrics");
        let learned = macs.lines().find_map(|line| {
            line.strip_prefix("blanket_switch_port_macs{port=\"evil\",network=\"blue\"} ")
        });
        let learned: u64 = learned.unwrap().parse().unwrap();
        assert!((100..=1024).contains(&learned), "{learned}");
    });
}

#[test]
fn datagrams_of_strangers_are_dropped_by_reason_and_harm_no_tunnel() {
    natively(nodes, |host: &Host| {
        let nodes = world(host);
        let pids: Vec<_> = nodes.iter().map(pid).collect();
        let before = leaked(host);
        let (one, two) = (mac(host, "n1", "u"), mac(host, "n2", "u"));
        let addresses = |port| Way {
            from: (one, [192, 0, 2, 1], port),
            to: (two, [192, 0, 2, 2], port),
        };
        // From where the peer is, and from where nobody is.
        let mut frames = datagrams(&addresses(4790));
        let mut stranger = addresses(4790);
        (stranger.from.1, stranger.from.2) = ([192, 0, 2, 77], 999);
        frames.extend(datagrams(&stranger));
        save(host, "noise", &frames);
        replay(host, "", "br", "noise", 1);
        all_is_well(host, &nodes, &pids, &before);
        again(&nodes, |times| {
            replay(host, "", "br", "noise", times);
        });
        // What they really say, again, and then with wrong bytes.
        host.sh(
            "tcpdump -U -i u1 -w /run/real.pcap -c 40 udp port 4790 and dst 192.0.2.2 \
                 > /run/tcpdump.log 2>&1",
        )
        .spawn("/run/tcpdump.err")
        .unwrap();
        until("enough was overheard", || {
            pings(host, "good1", "10.0.0.2");
            host.sh("[ -e /run/real.pcap ] && ! pidof tcpdump > /dev/null")
                .run()
                .unwrap()
                .status
                .success()
        });
        let real = frames_of(&host.read("/run/real.pcap").unwrap());
        assert!(real.len() >= 40, "{}", real.len());
        // UDP's checksum was left to the cable.
        let real: Vec<_> = real.into_iter().map(without_checksum).collect();
        save(host, "real", &real);
        let data = |frame: &&Vec<u8>| frame.get(42) == Some(&4);
        let forged: Vec<_> = real.iter().filter(data).map(|frame| forge(frame)).collect();
        save(host, "forged", &forged);
        for (name, reason) in [("real", "replayed"), ("forged", "forged")] {
            replay(host, "", "br", name, 5);
            until("it is known for what it is", || {
                dropped(&nodes[1], reason) >= 40
            });
            all_is_well(host, &nodes, &pids, &before);
        }
        // Somebody else's tunnel, whose address anybody can use.
        nodes[1].net("peer add rack --vxlan 192.0.2.9 --vni 41");
        let mut rack = addresses(4789);
        rack.from.1 = [192, 0, 2, 9];
        let inner = malformed([2, 0x99, 0, 0, 0, 1], mac(host, "good2", "good2"));
        save(host, "rack", &vxlan(&rack, 41, &inner));
        save(host, "lost", &vxlan(&rack, 43, &inner[..200]));
        rack.from.1 = [192, 0, 2, 10];
        save(host, "unknown", &vxlan(&rack, 41, &inner[..200]));
        // It is in all VLANs of the network.
        let before = &before[..2];
        for name in ["rack", "lost", "unknown"] {
            replay(host, "", "br", name, 1);
        }
        all_is_well(host, &nodes, &pids, before);
        again(&nodes, |times| {
            replay(host, "", "br", "rack", times);
        });
        all_is_well(host, &nodes, &pids, before);
        let reasons = [
            "malformed",
            "no_session",
            "handshake",
            "replayed",
            "forged",
            "no_network",
            "stranger",
        ];
        for reason in reasons {
            let count = dropped(&nodes[1], reason);
            println!("{reason}: {count}");
            assert!(count > 0, "{reason}");
        }
    });
}

/// The same datagram with a bit turned, but for its counter, which is one that has not come.
fn forge(frame: &[u8]) -> Vec<u8> {
    let mut forged = frame.to_vec();
    let counter = 50..58;
    let mut number = [0; 8];
    number.copy_from_slice(&forged[counter.clone()]);
    let number = u64::from_be_bytes(number) + 100_000;
    forged[counter].copy_from_slice(&number.to_be_bytes());
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    forged
}

fn without_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    frame[40..42].copy_from_slice(&[0, 0]);
    frame
}
