//! The developer commands: what `cargo xtask` does.

pub mod bench;
pub mod build;
pub mod demo;
pub mod fuzz;
pub mod progress;
pub mod run;
pub mod setup;
pub mod test;
pub mod workspace;
