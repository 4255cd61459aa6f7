//! Pages and events shared by way of a real Xen: between the node and Xen's control domain.

use std::time::Duration;

use blanket_system_tests::{on_node, program, xen_invitation, xen_pair};
use blanket_testbed::Client;
use serde_json::Value;

/// Generous: it is an emulated machine.
const LIMIT: Duration = Duration::from_secs(120);

fn json(node: &Client, command: &str) -> Value {
    let text = node.sh(command).timeout(LIMIT).text().unwrap();
    serde_json::from_str(&text).unwrap()
}

/// What `blanket doctor` says about sharing with other domains.
fn check(node: &Client) -> Value {
    // It fails where there is no KVM.
    let report = json(node, "blanket doctor --json || :");
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "xen");
    check.unwrap().clone()
}

#[test]
fn domains_of_xen_share_pages_and_events_and_are_refused_what_is_not_granted() {
    let folder = program("").unwrap();
    on_node(
        || xen_pair("xen", &folder),
        |node| {
            // Each end checks the other: bytes both ways, grants that are
            // foreign, read-only or taken back, events, the end of a mapping.
            for number in 0..2 {
                let invitation = xen_invitation(node, number).unwrap();
                let command = format!("blanket doctor --json --accept {invitation}");
                let report = json(node, &command);
                eprintln!("{report}");
                let ns = |name: &str| report[name].as_u64().unwrap();
                assert!(ns("map_ns") > 3 * ns("kept_ns"), "{report}");
                // What was offered is taken back.
                let again = node.sh(command).timeout(LIMIT).run().unwrap();
                assert!(!again.status.success(), "{again}");
            }
            let found = check(node);
            assert_eq!(found["state"], "ok", "{found}");
            assert_eq!(found["facts"]["domain"], 1, "{found}");
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
        },
    );
}
