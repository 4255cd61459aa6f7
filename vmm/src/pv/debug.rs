//! A vCPU's debug registers, as Xen lets a guest have them (`set_debugreg`).
//!
//! The processor has the guest's breakpoints in all of its address spaces. None
//! is where the hypervisor's area is, so that the shim meets one only where it
//! uses the guest's own memory, and goes on.

use serde::{Deserialize, Serialize};

use super::abi::Errno;

const ADDRESSES: u8 = 4;
const STATUS: u8 = 6;
const CONTROL: u8 = 7;
/// Bits of DR6 that are always set, and one that never is (bits 32 to 63
/// neither).
const STATUS_ONES: u64 = 0xffff_0ff0;
const STATUS_ZEROS: u64 = 1 << 12;
/// The same of DR7.
const CONTROL_ONES: u64 = 0x400;
const CONTROL_ZEROS: u64 = 0xd800;
/// Debug registers are to be guarded: that is the hypervisor's.
const GENERAL_DETECT: u64 = 1 << 13;
/// Where addresses are none, or the hypervisor's.
const CLOSED: std::ops::Range<u64> = 1 << 47..0xffff_8800_0000_0000;

/// The registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Debug {
    addresses: [u64; ADDRESSES as usize],
    status: u64,
    control: u64,
    /// The vCPU's thread has to load them.
    pub reload: bool,
}

impl Default for Debug {
    fn default() -> Self {
        Self {
            addresses: [0; ADDRESSES as usize],
            status: STATUS_ONES,
            control: CONTROL_ONES,
            reload: true,
        }
    }
}

impl Debug {
    /// What DR`register` has.
    ///
    /// # Errors
    /// There is no such register.
    pub(crate) fn get(&self, register: u64) -> Result<u64, Errno> {
        match alias(register)? {
            STATUS => Ok(self.status),
            CONTROL => Ok(self.control),
            address => Ok(self.addresses[usize::from(address)]),
        }
    }

    /// Sets DR`register`. The processor has it when its thread has loaded it.
    ///
    /// # Errors
    /// There is no such register, or it may not have that value.
    pub(crate) fn set(&mut self, register: u64, value: u64) -> Result<(), Errno> {
        match alias(register)? {
            STATUS => self.status = value & 0xffff_ffff & !STATUS_ZEROS | STATUS_ONES,
            CONTROL => self.control = control(value)?,
            _ if CLOSED.contains(&value) => return Err(Errno::Perm),
            address => self.addresses[usize::from(address)] = value,
        }
        self.reload = true;
        Ok(())
    }

    /// A debug exception came, with the processor's DR6.
    pub(crate) fn hit(&mut self, status: u64) {
        self.status |= status & 0xffff_ffff & !STATUS_ZEROS;
        // The processor only adds to it.
        self.reload = true;
    }

    /// Whether a breakpoint is enabled.
    #[must_use]
    pub(crate) fn has_breakpoints(&self) -> bool {
        self.control & 0xff != 0
    }

    /// What the processor is to have: addresses, and DR7. Its DR6 is
    /// [`Debug::CLEAR`].
    #[must_use]
    pub(crate) fn registers(&self) -> ([u64; 4], u64) {
        (self.addresses, self.control)
    }

    /// DR6 without any hit.
    pub(crate) const CLEAR: u64 = STATUS_ONES;
}

/// DR4 and DR5 are other names of DR6 and DR7 (CR4.DE is not set).
fn alias(register: u64) -> Result<u8, Errno> {
    match register {
        0..=3 => Ok(register as u8),
        4 | 6 => Ok(STATUS),
        5 | 7 => Ok(CONTROL),
        _ => Err(Errno::Inval),
    }
}

fn control(value: u64) -> Result<u64, Errno> {
    const IO: u64 = 2;
    let on_ports = |slot: u64| value >> (2 * slot) & 3 != 0 && value >> (16 + 4 * slot) & 3 == IO;
    if value >> 32 != 0 || value & GENERAL_DETECT != 0 || (0..4).any(on_ports) {
        return Err(Errno::Perm);
    }
    Ok(value & !CONTROL_ZEROS | CONTROL_ONES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn breakpoints_are_at_the_guests_own_addresses_only() {
        let mut debug = Debug::default();
        for (address, allowed) in [
            (0, true),
            (0x7fff_ffff_f000, true),
            (1 << 47, false),
            (0xffff_8000_0000_0000, false),
            (blanket_pv_shim::layout::VA, false),
            (blanket_pv_shim::layout::DIRECT_MAP + 0x1000, false),
            (0xffff_87ff_ffff_ffff, false),
            (0xffff_8800_0000_0000, true),
            (0xffff_ffff_8100_0000, true),
        ] {
            assert_eq!(debug.set(3, address).is_ok(), allowed, "{address:#x}");
            assert_eq!(debug.get(3) == Ok(address), allowed, "{address:#x}");
        }
    }

    #[test]
    fn the_control_register_has_neither_guard_nor_ports_nor_unknown_bits() {
        let mut debug = Debug::default();
        assert_eq!(debug.get(7), Ok(0x400));
        assert_eq!(debug.set(7, 1 << 13), Err(Errno::Perm));
        assert_eq!(debug.set(7, 1 << 32), Err(Errno::Perm));
        assert_eq!(debug.set(7, 0x0002_0001), Err(Errno::Perm), "a port");
        assert_eq!(debug.set(7, 0x0002_0000), Ok(()), "one that is not enabled");
        assert_eq!(debug.set(5, 0x000d_d803), Ok(()));
        assert_eq!(debug.get(7), Ok(0x000d_0403));
        assert_eq!(debug.get(8), Err(Errno::Inval));
        assert_eq!(debug.set(8, 0), Err(Errno::Inval));
    }

    #[test]
    fn hits_add_up_until_the_guest_clears_them() {
        let mut debug = Debug {
            reload: false,
            ..Debug::default()
        };
        debug.hit(0xffff_0ff1);
        debug.hit(0xffff_4ff0);
        assert_eq!(debug.get(6), Ok(0xffff_4ff1));
        assert!(debug.reload);
        assert_eq!(debug.set(6, 0), Ok(()));
        assert_eq!(debug.get(6), Ok(Debug::CLEAR));
    }

    proptest! {
        #[test]
        fn the_processor_never_gets_what_it_would_refuse(
            values in prop::collection::vec((0u64..9, any::<u64>()), 0..20),
        ) {
            let mut debug = Debug::default();
            for (register, value) in values {
                let _ = debug.set(register, value);
                debug.hit(value);
                let (addresses, control) = debug.registers();
                prop_assert_eq!(control & !0xffff_27ff, 0);
                prop_assert_eq!(control & (CONTROL_ONES | GENERAL_DETECT), CONTROL_ONES);
                prop_assert!(addresses.iter().all(|address| !CLOSED.contains(address)));
                prop_assert_eq!(debug.get(6).unwrap() & !0xffff_efff, 0);
            }
        }
    }
}
