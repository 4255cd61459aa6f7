//! Pages and events shared by way of a real Xen, and what `blanket doctor` says of them.

use blanket_system_tests::{on_node, program};
use blanket_testbed::{Client, Node, Provider};
use serde_json::Value;

/// What `blanket doctor` says about sharing with other domains.
fn check(node: &Client) -> Value {
    let text = node.sh("blanket doctor --json || :").text().unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "xen");
    check.unwrap().clone()
}

#[test]
fn xen_shares_pages_and_events_and_refuses_what_is_not_granted() {
    let node = || {
        Node::builder("xen")
            .provider(Provider::Xen)
            .inject(program("blanket").unwrap(), "/usr/bin/blanket")
    };
    on_node(node, |node| {
        // It is all in the self-test: bytes both ways, grants that are foreign,
        // read-only or taken back, events, the ends of mappings and grants.
        let found = check(node);
        eprintln!("{found}");
        assert_eq!(found["state"], "ok", "{found}");
        assert_eq!(found["facts"]["domain"], 1, "{found}");
        let ns = |name: &str| found["facts"][name].as_u64().unwrap();
        assert!(ns("map_ns") > 3 * ns("kept_ns"), "{found}");
        // Nothing is left behind: no module is in use.
        for module in ["gntalloc", "gntdev", "evtchn"] {
            node.sh(format!("rmmod xen_{module}")).text().unwrap();
            let found = check(node);
            assert_eq!(found["state"], "missing", "{found}");
            let remedy = found["remedy"].as_str().unwrap();
            assert!(
                remedy.contains(&format!("modprobe xen_{module}")),
                "{found}"
            );
            node.sh(format!("modprobe xen_{module}")).text().unwrap();
            assert_eq!(check(node)["state"], "ok");
        }
    });
}
