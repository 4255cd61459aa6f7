//! The generation ID (Microsoft, "Virtual Machine Generation ID", 2012): a
//! number in guest memory that is another one where the guest goes on from a
//! snapshot or as a clone, so that it does not use again what must be used once:
//! random numbers, above all.
//!
//! It stays through pauses, resets and migrations: nothing is used twice there.
//!
//! In the same page, at [`NAME`], is what the VM is called: a guest that finds
//! itself with another number can look there who it is now.

use std::io;

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::platform;

const ADDRESS: GuestAddress = GuestAddress(platform::GENERATION);
/// Where the name is, in guest memory.
pub const NAME: u64 = platform::GENERATION + 0x100;
/// Bytes of the name, with at least one zero at its end.
const NAME_LEN: usize = 64;

/// The number cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody has random numbers.
    #[error("there are no random numbers for the generation ID: {0}")]
    Random(io::Error),
    /// Guest memory ends below it.
    #[error("cannot write the generation ID to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Gives the guest another number. It has to be told then
/// ([`Power::tell_generation`](super::power::Power::tell_generation)).
///
/// # Errors
/// It cannot be made or written.
pub fn renew(ram: &GuestRam) -> Result<(), Error> {
    let mut number = [0u8; 16];
    // SAFETY: the buffer has as many bytes as is said.
    let n = unsafe { libc::getrandom(number.as_mut_ptr().cast(), number.len(), 0) };
    // So few are had at once or not at all.
    if usize::try_from(n).ok() != Some(number.len()) {
        return Err(Error::Random(io::Error::last_os_error()));
    }
    Ok(ram.write_slice(&number, ADDRESS)?)
}

/// Gives the guest its first number, unless it has one: after a reset.
///
/// # Errors
/// It cannot be made or written.
pub fn ensure(ram: &GuestRam) -> Result<(), Error> {
    match ram.read_obj::<u128>(ADDRESS)? {
        0 => renew(ram),
        _ => Ok(()),
    }
}

/// Says what the VM is called; the first 63 bytes of it.
///
/// # Errors
/// It cannot be written.
pub fn set_name(ram: &GuestRam, name: &str) -> Result<(), Error> {
    let mut bytes = [0; NAME_LEN];
    for (to, from) in bytes[..NAME_LEN - 1].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    Ok(ram.write_slice(&bytes, GuestAddress(NAME))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_stays_until_it_is_renewed() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let number = || ram.read_obj::<u128>(ADDRESS).unwrap();
        ensure(&ram).unwrap();
        let first = number();
        assert_ne!(first, 0);
        ensure(&ram).unwrap();
        assert_eq!(number(), first);
        renew(&ram).unwrap();
        assert_ne!(number(), first);
        let renewed = number();
        set_name(&ram, &"long".repeat(99)).unwrap();
        set_name(&ram, "web-2").unwrap();
        let mut name = [1; NAME_LEN + 1];
        ram.read_slice(&mut name, GuestAddress(NAME)).unwrap();
        assert_eq!((&name[..6], &name[6..]), (&b"web-2\0"[..], &[0; 59][..]));
        assert_eq!(number(), renewed);
        let small = GuestRam::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        assert!(ensure(&small).is_err() && renew(&small).is_err());
        assert!(set_name(&small, "web").is_err());
    }
}
