//! How the switch is told what to do: HTTP/1.1 and JSON on a Unix socket.

mod groups;
pub mod metrics;
pub mod moving;
pub mod observe;
mod observing;
pub mod server;
pub mod services;
mod serving;
pub mod types;
