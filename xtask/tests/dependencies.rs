//! The list of dependencies is complete and has nothing that is gone.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn direct_dependencies(manifest: &Path) -> BTreeSet<String> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version=1"])
        .arg("--manifest-path")
        .arg(manifest)
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .flat_map(|package| package["dependencies"].as_array().unwrap())
        // Our own crates have no source.
        .filter(|dependency| !dependency["source"].is_null())
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect()
}

/// The crates that the tables name, in backquotes in their first column.
fn listed(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('|').next())
        .flat_map(|cell| cell.split('`').step_by(2))
        .map(|name| name.trim_matches([',', ' ']))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_direct_dependency_is_listed_with_its_reason_and_no_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut used = BTreeSet::new();
    for manifest in ["Cargo.toml", "firmware/Cargo.toml", "fuzz/Cargo.toml"] {
        used.append(&mut direct_dependencies(&root.join(manifest)));
    }
    let text = std::fs::read_to_string(root.join("docs/dependencies.md")).unwrap();
    assert_eq!(
        listed(&text),
        used,
        "left: docs/dependencies.md, right: Cargo.toml"
    );
}
