//! TAP interfaces: a guest's frames as the node's kernel sees them.

pub use crate::mac::MacAddress;
