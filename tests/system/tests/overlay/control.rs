//! OpenFlow's controllers, and security groups.

use blanket_system_tests::{natively, until};
use blanket_testbed::{Client, Host, HostBuilder};
use serde_json::Value;

use crate::node::{LONG, Node, cluster, nodes, pings};

/// A learning switch for os-ken, and Debian's Python, which has it.
const LEARNING: &str = "/usr/bin/python3 -B /usr/lib/learning_switch.py";

fn controlled() -> HostBuilder {
    let program = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../overlay-net/tests/learning_switch.py"
    );
    let front = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/overlay/tls_front.py");
    let nodes = nodes().inject(program, "/usr/lib/learning_switch.py");
    nodes.inject(front, "/usr/lib/tls_front.py")
}

/// What `ovs-ofctl` says of the node's network `blue`.
fn ofctl(node: &Node<'_>, command: &str, arguments: &str) -> String {
    let n = node.number;
    let run = format!(
        "ip netns exec n{n} ovs-ofctl -O OpenFlow13 {command} unix:/run/h{n}/blue {arguments} 2>&1"
    );
    let said = node.host.sh(run).text().unwrap();
    assert!(
        !said.contains("OFPT_ERROR"),
        "{command} {arguments}: {said}"
    );
    said
}

/// How the network `blue`'s controllers are.
fn controllers(node: &Node<'_>) -> Value {
    serde_json::from_str(&node.net("controller get blue --json")).unwrap()
}

fn is_connected(node: &Node<'_>) -> bool {
    controllers(node)["targets"][0]["connected"] == 1
}

/// Runs something in a node's namespace until the test ends; its process.
fn spawn(node: &Node<'_>, name: &str, command: &str) -> String {
    let n = node.number;
    let pid = format!("/run/h{n}/{name}.pid");
    let run = format!("echo $$ > {pid}; exec ip netns exec n{n} {command}");
    node.host
        .sh(run)
        .spawn(format!("/run/h{n}/{name}.log"))
        .unwrap();
    pid
}

fn end(host: &Client, pid: &str) {
    let kill = format!("p=$(cat {pid}); kill -9 $p; while [ -d /proc/$p ]; do sleep 0.05; done");
    host.sh(kill).text().unwrap();
}

/// Gives a tenant's interface another address.
fn address(host: &Client, tenant: &str, mac: &str) {
    host.sh(format!(
        "ip -n {tenant} link set dev {tenant} address {mac}"
    ))
    .text()
    .unwrap();
}

#[test]
fn ovs_ofctl_controls_a_network() {
    natively(controlled, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        node.net("controller set blue punix:/run/h1/blue ptcp:6653");
        let show = ofctl(&node, "show", "");
        assert!(show.contains("1(a)") && show.contains("2(b)"), "{show}");
        assert!(pings(host, "a", "10.0.0.2"));
        ofctl(
            &node,
            "add-flow",
            "priority=100,icmp,in_port=1,actions=drop",
        );
        assert!(!pings(host, "a", "10.0.0.2"));
        let dump = ofctl(&node, "dump-flows", "icmp");
        assert!(dump.contains("n_packets=1"), "{dump}");
        // What comes by one way is seen by the other.
        assert!(node.net("flow ls blue").contains("priority=100,icmp"));
        ofctl(&node, "del-flows", "icmp");
        assert!(pings(host, "a", "10.0.0.2"));
        // Meters, and what ports have counted.
        ofctl(
            &node,
            "add-meter",
            "meter=1,pktps,burst,band=type=drop,rate=1,burst_size=1",
        );
        ofctl(
            &node,
            "add-flow",
            "priority=90,icmp,in_port=1,actions=meter:1,NORMAL",
        );
        let flood = "ip netns exec a ping -q -c 20 -i 0.02 -W 1 10.0.0.2 || true";
        let said = host.sh(flood).timeout(LONG).text().unwrap();
        assert!(!said.contains(" 20 received"), "{said}");
        let meters = ofctl(&node, "meter-stats", "");
        assert!(meters.contains("meter:1"), "{meters}");
        assert!(node.port("a")["drops"]["meter"].as_u64().unwrap() > 0);
        ofctl(&node, "del-meters", "");
        let ports = ofctl(&node, "dump-ports", "1");
        assert!(!ports.contains("rx pkts=0,"), "{ports}");
        // A port that a controller takes down is down.
        ofctl(&node, "mod-port", "2 down");
        assert!(!pings(host, "a", "10.0.0.2"));
        ofctl(&node, "mod-port", "2 up");
        assert!(pings(host, "a", "10.0.0.2"));
        // By TCP, too; and all of it after a restart.
        let tcp = "ip netns exec n1 ovs-ofctl -O OpenFlow13 dump-flows tcp:127.0.0.1:6653";
        assert!(host.sh(tcp).text().unwrap().contains("NORMAL"));
        node.kill();
        node.start("");
        until("controllers are waited for again", || {
            host.sh(tcp)
                .text()
                .is_ok_and(|said| said.contains("NORMAL"))
        });
        node.net("controller del blue");
        let said = node.refusal("controller get blue");
        assert!(said.contains("has no controllers"), "{said}");
    });
}

