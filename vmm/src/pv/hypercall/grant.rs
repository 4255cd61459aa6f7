//! The grant table's own hypercalls. A domain has nobody whose pages it could
//! map: only its table is set up.

use blanket_pv_shim::layout;

use super::{Hypercall, Result};
use crate::pv::abi::{Errno, PAGE_SIZE};

const SETUP_TABLE: u64 = 2;
const QUERY_SIZE: u64 = 6;
const SET_VERSION: u64 = 8;
const GET_VERSION: u64 = 10;
/// Status of an operation that went well.
const OKAY: u16 = 0;
/// The domain is another one than the caller.
const BAD_DOMAIN: u16 = -2i16 as u16;
/// "Myself".
const DOMID_SELF: u16 = 0x7ff0;

impl Hypercall<'_> {
    pub(super) fn grant_table_op(&self) -> Result {
        let [command, argument, count, ..] = self.arguments;
        // Linux makes each of these alone.
        if count != 1 {
            return Err(Errno::NoSys);
        }
        let space = self.space();
        match command {
            SETUP_TABLE => {
                let domain: u16 = space.get(argument)?;
                let frames: u32 = space.get(argument.wrapping_add(4))?;
                let list: u64 = space.get(argument.wrapping_add(16))?;
                if domain != DOMID_SELF || frames > layout::GRANT_FRAMES {
                    space.put(argument.wrapping_add(8), BAD_DOMAIN)?;
                    return Ok(0);
                }
                let first = (layout::GPA + layout::GRANT_TABLE) / PAGE_SIZE;
                for i in 0..u64::from(frames) {
                    space.put(list.wrapping_add(i * 8), first + i)?;
                }
                space.put(argument.wrapping_add(8), OKAY)?;
                Ok(0)
            }
            QUERY_SIZE => {
                let sizes = [layout::GRANT_FRAMES, layout::GRANT_FRAMES];
                space.put(argument.wrapping_add(4), sizes)?;
                space.put(argument.wrapping_add(12), OKAY)?;
                Ok(0)
            }
            SET_VERSION => {
                let asked: u32 = space.get(argument)?;
                space.put(argument, 1u32)?;
                if asked == 1 { Ok(0) } else { Err(Errno::NoSys) }
            }
            GET_VERSION => {
                space.put(argument.wrapping_add(4), 1u32)?;
                Ok(0)
            }
            _ => Err(Errno::NoSys),
        }
    }
}
