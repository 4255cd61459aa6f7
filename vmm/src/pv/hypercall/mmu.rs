//! What the shim leaves of the page tables' hypercalls: it writes all entries
//! itself.

use super::{Hypercall, Result};
use crate::pv::abi::Errno;

const TLB_FLUSH_MULTI: u64 = 8;
const INVLPG_MULTI: u64 = 9;
const TLB_FLUSH_ALL: u64 = 10;
const INVLPG_ALL: u64 = 11;
const SET_LDT: u64 = 13;
/// Entries of a local descriptor table.
const LDT_ENTRIES: u64 = 8192;

impl Hypercall<'_> {
    /// One operation.
    pub(super) fn mmuext_op(&self) -> Result {
        let [command, first, second]: [u64; 3] = self.space().get(self.arguments[0])?;
        match command & 0xffff_ffff {
            TLB_FLUSH_MULTI | INVLPG_MULTI => {
                let mask: u64 = self.space().get(second)?;
                self.flush(mask)
            }
            TLB_FLUSH_ALL | INVLPG_ALL => self.flush(u64::MAX),
            SET_LDT if second <= LDT_ENTRIES => {
                self.domain.cpus[self.index].state().ldt = (first, second);
                Ok(0)
            }
            SET_LDT => Err(Errno::Inval),
            _ => Err(Errno::NoSys),
        }
    }

    /// The entry is written; what is left is to flush it from several vCPUs.
    pub(super) fn update_va_mapping(&self) -> Result {
        const ALL: u64 = 1 << 2;
        let flags = self.arguments[2];
        match flags & !3 {
            0 => self.flush(0),
            ALL => self.flush(u64::MAX),
            mask => self.flush(self.space().get(mask)?),
        }
    }

    /// Flushes the vCPUs of `mask`, this one always.
    fn flush(&self, mask: u64) -> Result {
        self.domain.flush_others(self.index, mask);
        Ok(0)
    }
}
