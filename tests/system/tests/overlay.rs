//! The overlay: switches in network namespaces, and what is attached to them.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "overlay/basic.rs"]
mod basic;
#[path = "overlay/confined.rs"]
mod confined;
#[path = "overlay/control.rs"]
mod control;
#[path = "overlay/faults.rs"]
mod faults;
#[path = "overlay/foreign.rs"]
mod foreign;
#[path = "overlay/hostile.rs"]
mod hostile;
#[path = "overlay/hostile_frames.rs"]
mod hostile_frames;
#[path = "overlay/moving.rs"]
mod moving;
#[path = "overlay/node.rs"]
mod node;
#[path = "overlay/observe.rs"]
mod observe;
#[path = "overlay/soak.rs"]
mod soak;
#[path = "overlay/vips.rs"]
mod vips;
