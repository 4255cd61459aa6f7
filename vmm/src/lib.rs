//! One process, one VM: the `hvm` machine, its wiring, the API and the jail.
//!
//! [`monitor`] has the life of the VM, [`hvm`] builds its machine, [`vcpu`]
//! runs its processors, [`api`] talks to the outside, [`jail`] confines it all.

pub mod api;
pub mod client;
pub mod config;
pub mod hvm;
pub mod jail;
pub mod log;
pub mod machine;
pub mod migrate;
pub mod monitor;
pub mod pv;
pub mod snapshot;
pub mod timeline;
pub mod vcpu;
