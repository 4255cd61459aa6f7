//! Switches on machines of unlike providers, and a network between these that loses and overtakes,
//! parts, and gives a machine another address.

use std::net::Ipv4Addr;
use std::time::Duration;

use blanket_system_tests::{Pings, program, until};
use blanket_testbed::{Link, Network, Node, Provider};
use serde_json::Value;

/// Other network cards, and other MTUs: virtio, Intel's, VMware's.
const PROVIDERS: [(&str, Provider); 3] = [
    ("a", Provider::Gce),
    ("b", Provider::BareMetal),
    ("c", Provider::Vmware),
];

/// Where each listens: its place among the others, from 1.
fn underlay(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, number as u8)
}

/// Emulated machines take their time.
const LIMIT: Duration = Duration::from_secs(240);

/// Bytes of the file that is fetched, in MiB.
const FILE: u32 = 3;

/// A station whose place changes.
const MOVING: &str = "02:00:00:00:00:77";

/// Three machines with a switch each, which know each other, the network `blue`, and in it a tenant
/// `t` on each at `10.0.0.N`: a namespace with a TAP.
struct Machines {
    network: Network,
    nodes: Vec<Node>,
}

impl Machines {
    fn boot() -> Self {
        let network = Network::new(11).unwrap();
        let nodes = std::thread::scope(|scope| {
            let boot = |(at, (name, provider)): (usize, (&'static str, Provider))| {
                let network = network.clone();
                scope.spawn(move || {
                    let builder = ["blanket", "blanket-switch"].into_iter().fold(
                        Node::builder(name).provider(provider),
                        |builder, name| {
                            builder.inject(program(name).unwrap(), format!("/usr/bin/{name}"))
                        },
                    );
                    let address = format!("{}/24", underlay(at + 1));
                    builder.nic_with_address(&network, &address).boot().unwrap()
                })
            };
            let all: Vec<_> = PROVIDERS.into_iter().enumerate().map(boot).collect();
            let nodes = all.into_iter().map(|node| node.join().unwrap());
            nodes.collect::<Vec<_>>()
        });
        let machines = Self { network, nodes };
        machines.join();
        machines
    }

    fn join(&self) {
        for (at, node) in self.nodes.iter().enumerate() {
            let address = underlay(at + 1);
            let card = format!(
                "until grep -qs 1 /sys/class/net/eth0/carrier && \
                 ip addr show dev eth0 | grep -q {address}/; do sleep 0.1; done"
            );
            node.sh(card).timeout(LIMIT).text().unwrap();
            node.sh(format!(
                "exec blanket-switch --listen {address}:4790 --interface eth0"
            ))
            .spawn("/run/switch.log")
            .unwrap();
            let ready = "until blanket net info > /dev/null 2>&1; do sleep 0.1; done; \
                         blanket net create blue";
            node.sh(ready).timeout(LIMIT).text().unwrap();
        }
        let keys: Vec<String> = (0..self.nodes.len())
            .map(|at| {
                let key = self.json(at, "info --json")["key"].clone();
                key.as_str().unwrap().to_owned()
            })
            .collect();
        for (at, node) in self.nodes.iter().enumerate() {
            let number = at + 1;
            let others = (0..self.nodes.len()).filter(|other| *other != at);
            let peers: String = others
                .map(|other| {
                    let (name, key) = (PROVIDERS[other].0, &keys[other]);
                    let to = underlay(other + 1);
                    format!("blanket net peer add {name} --key {key} --endpoint {to}:4790; ")
                })
                .collect();
            let tenant = format!(
                "{peers} blanket net attach blue t --tap t; ip netns add t; \
                 ip link set dev t netns t; ip -n t link set lo up; ip -n t link set dev t up; \
                 ip -n t addr add 10.0.0.{number}/24 dev t"
            );
            node.sh(tenant).timeout(LIMIT).text().unwrap();
        }
        for other in [2, 3] {
            until("the tenants reach each other", || self.pings(0, other));
        }
    }

    fn says(&self, at: usize, script: &str) -> String {
        let said = self.nodes[at].sh(script).timeout(LIMIT).run().unwrap();
        assert!(said.status.success(), "{script}: {said}");
        String::from_utf8(said.stdout).unwrap()
    }

    fn json(&self, at: usize, command: &str) -> Value {
        let said = self.says(at, &format!("blanket net {command}"));
        serde_json::from_str(&said).unwrap()
    }

    /// What a node knows of another one.
    fn peer(&self, at: usize, name: &str) -> Value {
        let peers = self.json(at, "peer ls --json");
        let mut peers = peers.as_array().unwrap().iter();
        peers.find(|peer| peer["name"] == name).unwrap().clone()
    }

    /// What `net peer ls` shows to people.
    fn state(&self, at: usize, name: &str) -> String {
        let table = self.says(at, "blanket net peer ls");
        let mut rows = table.lines().map(str::split_whitespace);
        let row = rows.find(|row| row.clone().next() == Some(name));
        row.and_then(|mut row| row.nth(1)).unwrap().to_owned()
    }

    /// A figure of `net metrics`, by how its line begins; 0 if it is not there.
    fn figure(&self, at: usize, begin: &str) -> f64 {
        let figures = self.says(at, "blanket net metrics");
        let line = figures.lines().find_map(|line| line.strip_prefix(begin));
        line.map_or(0.0, |rest| {
            rest.split_whitespace().last().unwrap().parse().unwrap()
        })
    }

    fn pings(&self, at: usize, number: usize) -> bool {
        let ping = format!("ip netns exec t ping -c 1 -W 1 10.0.0.{number}");
        self.nodes[at].sh(ping).run().unwrap().status.success()
    }

    /// Where a node thinks that the moving station is.
    fn place(&self, at: usize) -> Option<String> {
        let macs = self.json(at, "mac blue --json");
        let mut macs = macs.as_array().unwrap().iter();
        let line = macs.find(|line| line["mac"] == MOVING)?;
        let place = if line["peer"].is_null() {
            &line["port"]
        } else {
            &line["peer"]
        };
        Some(place.as_str().unwrap().to_owned())
    }

    /// Sets what is between each two nodes.
    fn link(&self, link: Link) {
        for (one, other) in [("a", "b"), ("a", "c"), ("b", "c")] {
            self.network.set_link(one, other, link);
        }
    }

    /// Serves a file in the tenant of a node; its checksum.
    fn serve(&self, at: usize) -> String {
        self.says(
            at,
            &format!(
                "mkdir -p /run/www; dd if=/dev/urandom of=/run/www/data bs=1M count={FILE} \
                 2> /dev/null; ip netns exec t httpd -p 80 -h /run/www; \
                 sha256sum < /run/www/data"
            ),
        )
    }
}

#[test]
fn a_network_between_unlike_clouds_outlives_loss_overtaking_partitions_and_new_addresses() {
    let machines = Machines::boot();
    let sum = machines.serve(1);
    what_is_lost_and_overtaken_comes_all_the_same(&machines, &sum);
    a_partition_is_seen_and_healed(&machines);
    a_node_with_another_address_is_followed(&machines, &sum);
}

fn what_is_lost_and_overtaken_comes_all_the_same(machines: &Machines, sum: &str) {
    let before = machines.network.counters("b", "a");
    machines.link(Link {
        loss: 0.01,
        reorder: 0.03,
        ..Link::default()
    });
    let pings = "ip netns exec t ping -D -q -i 0.02 -c 300 -W 1 10.0.0.3";
    machines.nodes[0]
        .sh(format!(
            "{pings} > /run/pings 2>&1; echo over > /run/pinged"
        ))
        .spawn("/run/pings.log")
        .unwrap();
    let fetch = "ip netns exec t curl -sSf -o /run/got http://10.0.0.2/data; sha256sum < /run/got";
    assert_eq!(machines.says(0, fetch), sum);
    let counters = machines.network.counters("b", "a");
    let (lost, late) = (
        counters.dropped - before.dropped,
        counters.late - before.late,
    );
    let passed = counters.passed - before.passed;
    println!("{passed} passed, {lost} were lost, {late} were late");
    assert!(lost > 5 && late > 20, "{lost} {late}");
    // It was measured by who sent, who then sent what is large in pieces that stand alone.
    let peer = machines.peer(1, "a");
    println!("{}", peer["status"]);
    assert_eq!(peer["status"]["mode"], "per_packet", "{peer}");
    let loss = machines.figure(1, "blanket_switch_path_loss_ratio{peer=\"a\"");
    assert!(loss > 0.003 && loss < 0.2, "{loss}");
    // Before, frames were incomplete for good, and what only came late was put together.
    let of_b = machines.peer(0, "b");
    println!("{}", of_b["status"]);
    let put_together = of_b["status"]["stats"]["assembled"].as_u64().unwrap();
    let incomplete = machines.figure(0, "blanket_switch_drops_total{reason=\"incomplete\"}");
    println!("{put_together} were put together, {incomplete} were incomplete");
    assert!(incomplete > 0.0);
    let ended = "until [ -e /run/pinged ]; do sleep 0.1; done; cat /run/pings";
    let said = machines.says(0, ended);
    let pings = Pings::read(&said).unwrap();
    println!("{pings:?}");
    assert_eq!((pings.sent, pings.doubled), (300, 0), "{said}");
    assert!(pings.lost < pings.sent / 2, "{pings:?}");
    machines.link(Link::default());
}

fn a_partition_is_seen_and_healed(machines: &Machines) {
    let Machines { network, .. } = machines;
    let attach = format!("blanket net attach blue moving --tap moving --mac {MOVING}");
    machines.says(0, &attach);
    for (at, place) in [(0, "moving"), (1, "a"), (2, "a")] {
        until("all know where it is", || {
            machines.place(at).as_deref() == Some(place)
        });
    }
    // The third one is cut off, while it sends.
    machines.nodes[2]
        .sh("exec ip netns exec t ping -i 0.2 10.0.0.1")
        .spawn("/run/cut.log")
        .unwrap();
    assert!(machines.pings(2, 1));
    let before = network.counters("c", "a").dropped;
    for other in ["a", "b"] {
        network.partition("c", other);
    }
    until("it sees that it is alone", || {
        machines.state(2, "a") == "unreachable"
    });
    let probes = network.counters("c", "a").dropped - before;
    println!("after {probes} frames");
    // Three, and what was sent while nobody looked.
    assert!((3..150).contains(&probes), "{probes}");
    for at in [0, 1] {
        until("the others see it", || {
            machines.state(at, "c") == "unreachable"
        });
        assert_eq!(
            machines.figure(at, "blanket_switch_path_up{peer=\"c\""),
            0.0
        );
    }
    assert_eq!(machines.state(0, "b"), "connected");
    let dropped = "blanket_switch_drops_total{reason=\"no_session\"}";
    let had = machines.figure(2, dropped);
    until("what it sends is dropped and counted", || {
        machines.figure(2, dropped) >= had + 3.0
    });
    let had = machines.figure(0, dropped);
    assert!(!machines.pings(0, 3));
    assert!(machines.figure(0, dropped) > had);

    // It moves meanwhile.
    machines.says(0, "blanket net detach moving");
    machines.says(1, &attach);
    until("the first one knows", || {
        machines.place(0).as_deref() == Some("b")
    });
    assert_eq!(machines.place(2).as_deref(), Some("a"), "nobody told it");

    for other in ["a", "b"] {
        network.heal("c", other);
    }
    for other in [1, 2] {
        until("it reaches them again", || machines.pings(2, other));
    }
    for (at, place) in [(0, "b"), (1, "moving"), (2, "b")] {
        until("all know where it is now", || {
            machines.place(at).as_deref() == Some(place)
        });
    }
    for (at, name) in [(0, "c"), (1, "c"), (2, "a"), (2, "b")] {
        until("all see each other", || {
            machines.state(at, name) == "connected"
        });
    }
    machines.says(2, "kill -INT $(pidof ping)");
}

fn a_node_with_another_address_is_followed(machines: &Machines, sum: &str) {
    let moves = || {
        let moves = machines.peer(0, "b")["status"]["stats"]["moves"].clone();
        moves.as_u64().unwrap()
    };
    // Addresses of the paths that are used.
    let remotes = || {
        let paths = machines.peer(0, "b")["status"]["paths"].clone();
        let up = paths.as_array().unwrap().iter();
        let up = up.filter(|path| path["up"] == true);
        up.map(|path| path["remote"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(remotes(), ["10.1.0.2:4790"]);
    let before = moves();
    // One connection, all the time.
    let fetch = format!(
        "ip netns exec t curl -sSf --limit-rate {}K -o /run/got http://10.0.0.2/data; \
         sha256sum < /run/got > /run/sum.new; mv /run/sum.new /run/sum",
        FILE * 1024 / 10
    );
    machines.nodes[0]
        .sh(format!("rm -f /run/sum; {fetch}"))
        .spawn("/run/fetch.log")
        .unwrap();
    let came = || {
        machines.figure(
            0,
            "blanket_switch_peer_bytes_total{peer=\"b\",direction=\"in\"}",
        )
    };
    let more = || {
        let had = came();
        until("the stream goes on", || came() > had + 100_000.0);
    };
    more();
    let (inside, outside) = (underlay(2), Ipv4Addr::new(10, 1, 0, 102));
    machines.network.translate("b", inside, outside);
    until("it is followed", || remotes() == ["10.1.0.102:4790"]);
    more();
    machines.network.translate_no_more("b");
    // Or there are two paths for a time, if it comes back soon.
    until("it is followed back", || remotes() == ["10.1.0.2:4790"]);
    let finished = "until [ -e /run/sum ]; do sleep 0.1; done; cat /run/sum";
    assert_eq!(machines.says(0, finished), sum);
    let moved = moves() - before;
    assert!((2..10).contains(&moved), "{moved}");
    // Whom it has never called from there finds it, too.
    assert!(machines.pings(2, 2) && machines.pings(1, 3));
}
