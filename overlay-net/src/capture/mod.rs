//! Frames in a file, and at other ports.

mod line;
mod mirror;
mod pcapng;
mod read;

pub use line::describe;
pub use mirror::{Direction, Mirror, Mirrors, Source};
pub use pcapng::{Interface, Writer};
pub use read::{Block, Reader, Unreadable};
