//! The daemon of each node.

fn main() -> std::process::ExitCode {
    blanket_node::blanketd()
}
