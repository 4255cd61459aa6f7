//! From a kernel file to the first instruction.
//!
//! Three forms are known: a bzImage and a 64-bit ELF image start by Linux's
//! 64-bit boot protocol (Documentation/arch/x86/boot.rst), an ELF image with a
//! PVH note by Xen's (docs/misc/pvh.pandoc), which needs no page tables of ours.

mod image;
mod linux64;
mod pvh;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use blanket_devices::legacy::power;
use blanket_devices::{acpi, platform};
use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use image::{Image, Start};

/// Low memory as the first instruction finds it.
mod at {
    use vm_memory::GuestAddress;
    /// The segment descriptors.
    pub(super) const GDT: GuestAddress = GuestAddress(0x500);
    /// PVH's start_info, and behind it modules and memory map.
    pub(super) const START_INFO: GuestAddress = GuestAddress(0x6000);
    pub(super) const MODULES: GuestAddress = GuestAddress(0x6100);
    pub(super) const MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
    /// Linux's boot_params ("zero page").
    pub(super) const ZERO_PAGE: GuestAddress = GuestAddress(0x8000);
    /// Page tables: six pages from here on.
    pub(super) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
    /// The command line.
    pub(super) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
    /// End of conventional memory: the extended BIOS data area of old.
    pub(super) const LOW_END: u64 = 0x9_fc00;
    /// Where kernels are loaded.
    pub(super) const HIGH: GuestAddress = GuestAddress(0x10_0000);
}

/// Where [`super::registers`] points the processor.
pub(super) const GDT_ADDRESS: u64 = at::GDT.0;
pub(super) const PAGE_TABLES_ADDRESS: u64 = at::PAGE_TABLES.0;
pub(super) const START_INFO_ADDRESS: u64 = at::START_INFO.0;
pub(super) const ZERO_PAGE_ADDRESS: u64 = at::ZERO_PAGE.0;

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("cannot read {what} {path}: {source}")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no kernel for this machine.
    #[error(
        "{path} is not a kernel for this machine: {why}; use a bzImage (vmlinuz), an ELF image with a PVH note, or a 64-bit ELF image (vmlinux)"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        why: String,
    },
    /// The file ends too early.
    #[error("kernel {path} is truncated: {why}; copy it again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// It does not fit into guest memory.
    #[error(
        "{what} needs {needed_mib} MiB but the guest has {have_mib} MiB below 3 GiB; give it more with --memory"
    )]
    Memory {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// MiB that would do.
        needed_mib: u64,
        /// MiB that are there.
        have_mib: u64,
    },
    /// The initrd is empty.
    #[error("initrd {0} is empty")]
    EmptyInitrd(PathBuf),
    /// The tables for the guest could not be written.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// Guest memory could not be written.
    #[error("cannot prepare guest memory: {0}")]
    Guest(#[from] vm_memory::GuestMemoryError),
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode at this address, boot_params in RSI.
    Linux64(u64),
    /// 32-bit protected mode at this address, start_info in EBX.
    Pvh(u64),
}

/// The kernel files of a VM, kept open so that it can start again when the
/// files' names are out of reach.
pub struct Payload {
    kernel: (File, PathBuf),
    initrd: Option<(File, PathBuf)>,
    cmdline: String,
    /// What loading the kernel writes, piece by piece.
    loaded: Vec<Range<u64>>,
    /// What the kernel takes first.
    ahead: Range<u64>,
}

impl Payload {
    /// Opens the files, for a guest with `memory` bytes of RAM.
    ///
    /// # Errors
    /// A file is missing, is no whole kernel of a known form, or does not fit.
    pub fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
        memory: u64,
    ) -> Result<Self, Error> {
        let low = blanket_memory::layout::regions(memory)[0].1;
        let mut file = open("kernel", kernel)?;
        let image = Image::inspect(&mut file, kernel)?;
        image.fits(low)?;
        let initrd = initrd.map(|path| open_initrd(path, &image, low));
        Ok(Self {
            kernel: (file, kernel.to_owned()),
            initrd: initrd.transpose()?,
            cmdline: cmdline.to_owned(),
            ahead: taken_first(&image, low),
            loaded: image.loaded,
        })
    }

    /// What populates the memory that the kernel is loaded to: zeroing it is
    /// most of what loading costs, and another thread can do its share.
    pub(super) fn populate_loaded(&self, ram: &GuestRam) -> impl FnOnce() + use<> {
        populate(ram, self.loaded.clone())
    }

    /// What populates the memory that the kernel takes first, for a thread
    /// beside the starting kernel.
    pub(super) fn populate_ahead(&self, ram: &GuestRam) -> impl FnOnce() + use<> {
        populate(ram, vec![self.ahead.clone()])
    }

    /// Loads everything into guest memory.
    ///
    /// # Errors
    /// The kernel is of no known form, truncated, or does not fit.
    pub fn load(&mut self, ram: &GuestRam, cpus: u8) -> Result<Entry, Error> {
        let (file, path) = &mut self.kernel;
        let image = Image::inspect(file, path)?;
        image.fits(low_memory(ram))?;
        let start = image.load(ram, file, path)?;
        let mut cmdline = self.cmdline.clone().into_bytes();
        cmdline.push(0);
        ram.write_slice(&cmdline, at::CMDLINE)?;
        let initrd = self.load_initrd(ram, &image)?;
        let rsdp = acpi::write_tables(ram, cpus)?;
        ram.write_slice(&reset_code(), GuestAddress(platform::RESET_VECTOR))?;
        let boot = Boot {
            memory_map: memory_map(ram),
            initrd,
            rsdp,
            cmdline_len: self.cmdline.len() as u32,
        };
        match start {
            Start::Pvh(entry) => pvh::prepare(ram, &boot, entry),
            Start::Elf64(entry) => linux64::prepare(ram, &boot, entry, None),
            Start::BzImage(load, header) => {
                linux64::prepare(ram, &boot, load + linux64::ENTRY_OFFSET, Some(*header))
            }
        }
    }

    fn load_initrd(
        &mut self,
        ram: &GuestRam,
        image: &Image,
    ) -> Result<Option<(GuestAddress, u64)>, Error> {
        let Some((file, path)) = &mut self.initrd else {
            return Ok(None);
        };
        let file_error = |source| Error::File {
            what: "initrd",
            path: path.clone(),
            source,
        };
        let size = file.seek(SeekFrom::End(0)).map_err(file_error)?;
        file.rewind().map_err(file_error)?;
        let start = initrd_start(image, size, low_memory(ram))?;
        let read = usize::try_from(size)
            .map_err(io::Error::other)
            .and_then(|len| {
                ram.read_exact_volatile_from(start, file, len)
                    .map_err(io::Error::other)
            });
        read.map_err(file_error)?;
        Ok(Some((start, size)))
    }
}

