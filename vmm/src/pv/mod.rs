//! The `pv` machine: a Xen PV domain whose kernel runs in ring 3.

pub mod abi;
pub mod builder;
mod cpu;
pub mod cpuid;
mod debug;
mod domain;
pub mod emulate;
pub mod events;
mod hypercall;
pub mod machine;
mod mmu;
mod parts;
mod privileged;
mod runstate;
mod saved;
mod shim;
mod shortcut;
pub mod time;

pub use machine::Machine;
pub use parts::Parts;
