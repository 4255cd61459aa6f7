//! The `hvm` machine: a guest in hardware virtualization (VMX or SVM, bare
//! metal or nested), with the kernel's own interrupt controllers.

pub mod boot;
mod bus;
mod cpuid;
mod error;
mod kvm;
pub mod machine;
mod parts;
mod registers;
mod wiring;

pub use error::Error;
pub use machine::Machine;
pub use parts::Parts;
