//! What the hypervisor says of itself, its console, and its assistance.

use super::{Hypercall, Result};
use crate::machine::lock;
use crate::pv::abi::{Errno, PAGE_SIZE};
use blanket_pv_shim::layout;

const VERSION: u64 = 0;
const EXTRA_VERSION: u64 = 1;
const COMPILE_INFO: u64 = 2;
const CAPABILITIES: u64 = 3;
const CHANGESET: u64 = 4;
const PLATFORM_PARAMETERS: u64 = 5;
const GET_FEATURES: u64 = 6;
const PAGE_SIZE_COMMAND: u64 = 7;
const GUEST_HANDLE: u64 = 8;
const COMMAND_LINE: u64 = 9;
/// `XENFEAT_pae_pgdir_above_4gb`, `XENFEAT_mmu_pt_update_preserve_ad`,
/// `XENFEAT_gnttab_map_avail_bits`.
const FEATURES: u32 = 1 << 4 | 1 << 5 | 1 << 7;
/// First address of the hypervisor's part of address spaces.
const VIRT_START: u64 = 0xffff_8000_0000_0000;
const CONSOLE_WRITE: u64 = 0;
/// Bytes of one call to the console.
const CONSOLE_MOST: u64 = 4096;

impl Hypercall<'_> {
    pub(super) fn xen_version(&self) -> Result {
        let [command, argument, ..] = self.arguments;
        let text = |text: &str, len: usize| {
            let mut bytes = vec![0; len];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            self.space().write(argument, &bytes).map(|()| 0)
        };
        match command {
            VERSION => Ok(u64::from(blanket_pv_shim::XEN_VERSION)),
            EXTRA_VERSION => text(".0-blanket", 16),
            COMPILE_INFO => text("", 64 + 16 + 32 + 32),
            CAPABILITIES => text("xen-3.0-x86_64 ", 1024),
            CHANGESET => text("", 64),
            PLATFORM_PARAMETERS => self.space().put(argument, VIRT_START).map(|()| 0),
            GET_FEATURES => {
                let index: u32 = self.space().get(argument)?;
                let features = if index == 0 { FEATURES } else { 0 };
                self.space().put(argument.wrapping_add(4), features)?;
                Ok(0)
            }
            PAGE_SIZE_COMMAND => Ok(PAGE_SIZE),
            GUEST_HANDLE => self
                .space()
                .write(argument, &*lock(&self.domain.uuid))
                .map(|()| 0),
            COMMAND_LINE => Err(Errno::Perm),
            _ => Err(Errno::NoSys),
        }
    }

    /// Writes what the kernel says before it has a console of its own.
    pub(super) fn console_io(&self) -> Result {
        let [command, len, buffer, ..] = self.arguments;
        if command != CONSOLE_WRITE {
            return Ok(0);
        }
        let mut bytes = vec![0; len.min(CONSOLE_MOST) as usize];
        self.space().read(buffer, &mut bytes)?;
        (self.domain.console)(&bytes);
        Ok(bytes.len() as u64)
    }

    /// A guest has no devices but ours; its kernel may allow its user code
    /// ports, behind which there is nothing.
    pub(super) fn physdev_op(&self) -> Result {
        const SET_IOPL: u64 = 6;
        const SET_IOBITMAP: u64 = 7;
        match self.arguments[0] {
            SET_IOPL | SET_IOBITMAP => Ok(0),
            _ => Err(Errno::NoSys),
        }
    }

    /// Run states can be marked while they are written. What else can be
    /// assisted needs it not here.
    pub(super) fn vm_assist(&self) -> Result {
        const ENABLE: u64 = 0;
        const DISABLE: u64 = 1;
        const RUNSTATE_UPDATE_FLAG: u64 = 5;
        let [command, kind, ..] = self.arguments;
        if !matches!(command, ENABLE | DISABLE) || kind > RUNSTATE_UPDATE_FLAG {
            return Err(Errno::Inval);
        }
        if kind == RUNSTATE_UPDATE_FLAG {
            for cpu in self.domain.cpus.iter() {
                cpu.state().run.marked = command == ENABLE;
            }
        }
        Ok(0)
    }
}

const _: () = assert!(layout::VA >= VIRT_START);
