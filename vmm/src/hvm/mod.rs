//! The `hvm` machine: a guest in hardware virtualization (VMX or SVM, bare
//! metal or nested), with the kernel's own interrupt controllers.

pub mod boot;
mod bus;
mod cpuid;
mod kvm;
pub mod machine;
mod parts;
mod registers;
mod saved;
mod time;
mod wiring;

pub use crate::machine::Error;
pub(crate) use kvm::no_kvm;
pub use machine::Machine;
pub use parts::Parts;
