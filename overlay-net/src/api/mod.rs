//! How the switch is told what to do: HTTP/1.1 and JSON on a Unix socket.

pub mod moving;
pub mod server;
pub mod types;
