//! From a kernel file to the first instruction.
//!
//! Three forms are known: a bzImage and a 64-bit ELF image start by Linux's
//! 64-bit boot protocol (Documentation/arch/x86/boot.rst), an ELF image with a
//! PVH note by Xen's (docs/misc/pvh.pandoc), which needs no page tables of ours.

mod linux64;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use blanket_devices::{acpi, platform};
use blanket_memory::GuestRam;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, bootparam};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

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
}

impl Payload {
    /// Opens the files.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, Error> {
        Ok(Self {
            kernel: (open("kernel", kernel)?, kernel.to_owned()),
            initrd: initrd
                .map(|path| Ok::<_, Error>((open("initrd", path)?, path.to_owned())))
                .transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }

    /// Loads everything into guest memory.
    ///
    /// # Errors
    /// The kernel is of no known form, truncated, or does not fit.
    pub fn load(&mut self, ram: &GuestRam, cpus: u8) -> Result<Entry, Error> {
        let kernel = self.load_kernel(ram)?;
        let mut cmdline = self.cmdline.clone().into_bytes();
        cmdline.push(0);
        ram.write_slice(&cmdline, at::CMDLINE)?;
        let initrd = self.load_initrd(ram, &kernel)?;
        let rsdp = acpi::write_tables(ram, cpus)?;
        let boot = Boot {
            memory_map: memory_map(ram),
            initrd,
            rsdp,
            cmdline_len: self.cmdline.len() as u32,
        };
        match kernel.start {
            Start::Pvh(entry) => pvh::prepare(ram, &boot, entry),
            Start::Elf64(entry) => linux64::prepare(ram, &boot, entry, None),
            Start::BzImage(load, header) => {
                linux64::prepare(ram, &boot, load + linux64::ENTRY_OFFSET, Some(*header))
            }
        }
    }

    fn load_kernel(&mut self, ram: &GuestRam) -> Result<Kernel, Error> {
        let (file, path) = &mut self.kernel;
        let mut magic = [0u8; 0x260];
        let len = read_head(file, &mut magic).map_err(|source| Error::File {
            what: "kernel",
            path: path.clone(),
            source,
        })?;
        if magic.starts_with(b"\x7fELF") {
            load_elf(ram, file, path)
        } else if len > 0x206 && &magic[0x202..0x206] == b"HdrS" {
            load_bzimage(ram, file, path)
        } else {
            Err(Error::Format {
                path: path.clone(),
                why: what_it_is(&magic[..len]).to_owned(),
            })
        }
    }

    /// Puts the initrd as high as the kernel lets it.
    fn load_initrd(
        &mut self,
        ram: &GuestRam,
        kernel: &Kernel,
    ) -> Result<Option<(GuestAddress, u64)>, Error> {
        const PAGE: u64 = 4096;
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
        if size == 0 {
            return Err(Error::EmptyInitrd(path.clone()));
        }
        let top = low_memory(ram).min(kernel.initrd_max.saturating_add(1));
        let start = top
            .checked_sub(size)
            .map(|start| start & !(PAGE - 1))
            .filter(|start| *start >= kernel.end)
            .ok_or(Error::Memory {
                what: "the kernel with its initrd",
                needed_mib: (kernel.end + size).div_ceil(1 << 20),
                have_mib: low_memory(ram) >> 20,
            })?;
        let read = usize::try_from(size)
            .map_err(io::Error::other)
            .and_then(|len| {
                ram.read_exact_volatile_from(GuestAddress(start), file, len)
                    .map_err(io::Error::other)
            });
        read.map_err(file_error)?;
        Ok(Some((GuestAddress(start), size)))
    }
}

/// What the kernel is told about its machine.
struct Boot {
    memory_map: Vec<Range>,
    initrd: Option<(GuestAddress, u64)>,
    rsdp: GuestAddress,
    cmdline_len: u32,
}

/// A line of the memory map, with the type of E820 and PVH (1 RAM, 2 reserved).
struct Range {
    start: u64,
    len: u64,
    kind: u32,
}

/// A loaded kernel.
struct Kernel {
    start: Start,
    /// First byte behind all that the kernel needs to unpack itself.
    end: u64,
    /// Highest address that the initrd may occupy.
    initrd_max: u64,
}

enum Start {
    Pvh(u64),
    Elf64(u64),
    BzImage(u64, Box<bootparam::setup_header>),
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

fn read_head(file: &mut File, out: &mut [u8]) -> io::Result<usize> {
    file.rewind()?;
    let mut len = 0;
    while len < out.len() {
        match file.read(&mut out[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

/// A guess at what somebody took for a kernel, for the error message.
fn what_it_is(head: &[u8]) -> &'static str {
    match head {
        [] => "it is empty",
        [0x1f, 0x8b, ..] => "it is a gzip file (unpack it first)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is a zstd file (unpack it first)",
        [b'Q', b'F', b'I', 0xfb, ..] => "it is a qcow2 disk image",
        [b'0', b'7', b'0', b'7', ..] => "it is an initrd (cpio)",
        _ => "it has neither an ELF nor a bzImage header",
    }
}

fn low_memory(ram: &GuestRam) -> u64 {
    ram.find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

fn needs(ram: &GuestRam, end: u64) -> Result<(), Error> {
    if end <= low_memory(ram) {
        return Ok(());
    }
    Err(Error::Memory {
        what: "the kernel",
        needed_mib: end.div_ceil(1 << 20),
        have_mib: low_memory(ram) >> 20,
    })
}

fn load_elf(ram: &GuestRam, file: &mut File, path: &Path) -> Result<Kernel, Error> {
    let header = elf_header(file, path)?;
    for segment in &header.segments {
        needs(ram, segment.end())?;
    }
    let loaded = Elf::load(ram, None, file, None).map_err(|error| Error::Format {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    let start = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Start::Pvh(entry.0),
        _ => Start::Elf64(header.physical_entry()),
    };
    Ok(Kernel {
        start,
        end: loaded.kernel_end,
        initrd_max: u64::MAX,
    })
}

/// What is checked of an ELF image before it is loaded.
struct ElfHeader {
    entry: u64,
    segments: Vec<Segment>,
}

struct Segment {
    virtual_start: u64,
    physical_start: u64,
    len: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.physical_start.saturating_add(self.len)
    }
}

impl ElfHeader {
    /// The entry as a physical address: a vmlinux states a virtual one if its
    /// maker linked it so.
    fn physical_entry(&self) -> u64 {
        self.segments
            .iter()
            .find(|s| {
                (s.virtual_start..s.virtual_start.saturating_add(s.len)).contains(&self.entry)
            })
            .map_or(self.entry, |s| {
                s.physical_start + (self.entry - s.virtual_start)
            })
    }
}

/// Reads the headers and checks that the file holds all that they promise.
fn elf_header(file: &mut File, path: &Path) -> Result<ElfHeader, Error> {
    const PT_LOAD: u32 = 1;
    const EM_X86_64: u16 = 62;
    let truncated = |why: &str| Error::Truncated {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    let format = |why: &str| Error::Format {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(|_| truncated("it cannot be read"))?;
    let mut head = [0u8; 64];
    if read_head(file, &mut head).unwrap_or(0) < head.len() {
        return Err(truncated("it ends within the ELF header"));
    }
    if head[4] != 2 || u16_at(&head, 18) != EM_X86_64 {
        return Err(format("it is an ELF image for another processor"));
    }
    let (offset, count) = (u64_at(&head, 32), u16_at(&head, 56));
    let mut headers = vec![0u8; usize::from(count) * 56];
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(&mut headers))
        .map_err(|_| truncated("it ends within the program headers"))?;
    let mut segments = Vec::new();
    for header in headers.chunks_exact(56) {
        if u32_at(header, 0) != PT_LOAD {
            continue;
        }
        let (at, len) = (u64_at(header, 8), u64_at(header, 32));
        if at.checked_add(len).is_none_or(|end| end > size) {
            return Err(truncated("it ends within a segment"));
        }
        segments.push(Segment {
            virtual_start: u64_at(header, 16),
            physical_start: u64_at(header, 24),
            len: u64_at(header, 40),
        });
    }
    if segments.is_empty() {
        return Err(format("the ELF image has nothing to load"));
    }
    Ok(ElfHeader {
        entry: u64_at(&head, 24),
        segments,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (0..8).fold(0, |value, i| value | u64::from(bytes[at + i]) << (8 * i))
}

fn load_bzimage(ram: &GuestRam, file: &mut File, path: &Path) -> Result<Kernel, Error> {
    /// `xloadflags`: the image has a 64-bit entry point.
    const XLF_KERNEL_64: u16 = 1;
    let size = file.seek(SeekFrom::End(0)).unwrap_or(0);
    needs(ram, at::HIGH.0 + size)?;
    let loaded = BzImage::load(ram, None, file, Some(at::HIGH)).map_err(|error| Error::Format {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    let header = loaded.setup_header.unwrap_or_default();
    // The protected-mode part is counted in 16-byte units.
    let promised =
        (u64::from(header.setup_sects.max(1)) + 1) * 512 + u64::from(header.syssize) * 16;
    if size < promised {
        return Err(Error::Truncated {
            path: path.to_owned(),
            why: format!("it has {size} of {promised} bytes"),
        });
    }
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::Format {
            path: path.to_owned(),
            why: "it has no 64-bit entry (a 32-bit kernel, or one before Linux 3.8)".to_owned(),
        });
    }
    // It unpacks itself to its preferred address.
    let end = header
        .pref_address
        .saturating_add(u64::from(header.init_size))
        .max(loaded.kernel_end);
    needs(ram, end)?;
    Ok(Kernel {
        start: Start::BzImage(loaded.kernel_load.0, Box::new(header)),
        end,
        initrd_max: u64::from(header.initrd_addr_max),
    })
}

/// RAM without the BIOS area, and what is reserved for devices.
fn memory_map(ram: &GuestRam) -> Vec<Range> {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let high = at::HIGH.0;
    let mut map = vec![
        Range {
            start: 0,
            len: at::LOW_END,
            kind: RAM,
        },
        Range {
            start: platform::ACPI_START,
            len: platform::ACPI_END - platform::ACPI_START,
            kind: RESERVED,
        },
        Range {
            start: high,
            len: low_memory(ram).saturating_sub(high),
            kind: RAM,
        },
        Range {
            start: platform::ECAM_START,
            len: blanket_devices::pci::bus::ECAM_SIZE,
            kind: RESERVED,
        },
    ];
    map.extend(
        ram.iter()
            .filter(|region| region.start_addr().0 != 0)
            .map(|region| Range {
                start: region.start_addr().0,
                len: region.len(),
                kind: RAM,
            }),
    );
    map
}

#[cfg(test)]
mod tests;
