//! What hides one provider's machine behind Blanket's uniform host I/O.

pub mod cpu;
pub mod grant;
pub mod jail;
mod kept;
pub mod mac;
pub mod probe;
pub mod provider;
pub mod rings;
pub mod store;
pub mod tap;
pub mod uplink;
pub mod volume;
