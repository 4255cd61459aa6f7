//! The testbed itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use blanket_testbed::Node;

#[test]
fn a_node_boots_answers_and_has_kvm() {
    let node = Node::builder("a").boot().unwrap();
    assert_eq!(node.command("hostname").text().unwrap(), "a\n");
    assert_eq!(node.sh("[ -c /dev/kvm ] && echo yes").text().unwrap(), "yes\n");
    eprintln!("ready in {:?}", node.boot_time());
    eprintln!("{}", node.console());
    node.shutdown().unwrap();
}
