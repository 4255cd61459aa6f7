//! The `pv` machine: a Xen PV domain whose kernel runs in ring 3.

pub mod abi;
pub mod builder;
pub mod cpuid;
pub mod emulate;
pub mod events;
pub mod time;
