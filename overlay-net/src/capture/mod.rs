//! Frames in a file, and at other ports.

mod mirror;
mod pcapng;

pub use mirror::{Direction, Mirror, Mirrors};
pub use pcapng::{Interface, Writer};
