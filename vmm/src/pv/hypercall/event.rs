//! Event channels.

use std::mem::offset_of;

use blanket_devices::xen::GUEST;
use blanket_pv_shim::layout::Data;

use super::{Hypercall, Result};
use crate::pv::abi::Errno;
use crate::pv::domain::Domain;
use crate::pv::events::Status;

const BIND_VIRQ: u64 = 1;
const CLOSE: u64 = 3;
const SEND: u64 = 4;
const STATUS: u64 = 5;
const ALLOC_UNBOUND: u64 = 6;
const BIND_IPI: u64 = 7;
const BIND_VCPU: u64 = 8;
const UNMASK: u64 = 9;
const RESET: u64 = 10;
/// "Myself".
const DOMID_SELF: u16 = 0x7ff0;

impl Hypercall<'_> {
    pub(super) fn event_channel_op(&self) -> Result {
        let [command, at, ..] = self.arguments;
        let events = &self.domain.events;
        let space = self.space();
        let word = |offset: u64| space.get::<u32>(at.wrapping_add(offset));
        match command {
            BIND_VIRQ => {
                let port = events.bind_virq(word(0)?, word(4)? as usize)?;
                self.domain.tell_timers()?;
                space.put(at.wrapping_add(8), port)?;
            }
            BIND_IPI => {
                let port = events.bind_ipi(word(0)? as usize)?;
                space.put(at.wrapping_add(4), port)?;
            }
            ALLOC_UNBOUND => {
                let [domain, remote]: [u16; 2] = space.get(at)?;
                if domain != DOMID_SELF && domain != GUEST {
                    return Err(Errno::Perm);
                }
                let port = events.alloc_unbound(remote)?;
                space.put(at.wrapping_add(4), port)?;
            }
            CLOSE => {
                events.close(word(0)?)?;
                self.domain.tell_timers()?;
            }
            SEND => events.send(word(0)?)?,
            UNMASK => events.unmask(word(0)?)?,
            BIND_VCPU => events.bind_vcpu(word(0)?, word(4)? as usize)?,
            STATUS => {
                let (status, vcpu) = events.status(word(4)?)?;
                let (number, detail) = match status {
                    Status::Closed => (0u32, 0),
                    Status::Unbound { remote } => (1, u32::from(remote)),
                    Status::Interdomain { remote } => (2, u32::from(remote)),
                    Status::Virq { virq } => (4, virq),
                    Status::Ipi => (5, 0),
                };
                space.put(at.wrapping_add(8), [number, vcpu as u32, detail])?;
            }
            RESET => {
                events.reset();
                self.domain.tell_timers()?;
            }
            _ => return Err(Errno::NoSys),
        }
        Ok(0)
    }
}

impl Domain {
    /// Tells the shims which event channels their timers ring.
    pub(crate) fn tell_timers(&self) -> Result<()> {
        for index in 0..self.cpus.len() {
            let port = u64::from(self.events.timer_port(index));
            self.part(index)
                .set(offset_of!(Data, timer_port), port)
                .map_err(|_| Errno::Fault)?;
        }
        Ok(())
    }
}
