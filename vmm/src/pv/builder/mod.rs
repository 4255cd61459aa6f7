//! From the file of a Linux kernel to a Xen PV domain that is about to execute
//! its first instruction.
//!
//! The kernel's ELF image is taken out of its bzImage and copied straight into
//! guest memory. Behind it lie, as Xen's own builder places them: start_info,
//! the rings of xenstore and console, the first page tables, the boot stack,
//! the table of frames (an identity: the domain's frames are the machine's) and
//! the initrd.

mod elf;
mod notes;
mod payload;
mod tables;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::abi::{
    self, HYPERCALL_IRET, HYPERCALL_STUB, MAX_GUEST_CMDLINE, PAGE_SIZE, SIF_MOD_START_PFN,
    StartInfo,
};
use elf::Head;
use notes::Notes;
use tables::Layout;

/// Why a domain cannot be built.
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
    /// The file is no Linux kernel for this processor.
    #[error(
        "{path} is not a kernel for this machine: {why}; use a bzImage (vmlinuz) or an ELF image (vmlinux) of Linux for x86-64"
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
    /// The kernel cannot run as a paravirtual guest.
    #[error(
        "kernel {path} cannot run on a pv machine: {why}; use --machine hvm, or a kernel with CONFIG_XEN_PV such as Debian's"
    )]
    NoPv {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// It does not fit into guest memory.
    #[error(
        "{what} needs {needed_mib} MiB but the guest has {have_mib} MiB; give it more with --memory"
    )]
    Memory {
        /// `the kernel` or `the kernel with its initrd`.
        what: &'static str,
        /// MiB that would do.
        needed_mib: u64,
        /// MiB that are there.
        have_mib: u64,
    },
    /// The initrd is empty.
    #[error("initrd {0} is empty")]
    EmptyInitrd(PathBuf),
    /// The command line is too long for Xen's ABI.
    #[error("the kernel command line has {0} bytes, but a pv machine takes {max} at most; shorten it or use --machine hvm", max = MAX_GUEST_CMDLINE - 1)]
    Cmdline(usize),
    /// Guest memory could not be written.
    #[error("cannot prepare guest memory: {0}")]
    Guest(#[from] GuestMemoryError),
}

/// What is wrong with a kernel, without its path.
#[derive(Debug)]
enum Problem {
    Read(io::Error),
    Format(String),
    Truncated(String),
    NoPv(&'static str),
    Feature(String),
    /// Bytes of memory that would do.
    Memory(u64),
    Guest(GuestMemoryError),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl From<GuestMemoryError> for Problem {
    fn from(error: GuestMemoryError) -> Self {
        Self::Guest(error)
    }
}

/// The kernel files of a domain, kept open so that it can start again when the
/// files' names are out of reach.
pub struct Kernel {
    kernel: (File, PathBuf),
    initrd: Option<(File, PathBuf, u64)>,
    cmdline: String,
    memory: u64,
}

/// The ports of a domain's two first event channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Of the xenstore.
    pub store: u32,
    /// Of the console.
    pub console: u32,
}

/// How the first vCPU starts, and where the builder has put what others need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Virtual address of the first instruction.
    pub entry: u64,
    /// Virtual address of start_info, for RSI.
    pub start_info: u64,
    /// Virtual address behind the boot stack, for RSP.
    pub stack: u64,
    /// The top page table.
    pub l4: GuestAddress,
    /// Frames of all page tables, `l4` first.
    pub page_tables: std::ops::Range<u64>,
    /// The ring of the xenstore.
    pub store_page: GuestAddress,
    /// The ring of the console.
    pub console_page: GuestAddress,
}

