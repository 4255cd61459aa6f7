//! Confinement: what is left to the monitor once it is set up.
//!
//! * [`privileges`]: no root, no capabilities, no way to get either back;
//! * [`seccomp`]: every class of thread has the system calls that it needs and
//!   is ended at the first other one, with a line that names it.

pub mod privileges;
pub mod seccomp;

pub use seccomp::Class;
