//! `blanket uplink` on an interface in a network namespace of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Makes the interfaces `v0`, with an address, and `v1`, without one.
const INTERFACES: &str = "ip link add v0 type veth peer name v1 && ip link set v0 up && \
                          ip link set v1 up && ip addr add 10.7.0.1/24 dev v0";

/// Runs `blanket uplink` with the interfaces, unless they cannot be had.
fn uplink(home: &Path, arguments: &str) -> Option<Output> {
    let script = |then: &str| format!("{INTERFACES} && {then}");
    let sh = |script: &str| {
        Command::new("unshare")
            .args(["--net", "sh", "-c", script])
            .output()
    };
    let tried = sh(&script("true")).unwrap();
    if !tried.status.success() {
        let error = String::from_utf8_lossy(&tried.stderr).into_owned();
        println!("skipped, because there are no interfaces to try: {error}");
        return None;
    }
    let blanket = env!("CARGO_BIN_EXE_blanket");
    let home = home.display();
    Some(
        sh(&script(&format!(
            "{blanket} --home {home} uplink {arguments}"
        )))
        .unwrap(),
    )
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn an_interface_is_measured_once_and_the_users_wish_is_kept() {
    let home = tempfile::tempdir().unwrap();
    let Some(first) = uplink(home.path(), "--json") else {
        return;
    };
    let first = json(&first);
    assert_eq!(first[0]["interface"], "v0");
    assert_eq!(first[0]["address"], "10.7.0.1");
    assert_eq!(first[0]["cached"], false);
    assert_eq!(first.as_array().unwrap().len(), 1, "v1 has no address");
    let kinds = first[0]["kinds"].as_array().unwrap();
    let udp = kinds.iter().find(|kind| kind["kind"] == "udp").unwrap();
    assert!(udp["figures"]["bulk_gbps"].as_f64().unwrap() > 0.0, "{udp}");
    for kind in kinds {
        // Each has its figures, or the reason why not.
        assert_ne!(
            kind["figures"].is_null(),
            kind["obstacle"].is_null(),
            "{kind}"
        );
    }

    let again = json(&uplink(home.path(), "--json --interface v0 --use af_packet").unwrap());
    assert_eq!(again[0]["cached"], true);
    assert_eq!(again[0]["kinds"], first[0]["kinds"]);
    assert_eq!(again[0]["uses"], "af_packet");
    let text = uplink(home.path(), "").unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("measured before"), "{text}");
    assert!(text.contains("uses af_packet: --use says so"), "{text}");
    let back = json(&uplink(home.path(), "--json --interface v0 --use auto").unwrap());
    assert_eq!(back[0]["uses"], first[0]["uses"]);
}

#[test]
fn what_is_no_uplink_is_refused_with_the_remedy() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, told) in [
        ("--interface eth7", "remedy: use one of: "),
        ("--interface v1", "remedy: ip addr add"),
        ("--interface v0 --use tap", "auto, udp, af_xdp, af_packet"),
        ("--use udp", "--interface"),
    ] {
        let Some(output) = uplink(home.path(), arguments) else {
            return;
        };
        assert!(!output.status.success(), "{arguments}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(told), "{arguments}: {error}");
    }
}
