//! PVH: start_info, a memory map and the initrd as a module
//! (Xen's public/arch-x86/hvm/start_info.h).

use blanket_memory::GuestRam;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::{Boot, Entry, Error, at};

const MAGIC: u32 = 0x336e_c578;

/// Writes the structures and says where to start.
pub(super) fn prepare(ram: &GuestRam, boot: &Boot, entry: u64) -> Result<Entry, Error> {
    let map: Vec<_> = boot
        .memory_map
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(boot.initrd.is_some()),
        modlist_paddr: boot.initrd.map_or(0, |_| at::MODULES.0),
        cmdline_paddr: at::CMDLINE.0,
        rsdp_paddr: boot.rsdp.0,
        memmap_paddr: at::MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut params = BootParams::new(&info, at::START_INFO);
    params.set_sections(&map, at::MEMORY_MAP);
    if let Some((start, len)) = boot.initrd {
        let module = hvm_modlist_entry {
            paddr: start.0,
            size: len,
            cmdline_paddr: 0,
            reserved: 0,
        };
        params.set_modules(&[module], at::MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|error| {
        Error::Guest(vm_memory::GuestMemoryError::IOError(std::io::Error::other(
            error.to_string(),
        )))
    })?;
    Ok(Entry::Pvh(entry))
}
