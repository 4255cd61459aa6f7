//! Machines become nodes of one cluster: each is a network namespace with a `blanketd` of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

use blanket_system_tests::{GUEST_LIMIT, Member as Node, native, natively, program};
use blanket_testbed::{Host, HostBuilder};
use serde_json::Value;

/// The programs alone.
fn bare() -> HostBuilder {
    let programs = ["blanket", "blanketd"].into_iter();
    programs.fold(Host::builder("nodes"), |builder, name| {
        builder.inject(program(name).unwrap(), format!("/usr/bin/{name}"))
    })
}

fn with_guests() -> HostBuilder {
    let blanketd = program("blanketd").unwrap();
    native("nodes")
        .unwrap()
        .inject(blanketd, "/usr/bin/blanketd")
}

/// What nodes see of each other.
trait Sees {
    fn sees(&self) -> Vec<(String, String)>;
    fn comes_to_see(&self, states: &[(&str, &str)]);
}

impl Sees for Node<'_> {
    /// The nodes that it sees, with their states.
    fn sees(&self) -> Vec<(String, String)> {
        let nodes = self.json("node ls --json");
        let text = |node: &Value, key: &str| node[key].as_str().unwrap().to_owned();
        let nodes = nodes.as_array().unwrap().iter();
        nodes
            .map(|node| (text(node, "name"), text(node, "state")))
            .collect()
    }

    /// Waits until it sees this.
    fn comes_to_see(&self, states: &[(&str, &str)]) {
        let states: Vec<_> = states
            .iter()
            .map(|(name, state)| ((*name).to_owned(), (*state).to_owned()))
            .collect();
        let mut seen = Vec::new();
        for _ in 0..20 {
            seen = self.sees();
            if seen == states {
                return;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        panic!("{seen:?}, not {states:?}");
    }
}

/// Three nodes whose daemons run.
fn three(host: &Host) -> [Node<'_>; 3] {
    host.sh(Node::NETWORK).text().unwrap();
    let nodes = [(1, "h1"), (2, "h2"), (3, "h3")].map(|(n, home)| Node::new(host, n, home));
    let nobody = nodes[0].refuses("node ls");
    assert!(nobody.contains("blanketd does not run here"), "{nobody}");
    for node in &nodes {
        node.start();
    }
    assert!(nodes[0].refuses("node ls").contains("in no cluster"));
    nodes
}

#[test]
fn nodes_join_and_outlive_cut_cables_and_strangers_and_removed_nodes_stay_out() {
    natively(bare, |host| {
        let [a, b, c] = three(host);
        they_join(host, &a, &b, &c);
        a_node_that_is_cut_off_is_named(host, &a, &c);
        strangers_are_refused(host, &a);
        a_removed_node_is_refused(&a, &b, &c);
    });
}

#[test]
fn guests_are_shown_on_all_nodes_and_outlive_the_daemons() {
    natively(with_guests, |host| {
        let [a, b, c] = three(host);
        they_join(host, &a, &b, &c);
        guests_are_shown_everywhere(&a, &b);
        a_killed_daemon_harms_nobody(&a, &b);
        b.says("stop --force web");
    });
}

fn they_join(host: &Host, a: &Node, b: &Node, c: &Node) {
    let made = a.json("ca init --name a --json");
    assert_eq!(made["address"], "10.7.0.1:7117", "{made}");
    let words = a.lets_join();
    assert!(
        words.starts_with("node join 10.7.0.1:7117 blanket1-"),
        "{words}"
    );
    b.says(&format!("{words} --name b"));
    let used = c.refuses(&format!("{words} --name c"));
    assert!(used.contains("wrong, used or expired"), "{used}");
    let words = a.lets_join();
    let taken = c.refuses(&format!("{words} --name b"));
    assert!(taken.contains("there is a node b already"), "{taken}");
    c.says(&format!("{words} --name c"));
    for node in [a, b, c] {
        node.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "up")]);
        let table = node.says("node ls");
        assert!(table.contains("10.7.0.3:7117"), "{table}");
    }
    let open = "find /run/h?/node /run/h?/blanketd.sock -perm /077";
    assert_eq!(host.sh(open).text().unwrap(), "");
    let keys = "sort /run/h?/node/node.key | grep -v -- ---- | uniq -d; \
                ls /run/h[23]/node/ca.key 2>/dev/null || true";
    assert_eq!(host.sh(keys).text().unwrap(), "");
}

