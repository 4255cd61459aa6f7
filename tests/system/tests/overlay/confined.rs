//! What is left to a switch once it is set up.

use blanket_system_tests::{natively, until};
use blanket_testbed::{Client, Host};
use serde_json::Value;

use crate::node::{Node, cluster, nodes, pings};

/// `CAP_CHOWN` and `CAP_NET_ADMIN`.
const KEPT: &str = "0000000000001001";
const NONE: &str = "0000000000000000";

/// The names of a switch's threads, and what `/proc` says of each: the values of these lines.
fn threads(host: &Client, node: &Node<'_>, lines: &[&str]) -> Vec<(String, Vec<String>)> {
    let n = node.number;
    let run = format!("for t in /proc/$(cat /run/h{n}/pid)/task/*; do cat $t/status; done");
    let said = host.sh(run).text().unwrap();
    let one = |text: &str| {
        let value = |name: &str| {
            let lines = text.lines();
            let mut values = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            values.next().unwrap().trim().to_owned()
        };
        (
            value("Name"),
            lines.iter().map(|name| value(name)).collect(),
        )
    };
    let all = said.split("Name:").skip(1);
    all.map(|text| one(&format!("Name:{text}"))).collect()
}

fn confinement(node: &Node<'_>) -> Value {
    let info: Value = serde_json::from_str(&node.net("info --json")).unwrap();
    info["confinement"].clone()
}

#[test]
fn all_threads_have_filters_and_no_capabilities_but_two() {
    natively(nodes, |host: &Host| {
        let nodes = cluster(host, 2);
        let node = &nodes[0];
        for node in &nodes {
            node.net("create blue");
            let n = node.number;
            node.tenant("blue", &format!("t{n}"), &format!("10.0.0.{n}/24"), "");
        }
        node.net("attach blue guest --vhost-user /run/h1/guest.sock");
        // Its name is looked up.
        node.net("controller set blue tcp:localhost:1 --fail-mode standalone");
        until("t1 reaches t2", || pings(host, "t1", "10.0.0.2"));
        let lines = [
            "Seccomp",
            "NoNewPrivs",
            "CapEff",
            "CapPrm",
            "CapInh",
            "CapBnd",
            "CapAmb",
        ];
        let wanted = ["2", "1", KEPT, KEPT, NONE, NONE, NONE];
        let classes = ["blanket-switch", "switch", "vhost-user", "tokio-rt-worker"];
        until("all classes of threads are there", || {
            let all = threads(host, node, &[]);
            let has = |name: &&str| all.iter().any(|(its, _)| its == name);
            classes.iter().all(has)
        });
        for (name, values) in threads(host, node, &lines) {
            assert_eq!(values, wanted, "{name}");
        }
        let is = confinement(node);
        assert_eq!(is["seccomp"], "on");
        assert_eq!(
            is["capabilities"],
            serde_json::json!(["CAP_CHOWN", "CAP_NET_ADMIN"])
        );
        let said = node.net("info");
        for row in ["seccomp", "CAP_CHOWN CAP_NET_ADMIN", "landlock"] {
            assert!(said.contains(row), "{said}");
        }
        // It is still itself: what comes later needs what it has kept.
        node.tenant("blue", "late", "10.0.0.7/24", "--mtu 1300");
        assert!(pings(host, "late", "10.0.0.2"));
        let log = host.sh("cat /run/h1/log").text().unwrap();
        assert!(!log.contains("forbidden"), "{log}");
    });
}

#[test]
fn filters_log_or_are_off_if_asked_for() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        for (wish, mode) in [("log", "2"), ("off", "0")] {
            node.start(&format!("--seccomp {wish}"));
            assert_eq!(confinement(&node)["seccomp"], wish);
            for (name, values) in threads(host, &node, &["Seccomp", "CapEff"]) {
                assert_eq!(values, [mode, KEPT], "{wish}: {name}");
            }
            node.kill();
        }
    });
}

#[test]
fn of_the_file_system_there_is_what_was_allowed() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        host.sh("mkdir -p /elsewhere && echo key > /elsewhere/key")
            .text()
            .unwrap();
        node.start("");
        node.net("create blue");
        if confinement(&node)["landlock"].is_null() {
            return;
        }
        let at = |folder: &str| {
            let key = format!("{folder}/key");
            format!(
                "controller set blue pssl:6654 --tls-key {key} --tls-certificate {key} --tls-ca {key}"
            )
        };
        let said = node.refusal(&at("/elsewhere"));
        assert!(said.contains("Permission denied"), "{said}");
        let said = node.refusal("attach blue p --vhost-user /elsewhere/p.sock");
        assert!(said.contains("Permission denied"), "{said}");
        node.net("attach blue p --vhost-user /tmp/p.sock");
        node.net("detach p");
        node.kill();
        node.start("--allow /elsewhere");
        let said = node.refusal(&at("/elsewhere"));
        assert!(!said.contains("Permission denied"), "{said}");
        node.net("attach blue p --vhost-user /elsewhere/p.sock");
    });
}

#[test]
fn a_socket_that_was_given_away_is_taken_again_after_a_restart() {
    natively(nodes, |host: &Host| {
        let node = Node::new(host, 1);
        node.start("");
        node.net("create blue");
        let owned = "import http.client, json, socket\n\
            c = http.client.HTTPConnection('switch')\n\
            c.sock = socket.socket(socket.AF_UNIX)\n\
            c.sock.connect('/run/h1/blanket-switch.sock')\n\
            c.request('PUT', '/ports/p', json.dumps({'network': 'blue', 'owner': [1234, 1234], \
            'attachment': {'vhost_user': '/run/h1/p.sock'}}), {'content-type': 'application/json'})\n\
            print(c.getresponse().status)\n";
        let said = host.sh(format!("python3 -c \"{owned}\"")).text().unwrap();
        assert_eq!(said.trim(), "200");
        let owner = || host.sh("stat -c %u:%g /run/h1/p.sock").text().unwrap();
        assert_eq!(owner().trim(), "1234:1234");
        for _ in 0..2 {
            node.kill();
            node.start("");
            assert!(node.port("p")["down"].is_null(), "{}", node.port("p"));
            assert_eq!(owner().trim(), "1234:1234");
        }
    });
}
