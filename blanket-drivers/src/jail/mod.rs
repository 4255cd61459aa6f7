//! What takes privileges away from a process that serves strangers: what the
//! jails of the monitor and of the switch are made of.
//!
//! * [`privileges`]: capabilities, and no way to get them back;
//! * [`seccomp`]: system call filters, and a line that names what was refused;
//! * [`landlock`]: what can be seen of the file system.

pub mod landlock;
pub mod privileges;
pub mod seccomp;