fn populate(ram: &GuestRam, ranges: Vec<Range<u64>>) -> impl FnOnce() + use<> {
    let ram = ram.clone();
    move || {
        for range in ranges.iter().rev() {
            let len = usize::try_from(range.end - range.start).unwrap_or(0);
            blanket_memory::populate(&ram, GuestAddress(range.start), len);
        }
    }
}

/// The memory that the kernel takes first: Linux goes upwards from its own end,
/// and by its init it has taken more than half of its image's size there. So
/// what this populates is none that the guest would have left alone.
fn taken_first(image: &Image, low: u64) -> Range<u64> {
    let loaded: u64 = image.loaded.iter().map(|r| r.end - r.start).sum();
    image.end..low.min(image.end.saturating_add(loaded / 2))
}

/// Opens an initrd and checks that it fits behind the kernel.
fn open_initrd(path: &Path, image: &Image, low: u64) -> Result<(File, PathBuf), Error> {
    let mut file = open("initrd", path)?;
    let size = file.seek(SeekFrom::End(0)).map_err(|source| Error::File {
        what: "initrd",
        path: path.to_owned(),
        source,
    })?;
    if size == 0 {
        return Err(Error::EmptyInitrd(path.to_owned()));
    }
    initrd_start(image, size, low)?;
    Ok((file, path.to_owned()))
}

/// Where an initrd of `size` bytes lies: as high as the kernel lets it.
fn initrd_start(image: &Image, size: u64, low: u64) -> Result<GuestAddress, Error> {
    const PAGE: u64 = 4096;
    low.min(image.initrd_max.saturating_add(1))
        .checked_sub(size)
        .map(|start| GuestAddress(start & !(PAGE - 1)))
        .filter(|start| start.0 >= image.end)
        .ok_or(Error::Memory {
            what: "the kernel with its initrd",
            needed_mib: image.end.saturating_add(size).div_ceil(1 << 20),
            have_mib: low >> 20,
        })
}

/// What the kernel is told about its machine.
struct Boot {
    memory_map: Vec<Line>,
    initrd: Option<(GuestAddress, u64)>,
    rsdp: GuestAddress,
    cmdline_len: u32,
}

/// A line of the memory map, with the type of E820 and PVH (1 RAM, 2 reserved).
struct Line {
    start: u64,
    len: u64,
    kind: u32,
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let file_error = |source| Error::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(file_error)?;
    if file.metadata().map_err(file_error)?.is_dir() {
        return Err(file_error(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    Ok(file)
}

/// What is at the reset vector: real-mode code that writes the reset register.
///
/// On a hardware-reduced ACPI machine without EFI, Linux prefers this way to
/// reboot to ACPI's: it takes the machine for one with EFI, then falls back to
/// the BIOS.
fn reset_code() -> [u8; 9] {
    let [low, high] = (platform::POWER_PORT + power::RESET).to_le_bytes();
    [
        0xb0,
        power::RESET_VALUE, // mov al, RESET_VALUE
        0xba,
        low,
        high, // mov dx, POWER_PORT + RESET
        0xee, // out dx, al
        0xf4, // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

fn low_memory(ram: &GuestRam) -> u64 {
    ram.find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

/// RAM without the BIOS area, and what is reserved for devices.
fn memory_map(ram: &GuestRam) -> Vec<Line> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let high = at::HIGH.0;
    let mut map = vec![
        Line {
            start: 0,
            len: at::LOW_END,
            kind: RAM,
        },
        Line {
            start: platform::ACPI_START,
            len: platform::BIOS_END - platform::ACPI_START,
            kind: RESERVED,
        },
        Line {
            start: high,
            len: low_memory(ram).saturating_sub(high),
            kind: RAM,
        },
        Line {
            start: platform::ECAM_START,
            len: blanket_devices::pci::bus::ECAM_SIZE,
            kind: RESERVED,
        },
    ];
    map.extend(
        ram.iter()
            .filter(|region| region.start_addr().0 != 0)
            .map(|region| Line {
                start: region.start_addr().0,
                len: region.len(),
                kind: RAM,
            }),
    );
    map
}

#[cfg(test)]
mod tests;
