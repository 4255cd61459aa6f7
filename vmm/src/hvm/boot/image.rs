//! What a kernel file is, told by its headers, and how it gets into memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use blanket_memory::GuestRam;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, bootparam};

use super::{Error, at};

/// Bytes that tell a kernel from anything else: a bzImage's header ends here.
const HEAD: usize = 0x268;

/// A kernel file whose headers are sound.
pub(super) struct Image {
    form: Form,
    /// What loading writes, piece by piece.
    pub(super) loaded: Vec<Range<u64>>,
    /// First byte behind all that the kernel needs to unpack itself.
    pub(super) end: u64,
    /// Highest address that the initrd may occupy.
    pub(super) initrd_max: u64,
}

enum Form {
    Elf(ElfHeader),
    BzImage,
}

/// How a loaded kernel starts.
pub(super) enum Start {
    Pvh(u64),
    Elf64(u64),
    /// Where it was loaded, and its header.
    BzImage(u64, Box<bootparam::setup_header>),
}

impl Image {
    /// Reads the headers and checks that the file holds all that they promise.
    pub(super) fn inspect(file: &mut File, path: &Path) -> Result<Self, Error> {
        let mut head = [0u8; HEAD];
        let len = read_head(file, &mut head).map_err(|source| Error::File {
            what: "kernel",
            path: path.to_owned(),
            source,
        })?;
        if head.starts_with(b"\x7fELF") {
            let header = elf_header(file, path)?;
            Ok(Self {
                loaded: header.segments.iter().map(Segment::loaded).collect(),
                end: header.segments.iter().map(Segment::end).max().unwrap_or(0),
                form: Form::Elf(header),
                initrd_max: u64::MAX,
            })
        } else if len > 0x206 && &head[0x202..0x206] == b"HdrS" {
            bzimage(file, path, &head)
        } else {
            Err(Error::Format {
                path: path.to_owned(),
                why: what_it_is(&head[..len]).to_owned(),
            })
        }
    }

    /// Whether it fits into `low` bytes of memory below the hole.
    pub(super) fn fits(&self, low: u64) -> Result<(), Error> {
        if self.end <= low {
            return Ok(());
        }
        Err(Error::Memory {
            what: "the kernel",
            needed_mib: self.end.div_ceil(1 << 20),
            have_mib: low >> 20,
        })
    }

    /// Copies it into guest memory.
    pub(super) fn load(
        &self,
        ram: &GuestRam,
        file: &mut File,
        path: &Path,
    ) -> Result<Start, Error> {
        let failed = |error: linux_loader::loader::Error| Error::Format {
            path: path.to_owned(),
            why: error.to_string(),
        };
        match &self.form {
            Form::Elf(header) => {
                let loaded = Elf::load(ram, None, file, None).map_err(failed)?;
                Ok(match loaded.pvh_boot_cap {
                    PvhBootCapability::PvhEntryPresent(entry) => Start::Pvh(entry.0),
                    _ => Start::Elf64(header.physical_entry()),
                })
            }
            Form::BzImage => {
                let loaded = BzImage::load(ram, None, file, Some(at::HIGH)).map_err(failed)?;
                let header = loaded.setup_header.unwrap_or_default();
                Ok(Start::BzImage(loaded.kernel_load.0, Box::new(header)))
            }
        }
    }
}

/// Checks a bzImage by its header (Documentation/arch/x86/boot.rst).
fn bzimage(file: &mut File, path: &Path, head: &[u8; HEAD]) -> Result<Image, Error> {
    /// `xloadflags`: the image has a 64-bit entry point.
    const XLF_KERNEL_64: u16 = 1;
    let size = file.seek(SeekFrom::End(0)).unwrap_or(0);
    // The real-mode part, and the protected-mode part in 16-byte units.
    let setup = (u64::from(head[0x1f1].max(1)) + 1) * 512;
    let promised = setup + u64::from(u32_at(head, 0x1f4)) * 16;
    if size < promised.max(HEAD as u64) {
        return Err(Error::Truncated {
            path: path.to_owned(),
            why: format!("it has {size} of {promised} bytes"),
        });
    }
    if u16_at(head, 0x206) < 0x20c || u16_at(head, 0x236) & XLF_KERNEL_64 == 0 {
        return Err(Error::Format {
            path: path.to_owned(),
            why: "it has no 64-bit entry (a 32-bit kernel, or one before Linux 3.8)".to_owned(),
        });
    }
    // It is loaded at 1 MiB and unpacks itself to its preferred address.
    let unpacked = u64_at(head, 0x258).saturating_add(u64::from(u32_at(head, 0x260)));
    Ok(Image {
        form: Form::BzImage,
        loaded: std::iter::once(at::HIGH.0..at::HIGH.0 + size).collect(),
        end: unpacked.max(at::HIGH.0 + size),
        initrd_max: u64::from(u32_at(head, 0x22c)),
    })
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

/// What is checked of an ELF image before it is loaded.
struct ElfHeader {
    entry: u64,
    segments: Vec<Segment>,
}

struct Segment {
    virtual_start: u64,
    physical_start: u64,
    /// Bytes in the file.
    file_len: u64,
    /// Bytes in memory.
    len: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.physical_start.saturating_add(self.len)
    }

    fn loaded(&self) -> Range<u64> {
        self.physical_start..self.physical_start.saturating_add(self.file_len)
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
            file_len: len,
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

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (0..8).fold(0, |value, i| value | u64::from(bytes[at + i]) << (8 * i))
}