#[test]
fn controllers_that_cannot_be_are_refused_with_what_to_do() {
    natively(controlled, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.net("create red");
        node.net("controller set blue ptcp:6653");
        for (wrong, why) in [
            ("set blue udp:1.2.3.4", "write tcp:HOST:PORT"),
            ("set blue tcp:1.2.3.4:x", "write tcp:HOST:PORT"),
            ("set green tcp:1.2.3.4", "no network `green`"),
            ("set red ptcp:6653", "take another address or port"),
            ("set red ssl:1.2.3.4", "--tls-key"),
            ("set red ssl:1.2.3.4 --tls-key /k", "--tls-c"),
            (
                "set red ssl:1.2.3.4 --tls-key /k --tls-certificate /c --tls-ca /a",
                "/c",
            ),
            ("get red", "blanket net controller set"),
            ("del red", "blanket net controller set"),
        ] {
            let said = node.refusal(&format!("controller {wrong}"));
            assert!(said.contains(why), "{wrong}: {said}");
        }
        // What was there still is.
        assert_eq!(
            controllers(&node)["targets"][0]["target"],
            "ptcp:6653:127.0.0.1"
        );
    });
}

/// A controller that learns where addresses are: os-ken's, by `target`.
fn learns(host: &Client, node: &Node<'_>, target: &str, tls: bool) {
    node.net("create blue");
    node.tenant("blue", "a", "10.0.0.1/24", "");
    node.tenant("blue", "b", "10.0.0.2/24", "");
    // Nobody is there yet, and nothing goes without.
    node.net(&format!("controller set blue {target} --fail-mode secure"));
    assert!(!pings(host, "a", "10.0.0.2"));
    until("it is told why", || {
        controllers(node)["targets"][0]["error"].is_string()
    });
    let port = if tls { 6663 } else { 6653 };
    let start = |name: &str| spawn(node, name, &format!("{LEARNING} {port}"));
    if tls {
        // os-ken's own TLS does not work with Debian's eventlet.
        let files =
            ["controller.key", "controller.pem", "ca.pem"].map(|file| format!("/run/tls/{file}"));
        let front = format!(
            "/usr/bin/python3 /usr/lib/tls_front.py 6653 {port} {}",
            files.join(" ")
        );
        spawn(node, "front", &front);
    }
    let controller = start("controller");
    until("the controller has the network", || is_connected(node));
    until("the controller lets tenants talk", || {
        pings(host, "a", "10.0.0.2")
    });
    let flows = node.net("flow ls blue");
    assert!(flows.contains("priority=1,in_port=1"), "{flows}");
    // Large frames and blank checksums are whole when a controller has them.
    let script = "ip netns exec b timeout 20 /usr/bin/python3 -c 'import socket; \
        s = socket.create_server((\"\", 80)); c = s.accept()[0]; print(len(c.recv(9, socket.MSG_WAITALL)))'";
    host.sh(script).spawn("/run/server").unwrap();
    until("a connection", || {
        let connect = "ip netns exec a timeout 5 bash -c 'echo 12345678 > /dev/tcp/10.0.0.2/80'";
        host.sh(connect).run().unwrap().status.success()
    });
    until("all of it", || {
        host.sh("cat /run/server").text().unwrap().trim() == "9"
    });
    // Without it, what it said goes on.
    end(host, &controller);
    until("it is seen to be gone", || !is_connected(node));
    assert!(pings(host, "a", "10.0.0.2"));
    node.tenant("blue", "c", "10.0.0.3/24", "");
    assert!(!pings(host, "c", "10.0.0.2"));
    assert!(node.port("c")["drops"]["no_controller"].as_u64().unwrap() > 0);
    // It comes back; a switch that is started again finds it, too.
    start("again");
    until("it is there again", || is_connected(node));
    until("it knows the new one", || pings(host, "c", "10.0.0.2"));
    node.kill();
    node.start("");
    until("it is there after a restart", || is_connected(node));
}

