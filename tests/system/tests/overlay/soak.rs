//! Switches that work for an hour while all around them changes.

use std::time::{Duration, Instant};

use blanket_system_tests::{natively, until};
use blanket_testbed::Host;
use serde_json::Value;

use crate::node::{LONG, Node, cluster, nodes, pings};

/// How long it takes if `BLANKET_SOAK` does not say how many seconds.
const HOUR: u64 = 3600;

/// Rounds in which all that is done has been done at least once.
const CYCLE: u64 = 12;

/// Bytes of the file that streams carry.
const FILE: u64 = 6 << 20;

/// KiB of memory that a switch may have more of than after the first rounds: what allocators keep.
const GROWTH: u64 = 8 * 1024;

/// Has tenant `$1` send a file to whoever asks for it, each connection from its own process.
const SERVE: &str = r#"exec ip netns exec $1 perl -MIO::Socket -e '
$SIG{CHLD} = "IGNORE";
$all = IO::Socket::INET->new(LocalPort => 80, Listen => 64, ReuseAddr => 1) or die;
while (1) {
    $one = $all->accept or next;
    if (!fork) {
        open F, "/run/data";
        while (read F, $_, 65536) { print $one $_ or exit }
        exit;
    }
    close $one;
}'"#;

/// Has tenant `$1` fetch it from `$2`, again and again. What came, whether all of it or not, must be
/// how the file begins.
const FETCH: &str = r#"while [ ! -e /run/stop ]; do
    ip netns exec $1 timeout 30 bash -c "exec 3<>/dev/tcp/$2/80 && cat <&3" > /run/got.$1.$2 2>/dev/null
    size=$(stat -c %s /run/got.$1.$2)
    cmp -s -n $size /run/got.$1.$2 /run/data || cp /run/got.$1.$2 /run/corrupt.$1.$2
    [ $size != $3 ] || echo >> /run/whole.$1.$2
    sleep 0.1
done
echo >> /run/stopped"#;

/// How large a switch is.
#[derive(Debug, PartialEq)]
struct Tables {
    descriptors: u64,
    networks: u64,
    ports: Vec<String>,
    macs: Vec<String>,
    flows: usize,
    peers: Vec<String>,
}

/// A place with three nodes, a tenant on each, and streams between all tenants.
struct World<'a> {
    host: &'a Host,
    nodes: Vec<Node<'a>>,
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let names = list.as_array().unwrap().iter();
    let mut names: Vec<_> = names
        .map(|it| it[key].as_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

impl<'a> World<'a> {
    fn new(host: &'a Host) -> Self {
        let world = Self {
            host,
            nodes: cluster(host, 3),
        };
        for node in &world.nodes {
            let n = node.number;
            node.net("create blue");
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), &mac(n));
            world.sh(&address(n));
        }
        world.sh(&format!(
            "head -c {FILE} /dev/urandom > /run/data; touch /run/stopped"
        ));
        for n in 1..=3 {
            world.start(SERVE, &format!("serve.t{n}"), &format!("t{n}"));
        }
        for (from, to) in world.pairs() {
            until("the tenants reach each other", || {
                pings(host, &format!("t{from}"), &format!("10.0.0.{to}"))
            });
            let arguments = format!("t{from} 10.0.0.{to} {FILE}");
            world.start(FETCH, &format!("fetch.{from}.{to}"), &arguments);
        }
        world
    }

    fn pairs(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let all = (1..=3).flat_map(|from| (1..=3).map(move |to| (from, to)));
        all.filter(|(from, to)| from != to)
    }

    fn sh(&self, script: &str) -> String {
        self.host.sh(script).timeout(LONG).text().unwrap()
    }

    fn start(&self, script: &str, name: &str, arguments: &str) {
        self.host
            .sh(format!("set +e; set -- {arguments}; {script}"))
            .spawn(format!("/run/{name}.log"))
            .unwrap();
    }

    /// What changes in a round.
    fn change(&self, round: u64) {
        let node = &self.nodes[(round % 3) as usize];
        let n = node.number;
        // A port, a network and flows come and go.
        node.net("create red --vni 9");
        let extra = format!("02:00:00:00:01:0{n}");
        node.net(&format!(
            "attach red r{n} --tap r{n} --mac {extra} --ip 10.1.0.{n}"
        ));
        node.net(&format!(
            "attach blue x{n} --tap x{n} --vlan 7 --rate 10mbit"
        ));
        for flow in ["tcp,tp_dst=81,actions=drop", "udp,actions=NORMAL"] {
            node.net(&format!("flow add blue priority=7,{flow}"));
        }
        node.net(&format!("set t{n} --rate 2gbit"));
        match round % CYCLE {
            3 => self.lose(1, Duration::from_secs(3)),
            6 => self.replace(),
            9 => self.lose(2, Duration::from_millis(300)),
            11 => {
                let [one, .., three] = &self.nodes[..] else {
                    unreachable!("there are three");
                };
                one.net("peer rm n3");
                one.add_peer(three);
            }
            _ => {}
        }
        let node = &self.nodes[(round % 3) as usize];
        node.net(&format!("set t{n} --rate none"));
        node.net("flow del blue tcp");
        node.net("flow del blue udp");
        for port in [format!("r{n}"), format!("x{n}")] {
            node.net(&format!("detach {port}"));
        }
        node.net("rm red");
    }

    /// A node is cut off for a time.
    fn lose(&self, n: u32, time: Duration) {
        self.sh(&format!("ip link set dev u{n} down"));
        std::thread::sleep(time);
        self.sh(&format!("ip link set dev u{n} up"));
    }

    /// The last node's switch is killed, with its tenants' interfaces, and started again.
    fn replace(&self) {
        let node = &self.nodes[2];
        node.kill();
        node.start_remote("");
        let script = format!(
            "ip -n n3 link set dev t3 netns t3 && {} && ip -n t3 link set dev t3 up && \
             ip -n t3 addr add 10.0.0.3/24 dev t3",
            address(3)
        );
        self.sh(&script);
    }

    fn whole(&self) -> u64 {
        let said = self.sh("cat /run/whole.* 2>/dev/null | wc -l");
        said.trim().parse().unwrap()
    }

    fn no_byte_is_wrong(&self) {
        let found = self.sh("ls /run | grep corrupt || true");
        assert_eq!(found, "", "streams with wrong bytes");
    }

    fn proc(&self, node: &Node<'_>, script: &str) -> u64 {
        let n = node.number;
        let said = self.sh(&format!("cd /proc/$(cat /run/h{n}/pid); {script}"));
        said.trim().parse().unwrap()
    }

    fn memory(&self) -> Vec<u64> {
        let read = "sed -n 's/VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' status";
        let all = self.nodes.iter().map(|node| self.proc(node, read));
        all.collect()
    }

    fn tables(&self) -> Vec<Tables> {
        let of = |node: &Node<'_>| {
            let read = |what: &str| -> Value { serde_json::from_str(&node.net(what)).unwrap() };
            let mut macs = names(&read("mac blue --json"), "mac");
            // Those that interfaces had at first, by chance, are forgotten after five minutes.
            macs.retain(|mac| mac.starts_with("02:00:00"));
            Tables {
                descriptors: self.proc(node, "ls fd | wc -l"),
                networks: read("info --json")["networks"].as_u64().unwrap(),
                ports: names(&read("port --json"), "name"),
                macs,
                flows: node.net("flow ls blue").lines().count(),
                peers: names(&read("peer ls --json"), "name"),
            }
        };
        self.nodes.iter().map(of).collect()
    }
}

