//! What makes nodes one cluster: names, certificates, tokens, and how they talk.
//!
//! One node has the CA. It signs a certificate for each node, for as long as
//! the node's key is not removed; the key is made on its node and stays there.
//! The certificate's common name is the node's, its key's hash is the node's
//! identity. Nodes talk TLS 1.3 only, to one port; which of three protocols it
//! is, ALPN says:
//!
//! | protocol | certificate | what |
//! |---|---|---|
//! | `blanket-join/1` | the server's only | HTTP: a new node joins |
//! | `blanket-node/1` | both | HTTP: nodes ask each other |
//! | `blanket-stream/2` | both | [`hello`], then a service's bytes |

pub(crate) mod ca;
pub mod hello;
pub(crate) mod identity;
pub(crate) mod members;
pub mod names;
pub mod parcel;
pub(crate) mod secrets;
pub(crate) mod store;
pub(crate) mod tls;
pub mod token;