impl Kernel {
    /// Opens the files, for a domain with `memory` bytes of RAM.
    ///
    /// # Errors
    /// A file is missing, holds no kernel, or the command line is too long.
    pub fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
        memory: u64,
    ) -> Result<Self, Error> {
        let this = Self::open_unread(kernel, initrd, cmdline, memory)?;
        this.head().map_err(|problem| this.explain(problem))?;
        Ok(this)
    }

    /// The same without a look at what the kernel's file holds: that takes its
    /// time, and a guest that goes on may never need it.
    ///
    /// # Errors
    /// A file is missing, or the command line is too long.
    pub fn open_unread(
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
        memory: u64,
    ) -> Result<Self, Error> {
        if cmdline.len() >= MAX_GUEST_CMDLINE {
            return Err(Error::Cmdline(cmdline.len()));
        }
        let open = |what, path: &Path| {
            File::open(path).map_err(|source| Error::File {
                what,
                path: path.to_owned(),
                source,
            })
        };
        let initrd = initrd
            .map(|path| {
                let mut file = open("initrd", path)?;
                let size = file.seek(SeekFrom::End(0)).map_err(|source| Error::File {
                    what: "initrd",
                    path: path.to_owned(),
                    source,
                })?;
                if size == 0 {
                    return Err(Error::EmptyInitrd(path.to_owned()));
                }
                Ok((file, path.to_owned(), size))
            })
            .transpose()?;
        Ok(Self {
            kernel: (open("kernel", kernel)?, kernel.to_owned()),
            initrd,
            cmdline: cmdline.to_owned(),
            memory,
        })
    }

    /// Decompresses the kernel as far as needed to find out whether it can run
    /// as a paravirtual guest at all. [`Kernel::build`] finds out by itself.
    ///
    /// # Errors
    /// It cannot, or is damaged.
    pub fn check(&self) -> Result<(), Error> {
        let notes = self
            .head()
            .and_then(|(head, mut stream)| head.notes(&mut stream));
        notes.map_err(|problem| self.explain(problem))?;
        Ok(())
    }

    /// Makes a domain of it in `ram`. `shared_info` is where that page lies.
    ///
    /// # Errors
    /// The kernel cannot run as a paravirtual guest, is damaged, or does not fit.
    pub fn build(
        &self,
        ram: &GuestRam,
        shared_info: GuestAddress,
        ports: Ports,
    ) -> Result<Start, Error> {
        let loaded = self
            .head()
            .and_then(|(head, mut stream)| head.load(&mut stream, ram, self.memory));
        let (notes, end) = loaded.map_err(|problem| self.explain(problem))?;
        let initrd = self.initrd.as_ref().map_or(0, |(.., size)| *size);
        let layout = Layout::new(&notes, end, self.memory, initrd)
            .ok_or_else(|| self.explain(Problem::NoPv("its addresses make no sense")))?;
        if layout.end > self.memory {
            return Err(self.does_not_fit("the kernel with its initrd", layout.end));
        }
        self.write_hypercall_page(ram, &notes, end)?;
        // On a restart the last life's frames are still there.
        for page in [layout.start_info, layout.store, layout.console] {
            clear_page(ram, page)?;
        }
        layout.write_page_tables(ram)?;
        layout.write_frames(ram)?;
        self.load_initrd(ram, layout.initrd)?;
        let info = self.start_info(&layout, &notes, shared_info, ports);
        ram.write_obj(info, GuestAddress(layout.start_info))?;
        Ok(Start {
            entry: notes.entry,
            start_info: layout.virt(layout.start_info),
            stack: layout.virt(layout.stack) + PAGE_SIZE,
            l4: GuestAddress(layout.tables.start),
            page_tables: layout.tables.start / PAGE_SIZE..layout.tables.end / PAGE_SIZE,
            store_page: GuestAddress(layout.store),
            console_page: GuestAddress(layout.console),
        })
    }

    /// The ELF headers, and the stream behind them.
    fn head(&self) -> Result<(Head, payload::Stream<'_>), Problem> {
        let mut stream = payload::open(&self.kernel.0)?;
        Ok((Head::read(&mut stream)?, stream))
    }

    fn explain(&self, problem: Problem) -> Error {
        let path = self.kernel.1.clone();
        match problem {
            Problem::Read(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                let why = "it ends within its headers or its compressed payload".to_owned();
                Error::Truncated { path, why }
            }
            // The file's own errors have a number; the decompressors' have not.
            Problem::Read(source) if source.raw_os_error().is_none() => Error::Format {
                path,
                why: format!("its payload is damaged: {source}"),
            },
            Problem::Read(source) => Error::File {
                what: "kernel",
                path,
                source,
            },
            Problem::Format(why) => Error::Format { path, why },
            Problem::Truncated(why) => Error::Truncated { path, why },
            Problem::NoPv(why) => Error::NoPv {
                path,
                why: why.to_owned(),
            },
            Problem::Feature(name) => Error::NoPv {
                path,
                why: format!("it needs Xen's feature {name}"),
            },
            Problem::Memory(needed) => self.does_not_fit("the kernel", needed),
            Problem::Guest(error) => Error::Guest(error),
        }
    }

    fn does_not_fit(&self, what: &'static str, needed: u64) -> Error {
        Error::Memory {
            what,
            needed_mib: needed.div_ceil(1 << 20),
            have_mib: self.memory >> 20,
        }
    }

    /// Writes the stubs by which kernels up to 6.12 make hypercalls.
    fn write_hypercall_page(&self, ram: &GuestRam, notes: &Notes, end: u64) -> Result<(), Error> {
        let Some(virt) = notes.hypercall_page else {
            return Ok(());
        };
        let page = virt.wrapping_sub(notes.virt_base);
        if page % PAGE_SIZE != 0 || page >= end {
            let problem = Problem::NoPv("its hypercall page is not in the image");
            return Err(self.explain(problem));
        }
        for number in 0..(PAGE_SIZE as usize / HYPERCALL_STUB) as u32 {
            let at = page + u64::from(number) * HYPERCALL_STUB as u64;
            ram.write_slice(&hypercall_stub(number), GuestAddress(at))?;
        }
        Ok(())
    }

    fn load_initrd(&self, ram: &GuestRam, at: u64) -> Result<(), Error> {
        let Some((file, path, size)) = &self.initrd else {
            return Ok(());
        };
        let failed = |source| Error::File {
            what: "initrd",
            path: path.clone(),
            source,
        };
        let mut file = file;
        file.rewind().map_err(failed)?;
        let len = usize::try_from(*size).map_err(|error| failed(io::Error::other(error)))?;
        ram.read_exact_volatile_from(GuestAddress(at), &mut file, len)
            .map_err(|error| failed(io::Error::other(error)))
    }

    fn start_info(
        &self,
        layout: &Layout,
        notes: &Notes,
        shared_info: GuestAddress,
        ports: Ports,
    ) -> StartInfo {
        let mut magic = [0; 32];
        magic[..14].copy_from_slice(b"xen-3.0-x86_64");
        let mut cmd_line = [0; MAX_GUEST_CMDLINE];
        // Its length was checked on opening.
        cmd_line[..self.cmdline.len()].copy_from_slice(self.cmdline.as_bytes());
        let (flags, mod_start, mod_len) = match &self.initrd {
            Some((.., size)) => (SIF_MOD_START_PFN, layout.initrd / PAGE_SIZE, *size),
            None => (0, 0, 0),
        };
        StartInfo {
            magic,
            nr_pages: self.memory / PAGE_SIZE,
            shared_info: shared_info.0,
            flags,
            pad0: 0,
            store_mfn: layout.store / PAGE_SIZE,
            store_evtchn: ports.store,
            pad1: 0,
            console_mfn: layout.console / PAGE_SIZE,
            console_evtchn: ports.console,
            pad2: 0,
            pt_base: layout.virt(layout.tables.start),
            nr_pt_frames: (layout.tables.end - layout.tables.start) / PAGE_SIZE,
            mfn_list: notes.init_p2m,
            mod_start,
            mod_len,
            cmd_line,
            first_p2m_pfn: layout.frames / PAGE_SIZE,
            nr_p2m_frames: layout.frame_pages(),
        }
    }
}

fn clear_page(ram: &GuestRam, at: u64) -> Result<(), GuestMemoryError> {
    ram.write_slice(&[0; abi::PAGE_SIZE as usize], GuestAddress(at))
}

/// Code that makes hypercall `number`, as Xen writes it.
fn hypercall_stub(number: u32) -> [u8; HYPERCALL_STUB] {
    let mut stub = [0xcc; HYPERCALL_STUB];
    let n = number.to_le_bytes();
    if number == HYPERCALL_IRET {
        // push %rcx; push %r11; push %rax; mov $n,%eax; syscall
        let code = [
            0x51, 0x41, 0x53, 0x50, 0xb8, n[0], n[1], n[2], n[3], 0x0f, 0x05,
        ];
        stub[..code.len()].copy_from_slice(&code);
    } else {
        // push %rcx; push %r11; mov $n,%eax; syscall; pop %r11; pop %rcx; ret
        let code = [
            0x51, 0x41, 0x53, 0xb8, n[0], n[1], n[2], n[3], 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3,
        ];
        stub[..code.len()].copy_from_slice(&code);
    }
    stub
}
