//! The testbed's command channel: run commands and copy files inside a machine, over any
//! byte stream.
//!
//! Both ends are here. [`server`] runs inside the machine and owns a virtio port or a virtio
//! console; [`client`] runs on the host, or inside a node to reach that node's guests. They
//! exchange the frames of [`protocol`].
//!
//! Several requests run at once on one stream. Each has its own window of unacknowledged bytes
//! in each direction ([`flow`]), so a command that does not read its input, or a reader that
//! does not keep up, holds up nothing else.

pub mod client;
pub mod flow;
pub mod protocol;
pub mod server;