#[test]
fn a_controller_has_a_network_by_tcp() {
    natively(controlled, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        learns(host, &node, "tcp:127.0.0.1:6653", false);
        // Left, it has nothing to say any more.
        node.net("controller del blue");
        let flows = node.net("flow ls blue");
        assert!(
            flows.contains("NORMAL") && flows.lines().count() == 1,
            "{flows}"
        );
    });
}

#[test]
fn a_controller_has_a_network_by_tls_and_strangers_do_not() {
    natively(controlled, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        let keys = "mkdir /run/tls && cd /run/tls && echo subjectAltName=IP:127.0.0.1 > ext && \
            k='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes' && \
            for ca in ca other; do openssl req -x509 $k -keyout $ca.key -out $ca.pem -subj /CN=$ca -days 2; done && \
            for n in switch controller; do openssl req $k -keyout $n.key -out $n.csr -subj /CN=$n && \
            openssl x509 -req -in $n.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out $n.pem; done";
        host.sh(keys).text().unwrap();
        let tls = "--tls-key /run/tls/switch.key --tls-certificate /run/tls/switch.pem --tls-ca /run/tls/ca.pem";
        learns(host, &node, &format!("ssl:127.0.0.1:6653 {tls}"), true);
        // A controller of another authority is none.
        node.net(&format!(
            "controller set blue ssl:127.0.0.1:6653 --fail-mode secure {}",
            tls.replace("ca.pem", "other.pem")
        ));
        until("it is refused", || {
            let error = controllers(&node)["targets"][0]["error"].clone();
            error
                .as_str()
                .is_some_and(|error| error.contains("certificate"))
        });
        assert!(!is_connected(&node));
        // Who waits for controllers wants to see certificates, too.
        node.net(&format!("controller set blue pssl:6654 {tls}"));
        let show = |flags: &str| {
            let run = format!(
                "ip netns exec n1 ovs-ofctl -O OpenFlow13 {flags} show ssl:127.0.0.1:6654 2>&1"
            );
            host.sh(run).run().unwrap()
        };
        let own = "--private-key=/run/tls/controller.key --certificate=/run/tls/controller.pem --ca-cert=/run/tls/ca.pem";
        let said = show(own);
        assert!(
            said.status.success() && said.to_string().contains("1(a)"),
            "{said}"
        );
        host.sh("cd /run/tls && cp other.pem stranger.pem && cp other.key stranger.key")
            .text()
            .unwrap();
        assert!(
            !show(&own.replace("controller", "stranger"))
                .status
                .success()
        );
    });
}

#[test]
fn a_network_whose_controller_has_gone_bridges_if_it_is_to() {
    natively(controlled, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "b", "10.0.0.2/24", "");
        node.net("flow add blue priority=1,actions=drop");
        node.net("controller set blue tcp:127.0.0.1:6653");
        assert!(!pings(host, "a", "10.0.0.2"));
        until("it goes on without", || pings(host, "a", "10.0.0.2"));
        assert_eq!(controllers(&node)["standalone"], true);
        spawn(&node, "controller", &format!("{LEARNING} 6653"));
        until("it is there", || is_connected(&node));
        assert_eq!(controllers(&node)["standalone"], false);
        assert!(!pings(host, "a", "10.0.0.2"), "the flow holds again");
    });
}

