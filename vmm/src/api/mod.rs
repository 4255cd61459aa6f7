//! The monitor's API: HTTP/1.1 with JSON over a Unix socket.

pub mod server;
pub mod types;