fn mac(n: u32) -> String {
    format!("--mac 02:00:00:00:00:0{n}")
}

/// The tenant's interface has the address that is attached.
fn address(n: u32) -> String {
    format!("ip -n t{n} link set dev t{n} address 02:00:00:00:00:0{n}")
}

/// Seconds that it takes.
fn time() -> Duration {
    let said = std::env::var("BLANKET_SOAK").ok();
    Duration::from_secs(said.map_or(HOUR, |said| said.parse().unwrap()))
}

#[test]
#[ignore = "it takes an hour"]
fn switches_are_after_an_hour_of_changes_what_they_were_before() {
    natively(nodes, |host: &Host| {
        let world = World::new(host);
        let before = world.tables();
        let end = Instant::now() + time();
        let (mut rounds, mut memory, mut carried) = (0, Vec::new(), 0);
        while Instant::now() < end || rounds < CYCLE {
            world.change(rounds);
            rounds += 1;
            if rounds.is_multiple_of(CYCLE) {
                world.no_byte_is_wrong();
                let now = world.whole();
                let memory_now = world.memory();
                println!("{rounds} rounds, {now} whole files, {memory_now:?} KiB");
                assert!(now > carried, "nothing comes through any more");
                carried = now;
                if memory.is_empty() {
                    memory = memory_now;
                }
            }
        }
        for (from, to) in world.pairs() {
            until("the tenants reach each other", || {
                pings(host, &format!("t{from}"), &format!("10.0.0.{to}"))
            });
        }
        world.sh("touch /run/stop");
        let streams = world.pairs().count();
        until("the streams have ended", || {
            let ended = world.sh("wc -l < /run/stopped");
            ended.trim().parse() == Ok(streams)
        });
        world.no_byte_is_wrong();
        let mut after = Vec::new();
        until("the tables are what they were", || {
            after = world.tables();
            let same = after == before;
            if !same {
                std::thread::sleep(Duration::from_secs(5));
                println!("{after:?}");
            }
            same
        });
        let memory_after = world.memory();
        println!("{rounds} rounds: {memory:?} KiB, then {memory_after:?}; {after:?}");
        for (before, after) in memory.into_iter().zip(memory_after) {
            assert!(after < before + GROWTH, "{before} KiB, then {after}");
        }
    });
}
