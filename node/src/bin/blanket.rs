//! The command line.

fn main() -> std::process::ExitCode {
    blanket_node::blanket()
}