#[test]
fn a_controller_has_one_node_of_a_network_that_spans_three() {
    natively(controlled, |host: &Host| {
        let nodes = cluster(host, 3);
        for node in &nodes {
            node.net("create blue");
            let n = node.number;
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
        }
        nodes[0].tenant("blue", "u1", "10.0.0.9/24", "");
        nodes[0].net("controller set blue tcp:127.0.0.1:6653 --fail-mode secure");
        spawn(&nodes[0], "controller", &format!("{LEARNING} 6653"));
        until("it is there", || is_connected(&nodes[0]));
        for (from, to) in [("t1", 2), ("t3", 1), ("u1", 1), ("u1", 3), ("t2", 9)] {
            until(&format!("{from} reaches {to}"), || {
                pings(host, from, &format!("10.0.0.{to}"))
            });
        }
        assert!(nodes[0].net("flow ls blue").contains("output:4294966784"));
        // Nothing goes back to where it came from, or comes twice.
        host.sh("ip -n t3 neigh flush all").text().unwrap();
        let ping = host
            .sh("ip netns exec t3 ping -c 5 -i 0.2 10.0.0.1")
            .text()
            .unwrap();
        assert!(
            ping.contains(" 5 received") && !ping.contains("DUP"),
            "{ping}"
        );
    });
}

/// Whether a tenant can connect to a port of an address.
fn connects(host: &Client, tenant: &str, address: &str, port: u16) -> bool {
    let connect = format!("ip netns exec {tenant} timeout 1 bash -c '< /dev/tcp/{address}/{port}'");
    host.sh(connect).run().unwrap().status.success()
}

/// Answers lines with themselves at a tenant's port.
fn serve(host: &Client, tenant: &str, port: u16) {
    let serve = format!(
        "exec ip netns exec {tenant} /usr/bin/python3 -c 'import socketserver as s\n\
         class Echo(s.StreamRequestHandler):\n \
         def handle(self):\n  \
         for line in self.rfile: self.wfile.write(line)\n\
         s.ThreadingTCPServer.allow_reuse_address = True\n\
         s.ThreadingTCPServer((\"\", {port}), Echo).serve_forever()'"
    );
    host.sh(serve)
        .spawn(format!("/run/{tenant}.{port}"))
        .unwrap();
    until("it serves", || {
        let ask = format!("ip netns exec {tenant} bash -c '< /dev/tcp/127.0.0.1/{port}'");
        host.sh(ask).run().unwrap().status.success()
    });
}

