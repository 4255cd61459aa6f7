//! The `blanket` command.
fn main() {}
