//! Linux's 64-bit boot protocol: boot_params and identity-mapped page tables.

use blanket_memory::GuestRam;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{Boot, Entry, Error, at};

/// The 64-bit entry of a bzImage lies this far behind its start.
pub(super) const ENTRY_OFFSET: u64 = 0x200;

/// GDT entries that the protocol asks for: at 0x10 code, at 0x18 data.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes boot_params and page tables and says where to start. `header` is
/// what came with a bzImage; an ELF image gets one made up.
pub(super) fn prepare(
    ram: &GuestRam,
    boot: &Boot,
    entry: u64,
    header: Option<setup_header>,
) -> Result<Entry, Error> {
    /// Loader type: one without a number of its own.
    const OTHER_LOADER: u8 = 0xff;
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: 0xaa55,
            header: u32::from_le_bytes(*b"HdrS"),
            kernel_alignment: 0x100_0000,
            ..setup_header::default()
        }),
        acpi_rsdp_addr: boot.rsdp.0,
        e820_entries: boot.memory_map.len() as u8,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = OTHER_LOADER;
    params.hdr.cmd_line_ptr = at::CMDLINE.0 as u32;
    params.hdr.cmdline_size = boot.cmdline_len;
    if let Some((start, len)) = boot.initrd {
        // Both lie below 3 GiB.
        params.hdr.ramdisk_image = start.0 as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    for (slot, range) in params.e820_table.iter_mut().zip(&boot.memory_map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.len,
            r#type: range.kind,
        };
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, at::ZERO_PAGE), ram)
        .map_err(|error| {
            Error::Guest(vm_memory::GuestMemoryError::IOError(std::io::Error::other(
                error.to_string(),
            )))
        })?;
    write_page_tables(ram)?;
    for (i, descriptor) in GDT.iter().enumerate() {
        ram.write_obj(*descriptor, GuestAddress(at::GDT.0 + 8 * i as u64))?;
    }
    Ok(Entry::Linux64(entry))
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 4096;
    let root = at::PAGE_TABLES.0;
    let pointers = root + PAGE;
    ram.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(root))?;
    for gib in 0..4 {
        let directory = pointers + PAGE * (gib + 1);
        ram.write_obj(
            directory | PRESENT_WRITABLE,
            GuestAddress(pointers + 8 * gib),
        )?;
        let mut entries = Vec::with_capacity(PAGE as usize);
        for page in 0..512u64 {
            let address = (gib << 30) | (page << 21);
            entries.extend_from_slice(&(address | PRESENT_WRITABLE | LARGE).to_le_bytes());
        }
        ram.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}
