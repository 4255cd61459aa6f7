//! One address for many servers.

use blanket_system_tests::{natively, until};
use blanket_testbed::{Client, Host};
use serde_json::Value;

use crate::node::{LONG, Node, cluster, nodes, pings};

/// Answers each line of each connection with its name and the line.
const SERVER: &str = r#"
import socketserver, sys
class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(sys.argv[1].encode() + b" " + line)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 100
Server((sys.argv[2], 80), Lines).serve_forever()
"#;

/// Opens connections, and whenever a line comes says on each who serves it; a reset ends it.
const CLIENT: &str = r#"
import json, socket, sys
connections = []
for _ in range(int(sys.argv[2])):
    connection = socket.create_connection((sys.argv[1], 80), timeout=20)
    connections.append((connection, connection.makefile("rb")))
for line in sys.stdin:
    names = []
    for connection, answers in connections:
        connection.sendall(line.encode())
        names.append(answers.readline().split()[0].decode())
    print(json.dumps(names), flush=True)
"#;

const VIP: &str = "10.0.0.100";

/// A tenant that serves the address: it has it on its loopback interface, and does not say so.
fn serve(host: &Client, name: &str) {
    let script = format!(
        "ip -n {name} addr add {VIP}/32 dev lo && \
         ip netns exec {name} sh -c 'echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore; \
         echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce' && cat > /run/server.py <<'END'\n{SERVER}\nEND"
    );
    host.sh(script).text().unwrap();
    let run = format!("exec ip netns exec {name} python3 /run/server.py {name} {VIP}");
    host.sh(run).spawn(format!("/run/{name}.log")).unwrap();
    until("the server listens", || {
        let listens = format!("ip netns exec {name} ss -Htln sport = :80 | grep -q {VIP}");
        host.sh(listens).run().unwrap().status.success()
    });
}

/// A tenant's open connections to the address.
struct Connections<'a> {
    host: &'a Client,
    name: &'a str,
    asked: usize,
}

impl<'a> Connections<'a> {
    fn open(host: &'a Client, tenant: &str, name: &'a str, count: usize) -> Self {
        let script = format!(
            "cat > /run/client.py <<'END'\n{CLIENT}\nEND\nmkfifo /run/{name}.in; \
             sleep 1000 > /run/{name}.in & \
             exec ip netns exec {tenant} python3 /run/client.py {VIP} {count} \
             < /run/{name}.in > /run/{name}.out 2>&1"
        );
        host.sh(script).spawn(format!("/run/{name}.log")).unwrap();
        Self {
            host,
            name,
            asked: 0,
        }
    }

    /// Who serves each of them: it fails if one was reset.
    fn ask(&mut self) -> Vec<String> {
        let name = self.name;
        self.asked += 1;
        let wait = format!(
            "until [ -p /run/{name}.in ]; do sleep 0.05; done; echo hello > /run/{name}.in; \
             for i in $(seq 300); do [ $(wc -l < /run/{name}.out) -ge {0} ] && break; sleep 0.1; done; \
             sed -n {0}p /run/{name}.out",
            self.asked
        );
        let said = self.host.sh(wait).timeout(LONG).text().unwrap();
        let names: Result<Vec<String>, _> = serde_json::from_str(&said);
        names.unwrap_or_else(|_| {
            let all = self.host.sh(format!("cat /run/{name}.out")).text();
            panic!("no answers: {said} {all:?}")
        })
    }
}

fn has_python(host: &Client) -> bool {
    let has = host.sh("python3 --version").run().unwrap();
    let has = has.status.success();
    if !has {
        println!("skipped, because python3 is not installed");
    }
    has
}