fn guests_are_shown_everywhere(a: &Node, b: &Node) {
    b.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --memory 128M --cmdline 'console=hvc0 quiet panic=-1'",
    );
    let all = a.json("ps --all --json");
    assert_eq!(all[0]["node"], "b", "{all}");
    assert_eq!(
        (&all[0]["name"], &all[0]["state"]),
        (&"web".into(), &"running".into())
    );
    let table = a.says("ps --all");
    let row = table.lines().nth(1).unwrap();
    let row: Vec<_> = row.split_whitespace().take(3).collect();
    assert_eq!(row, ["b", "web", "running"], "{table}");
    assert_eq!(a.json("ps -a --json"), Value::Array(vec![]));
    let nodes = a.json("node ls --json");
    assert_eq!(nodes[1]["vms"], 1, "{nodes}");
}

fn a_killed_daemon_harms_nobody(a: &Node, b: &Node) {
    let before = b.json("ps --json");
    b.kill();
    a.comes_to_see(&[("a", "up"), ("b", "unreachable"), ("c", "up")]);
    let after = b.json("ps --json");
    assert_eq!(
        (&after[0]["pid"], &after[0]["state"]),
        (&before[0]["pid"], &"running".into())
    );
    b.start();
    a.kill();
    a.start();
    for node in [a, b] {
        node.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "up")]);
    }
    assert_eq!(a.json("ps --all --json")[0]["pid"], before[0]["pid"]);
}

fn a_node_that_is_cut_off_is_named(host: &Host, a: &Node, c: &Node) {
    host.sh("ip link set v3 down").text().unwrap();
    a.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "unreachable")]);
    c.comes_to_see(&[("a", "unreachable"), ("b", "unreachable"), ("c", "up")]);
    let output = a.run("ps --all");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("VMs of node c"),
        "{output}"
    );
    host.sh("ip link set v3 up").text().unwrap();
    a.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "up")]);
}

/// A cluster of somebody else's has no way in, nor has who has no certificate.
fn strangers_are_refused(host: &Host, a: &Node) {
    let other = Node::new(host, 3, "h4");
    let start = "exec ip netns exec n3 blanketd --home /run/h4 --listen 10.7.0.3:7118";
    host.sh(start).spawn("/run/h4.log").unwrap();
    let ready = "until [ -S /run/h4/blanketd.sock ]; do sleep 0.1; done";
    host.sh(ready).timeout(GUEST_LIMIT).text().unwrap();
    let words = a.lets_join();
    let token = words.rsplit(' ').next().unwrap();
    other.says("ca init --name x --address 10.7.0.3:7118");
    let new = other.json("node token --json");
    let foreign = new["token"].as_str().unwrap();
    other.says("node leave");
    // The token of one cluster does not lead into another one.
    let refused = other.refuses(&format!("node join 10.7.0.1 {foreign} --name x"));
    assert!(refused.contains("another cluster"), "{refused}");
    let asked = "ip netns exec n3 curl -sk --tlsv1.3 -m 10 https://10.7.0.1:7117/members";
    let asked = host.sh(asked).run().unwrap();
    assert!(
        !asked.status.success() && asked.stdout.is_empty(),
        "{asked}"
    );
    // The other way round, it does.
    other.says(&format!(
        "node join {token} --name x --address 10.7.0.3:7118"
    ));
    other.says("node leave");
    a.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "up")]);
}

fn a_removed_node_is_refused(a: &Node, b: &Node, c: &Node) {
    let refused = b.refuses("node rm c");
    assert!(refused.contains("do it on node a"), "{refused}");
    a.says("node rm c");
    let nodes = c.json("node ls --json");
    for at in [0, 1] {
        let reason = nodes[at]["reason"].as_str().unwrap_or_default();
        assert!(
            reason.contains("node c was removed from the cluster"),
            "{nodes}"
        );
    }
    for node in [a, b] {
        node.comes_to_see(&[("a", "up"), ("b", "up")]);
    }
    c.says("node leave");
    c.says(&format!("{} --name c", a.lets_join()));
    b.comes_to_see(&[("a", "up"), ("b", "up"), ("c", "up")]);
}