#[test]
fn groups_let_through_what_their_rules_say_and_its_answers() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        node.net("group create web");
        node.net("group rule add web --protocol tcp --dst-port 80 --remote-ip 10.0.0.0/30");
        node.tenant("blue", "a", "10.0.0.1/24", "");
        node.tenant("blue", "w", "10.0.0.2/24", "--group web");
        node.tenant("blue", "z", "10.0.0.9/24", "");
        for (tenant, port) in [("w", 80), ("w", 81), ("a", 80)] {
            serve(host, tenant, port);
        }
        assert!(connects(host, "a", "10.0.0.2", 80));
        assert!(!connects(host, "a", "10.0.0.2", 81), "another port");
        assert!(!connects(host, "z", "10.0.0.2", 80), "another network");
        assert!(!pings(host, "a", "10.0.0.2"), "another protocol");
        assert!(connects(host, "w", "10.0.0.1", 80), "out");
        assert!(pings(host, "w", "10.0.0.1"), "out");
        let drops = node.port("w")["drops"]["security_group"].as_u64();
        assert!(drops.unwrap() >= 3);
        // A connection that is open sees a restart of the switch through.
        let client = "ip netns exec a bash -c 'exec 3<>/dev/tcp/10.0.0.2/80; echo one >&3; read x <&3; \
             echo $x; until [ -e /run/go ]; do sleep 0.1; done; echo two >&3; read -t 40 x <&3; echo $x'";
        host.sh(client).spawn("/run/client").unwrap();
        let said = || host.sh("cat /run/client").text().unwrap();
        until("the connection is open", || said().contains("one"));
        node.kill();
        node.start("");
        for (tenant, address) in [
            ("a", "10.0.0.1/24"),
            ("w", "10.0.0.2/24"),
            ("z", "10.0.0.9/24"),
        ] {
            let script = format!(
                "ip -n n1 link set dev {tenant} netns {tenant} && ip -n {tenant} link set dev {tenant} up && \
                 ip -n {tenant} addr add {address} dev {tenant}"
            );
            host.sh(script).text().unwrap();
        }
        host.sh("touch /run/go").text().unwrap();
        until("the connection goes on", || said().contains("two"));
        assert!(connects(host, "a", "10.0.0.2", 80));
        assert!(
            !connects(host, "a", "10.0.0.2", 81),
            "the group is as it was"
        );
        let groups = node.net("group ls");
        assert!(
            groups.contains("--ingress --protocol tcp --dst-port 80 --remote-ip 10.0.0.0/30"),
            "{groups}"
        );
        // Rules change while ports are there, and ports their groups.
        node.net("group rule add web --protocol icmp");
        assert!(pings(host, "a", "10.0.0.2"));
        node.net("group rule del web --protocol icmp");
        assert!(!pings(host, "a", "10.0.0.2"));
        node.net("group set w");
        assert!(connects(host, "z", "10.0.0.2", 81));
        node.net("group set w web");
        assert!(!connects(host, "z", "10.0.0.2", 81));
        // Without their group, ports are closed.
        let said = node.refusal("group rm web");
        assert!(
            said.contains("1 ports are in") && said.contains("--force"),
            "{said}"
        );
        node.net("group rm web --force");
        assert!(!connects(host, "a", "10.0.0.2", 80) && !connects(host, "w", "10.0.0.1", 80));
        node.kill();
        node.start("");
        assert!(
            node.net("group ls")
                .contains("not there: its ports are closed")
        );
        for (wrong, why) in [
            (
                "group rule add web --protocol tcp",
                "no security group `web`",
            ),
            ("group set w web", "no security group `web`"),
            ("group set nobody", "no port `nobody`"),
            (
                "attach blue y --tap y --group web",
                "no security group `web`",
            ),
            ("group create -- -x", "is no name"),
            ("group rule add web", "lets everything"),
            (
                "group rule add web --protocol icmp --dst-port 80",
                "tcp, udp or sctp",
            ),
            (
                "group rule add web --remote-ip 10.0.0.0/40",
                "like 10.0.0.0/8",
            ),
        ] {
            let said = node.refusal(wrong);
            assert!(said.contains(why), "{wrong}: {said}");
        }
    });
}

#[test]
fn members_of_a_group_are_known_on_other_nodes() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 2);
        let mac = |n: u32| format!("02:00:00:00:00:0{n}");
        for node in &nodes {
            node.net("create blue");
        }
        nodes[0].net("group create front");
        nodes[1].net("group create web");
        nodes[1].net("group rule add web --protocol tcp --dst-port 80 --remote-group front");
        let attached = |n: u32| format!("--mac {} --ip 10.0.0.{n} --guard", mac(n));
        for (node, name, n, group) in [
            (0, "f", 1, "--group front"),
            (0, "s", 2, ""),
            (1, "w", 3, "--group web"),
        ] {
            let flags = format!("{} {group}", attached(n));
            nodes[node].tenant("blue", name, &format!("10.0.0.{n}/24"), &flags);
            address(host, name, &mac(n));
        }
        serve(host, "w", 80);
        until("a member reaches it", || {
            connects(host, "f", "10.0.0.3", 80)
        });
        assert!(!connects(host, "s", "10.0.0.3", 80), "no member");
        nodes[0].net("group set s front");
        until("a new member reaches it", || {
            connects(host, "s", "10.0.0.3", 80)
        });
        nodes[0].net("group set f");
        until("who has left does not", || {
            !connects(host, "f", "10.0.0.3", 80)
        });
        assert!(connects(host, "s", "10.0.0.3", 80));
    });
}