#[test]
fn a_server_is_drained_under_connections_and_none_is_reset() {
    natively(nodes, |host: &Host| {
        if !has_python(host) {
            return;
        }
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "c", "10.0.0.1/24", "");
        let mac = |n: u32| format!("02:00:00:00:00:0{n}");
        for n in 2..5 {
            let (name, mac) = (format!("s{n}"), mac(n));
            let address = format!("10.0.0.{n}/24");
            node.tenant("blue", &name, &address, &format!("--mac {mac}"));
            host.sh(format!("ip -n {name} link set dev {name} address {mac}"))
                .text()
                .unwrap();
            serve(host, &name);
            assert!(pings(host, "c", &format!("10.0.0.{n}")));
        }
        node.net(&format!("vip create blue web {VIP}:80"));
        // By a port with an attached address, and by addresses.
        node.net("vip backend add web s2");
        node.net(&format!("vip backend add web {}", mac(3)));
        node.net(&format!("vip backend add web {}", mac(4)));
        let mut old = Connections::open(host, "c", "old", 24);
        let served = old.ask();
        for name in ["s2", "s3", "s4"] {
            assert!(served.iter().any(|server| server == name), "{served:?}");
        }
        // Answers come from the servers directly, under the address.
        assert!(node.net("vip ls").contains("33."), "{}", node.net("vip ls"));
        node.net("vip backend drain web s2");
        let listed = node.net("vip ls");
        assert!(listed.contains("draining"), "{listed}");
        assert_eq!(old.ask(), served, "connections stay");
        let mut new = Connections::open(host, "c", "new", 24);
        let newly = new.ask();
        assert!(newly.iter().all(|server| server != "s2"), "{newly:?}");
        // It gets new ones again; those that are stay.
        node.net("vip backend add web s2");
        assert_eq!(old.ask(), served);
        assert_eq!(new.ask(), newly);
        // One that is removed keeps what it has for a while, too.
        node.net(&format!("vip backend rm web {}", mac(4)));
        assert_eq!(old.ask(), served);
        assert_eq!(new.ask(), newly);
        for (wrong, why) in [
            (format!("vip create blue other {VIP}:80"), "see `web`"),
            ("vip backend add web x".to_owned(), "no port `x`"),
            ("vip backend add web c".to_owned(), "no address is attached"),
            (
                "vip backend drain web 02:00:00:00:00:99".to_owned(),
                "no server",
            ),
            ("vip rm x".to_owned(), "no virtual address `x`"),
        ] {
            let said = node.refusal(&wrong);
            assert!(said.contains(why), "{wrong}: {said}");
        }
        node.net("vip rm web");
        let gone = node.net("vip ls --json");
        assert_eq!(gone.trim(), "[]");
    });
}

#[test]
fn an_address_is_served_from_several_nodes_and_again_after_a_restart() {
    natively(nodes, |host: &Host| {
        if !has_python(host) {
            return;
        }
        let nodes = cluster(host, 2);
        for node in &nodes {
            node.net("create blue");
        }
        let mac = |n: u32| format!("02:00:00:00:00:0{n}");
        // The client and a server here, two servers there.
        nodes[0].tenant("blue", "c", "10.0.0.1/24", "");
        for n in 2..5 {
            let (name, mac) = (format!("s{n}"), mac(n));
            let node = &nodes[usize::from(n != 2)];
            node.tenant(
                "blue",
                &name,
                &format!("10.0.0.{n}/24"),
                &format!("--mac {mac}"),
            );
            host.sh(format!("ip -n {name} link set dev {name} address {mac}"))
                .text()
                .unwrap();
            serve(host, &name);
        }
        for n in 2..5 {
            until("the client reaches the server", || {
                pings(host, "c", &format!("10.0.0.{n}"))
            });
        }
        for node in &nodes {
            node.net(&format!("vip create blue web {VIP}:80"));
            for n in 2..5 {
                node.net(&format!("vip backend add web {}", mac(n)));
            }
        }
        let mut old = Connections::open(host, "c", "old", 24);
        let served = old.ask();
        for name in ["s2", "s3", "s4"] {
            assert!(served.iter().any(|server| server == name), "{served:?}");
        }
        // One there drains, then the one here: connections are sent on to where they were, also
        // from one node to the other and back.
        for n in [3, 2] {
            for node in &nodes {
                node.net(&format!("vip backend drain web {}", mac(n)));
            }
            assert_eq!(old.ask(), served, "s{n} drains");
            if n == 3 {
                for node in &nodes {
                    node.net(&format!("vip backend add web {}", mac(n)));
                }
                assert_eq!(old.ask(), served, "s{n} is used again");
            }
        }
        let mut new = Connections::open(host, "c", "new", 12);
        let newly = new.ask();
        assert!(newly.iter().all(|server| server != "s2"), "{newly:?}");
        assert_eq!(old.ask(), served);
        // A switch that is killed has the same servers again, and the same ones drain.
        let listed = |node: &Node<'_>| -> Value {
            serde_json::from_str(&node.net("vip ls --json")).unwrap()
        };
        let before = listed(&nodes[0]);
        nodes[0].kill();
        nodes[0].start_remote("");
        assert_eq!(listed(&nodes[0]), before);
    });
}
