//! Which port is bound to what.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::pv::abi::{EVENT_CHANNELS, Errno, LEGACY_MAX_VCPUS, VcpuInfo, virq};

/// What a port is bound to, as the guest may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// Nothing: it is free.
    Closed,
    /// Waits for this domain to bind its end.
    Unbound {
        /// The domain.
        remote: u16,
    },
    /// A backend in this domain.
    Interdomain {
        /// The domain.
        remote: u16,
    },
    /// A virtual interrupt.
    Virq {
        /// Its number.
        virq: u32,
    },
    /// Interrupts between vCPUs.
    Ipi,
}

/// One port of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Port {
    pub(super) status: Status,
    /// Which vCPU is told.
    pub(super) vcpu: usize,
}

pub(super) const FREE: Port = Port {
    status: Status::Closed,
    vcpu: 0,
};

/// The table and where each vCPU's information lies, as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedEvents {
    pub(super) ports: Vec<Port>,
    pub(super) vcpu_info: Vec<Option<u64>>,
}

/// A saved table makes no sense in this machine.
#[derive(Debug, thiserror::Error)]
#[error("the saved event channels do not fit this machine: {0}; start the VM anew")]
pub struct Invalid(pub(super) &'static str);

pub(super) struct Table {
    /// Port 0 is never used.
    pub(super) ports: Vec<Port>,
    /// Backends' eventfds, by port.
    pub(super) kicks: Vec<Option<EventFd>>,
    pub(super) vcpu_info: Vec<Option<GuestAddress>>,
    /// Ports that vCPUs wait for in `SCHEDOP_poll`.
    pub(super) polled: Vec<Vec<u32>>,
}

impl Table {
    pub(super) fn new(vcpus: usize, shared_info: GuestAddress) -> Self {
        let legacy = |vcpu| {
            let offset = vcpu as u64 * size_of::<VcpuInfo>() as u64;
            (vcpu < LEGACY_MAX_VCPUS).then(|| GuestAddress(shared_info.0 + offset))
        };
        Self {
            ports: vec![FREE],
            kicks: vec![None],
            vcpu_info: (0..vcpus).map(legacy).collect(),
            polled: vec![Vec::new(); vcpus],
        }
    }

    pub(super) fn get(&self, port: u32) -> Result<Port, Errno> {
        let port = self.ports.get(port as usize).ok_or(Errno::Inval)?;
        Ok(*port)
    }

    /// Takes the first free port.
    pub(super) fn allocate(&mut self, port: Port) -> Result<u32, Errno> {
        let free = |port: &Port| port.status == Status::Closed;
        let index = match self.ports.iter().skip(1).position(free) {
            Some(index) => index + 1,
            None if self.ports.len() < EVENT_CHANNELS as usize => {
                self.ports.push(FREE);
                self.kicks.push(None);
                self.ports.len() - 1
            }
            None => return Err(Errno::NoSpc),
        };
        self.ports[index] = port;
        Ok(index as u32)
    }

    pub(super) fn virq_port(&self, number: u32, vcpu: usize) -> Option<u32> {
        let wanted = Status::Virq { virq: number };
        let global = !virq::is_per_vcpu(number);
        let found = self
            .ports
            .iter()
            .position(|port| port.status == wanted && (global || port.vcpu == vcpu));
        found.map(|index| index as u32)
    }
}
