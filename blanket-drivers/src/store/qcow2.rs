//! qcow2 images and their backing files, through `imago`.
//!
//! The image is locked for its one writer, each backing file for readers. All
//! guest data goes through private buffers: `imago` works on slices, which
//! memory that a guest changes at will must not become.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use imago::file::File as Storage;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions};

use super::transfer::{Limits, Transfer, carry_out};
use super::{Completion, Operation, Request, Spec, lock};

/// Most layers of backing files: an image may name itself as its backing file.
const MAX_LAYERS: usize = 64;

/// An open qcow2 image with everything below it.
#[derive(Debug)]
pub(super) struct Layers {
    /// Reads, writes and flushes share it (`imago` locks what it must);
    /// a discard breaks mappings that they use, so it has it alone.
    access: RwLock<FormatAccess<Storage>>,
    limits: Limits,
}

impl Layers {
    /// Opens the image in `file`, at `path`; the file is as `spec` says.
    pub(super) fn open(file: File, path: &Path, spec: &Spec) -> io::Result<Self> {
        let (readonly, direct) = (spec.readonly, spec.direct);
        let options = StorageOpenOptions::new()
            .filename(path)
            .write(!readonly)
            .direct(direct);
        let storage = Storage::from_open_file(file, options)?;
        let image = Qcow2::<Storage>::builder(storage)
            .write(!readonly)
            .storage_open_options(StorageOpenOptions::new().direct(direct))
            .open(Gate {
                layers: 1,
                backing: spec.backing,
            })?;
        let access = FormatAccess::new(image);
        let sector = super::SECTOR;
        let limits = Limits {
            capacity: access.size() / sector * sector,
            block: 512,
            mem_align: access.mem_align(),
            readonly,
            discard: !readonly,
            keep_raw: false,
            private: true,
            durable: false,
            device: false,
        };
        Ok(Self {
            access: RwLock::new(access),
            limits,
        })
    }

    /// What requests are checked against.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Carries out a request.
    pub(super) fn run(&self, request: Request) -> Completion {
        carry_out(request, &self.limits, |transfer| match transfer.operation {
            Operation::Flush => self.flush(),
            Operation::Discard | Operation::WriteZeroes => self.give_back(transfer),
            Operation::Read | Operation::Write => self.move_bytes(transfer),
        })
    }

    /// Makes everything that has completed durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.limits.readonly {
            return Ok(());
        }
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        access.flush()?;
        access.sync()
    }

    fn move_bytes(&self, transfer: &mut Transfer) -> io::Result<()> {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        while !transfer.is_done() {
            transfer.piece(&self.limits)?;
            let (write, offset) = (transfer.operation == Operation::Write, transfer.offset);
            let Some(piece) = transfer.private_piece() else {
                return Err(io::Error::other("no private buffer"));
            };
            let len = piece.len();
            if write {
                access.write(&*piece, offset)?;
            } else {
                access.read(piece, offset)?;
            }
            transfer.advance(u32::try_from(len).map_err(io::Error::other)?);
        }
        Ok(())
    }

    fn give_back(&self, transfer: &Transfer) -> io::Result<()> {
        let (offset, len) = (transfer.offset, transfer.len);
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        if transfer.operation == Operation::Discard {
            return match access.discard_to_any(offset, len) {
                // A discard is a hint.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            };
        }
        match access.discard_to_zero(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                access.write_zeroes(offset, len)
            }
            other => other,
        }
    }
}

/// Makes a qcow2 image at `path` whose content is `backing`'s until it is
/// written to: that one is not written to any more then.
///
/// # Errors
/// There is a file at `path`, or `backing` cannot be read.
pub fn create_overlay(path: &Path, backing: &Path) -> io::Result<()> {
    let base = super::Image::open(&Spec {
        path: backing.to_owned(),
        readonly: true,
        format: None,
        direct: false,
        backing: true,
        engine: super::Engine::Sync,
        stripe: Vec::new(),
    })
    .map_err(io::Error::other)?;
    let name = std::path::absolute(backing)?;
    let name = name.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
    let format = match base.format() {
        super::Format::Qcow2 => "qcow2",
        super::Format::Raw => "raw",
    };
    // Whoever reads it reads the guest's data.
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.read(true).write(true).create_new(true).open(path)?;
    let options = StorageOpenOptions::new().filename(path).write(true);
    Qcow2::<Storage>::create_builder(Storage::from_open_file(file, options)?)
        .size(base.capacity())
        .backing(name.to_owned(), format.to_owned())
        .create()
}

/// Most bytes of the two tables that are kept in memory as long as the image is
/// open: the L1 and the refcount table (QEMU's limits, in its `block/qcow2.h`).
/// Without them a short image with a long hole would take all memory.
const MAX_L1_TABLE: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// Opens what an image refers to: for reading only, and locked.
struct Gate {
    layers: usize,
    /// Whether the image may have backing files at all.
    backing: bool,
}

impl ImplicitOpenGate<Storage> for Gate {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        if self.layers >= MAX_LAYERS {
            return Err(io::Error::other(format!(
                "more than {MAX_LAYERS} layers of backing files: does one name itself?"
            )));
        }
        let gate = Gate {
            layers: self.layers + 1,
            backing: self.backing,
        };
        Ok(FormatAccess::new(builder.open(gate)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options
            .get_filename()
            .ok_or_else(|| io::Error::other("an image refers to a file without a name"))?;
        if !self.backing {
            return Err(io::Error::other(format!(
                "it refers to another file, {}: say backing=on if whoever made the image may read that",
                path.display()
            )));
        }
        if options.get_writable() {
            return Err(io::Error::other(
                "external data files are not supported: convert the image with `qemu-img convert`",
            ));
        }
        let file = super::image::open_file(path, true)?;
        if !lock::take(&file, false)? {
            return Err(io::Error::other(
                "it is being written by another VM: stop that one first",
            ));
        }
        if options.get_direct() {
            super::probe::set_direct(&file)?;
        }
        Storage::from_open_file(file, options)
    }
}

/// Checks that the image's tables lie inside its file: past the end they would
/// read as zeros, and a cut image as an empty disk. (qcow2 specification,
/// "Header" and "Cluster mapping".) And that they are not too large to be kept.
pub(super) fn check_tables(file: &File) -> io::Result<()> {
    let cut = || {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the file ends before its tables do: it was cut (an incomplete copy?); copy it again",
        )
    };
    let end = file.metadata()?.len();
    let mut header = [0u8; 72];
    file.read_exact_at(&mut header, 0).map_err(|_| cut())?;
    let u32_at = |at: usize| u64::from(u32::from_be_bytes(std::array::from_fn(|i| header[at + i])));
    let u64_at = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    let cluster_bits = u32_at(20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("clusters of 2^{cluster_bits} bytes: the header is damaged"),
        ));
    }
    let cluster = 1u64 << cluster_bits;
    let inside = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|last| last <= end);
    let (l1_entries, l1_offset) = (u32_at(36), u64_at(40));
    let (refcounts, refcount_clusters) = (u64_at(48), u32_at(56));
    if l1_entries * 8 > MAX_L1_TABLE || refcount_clusters * cluster > MAX_REFCOUNT_TABLE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its tables are larger than any image needs: the header is damaged",
        ));
    }
    if !inside(l1_offset, l1_entries * 8) || !inside(refcounts, refcount_clusters * cluster) {
        return Err(cut());
    }
    // Within the file, so bounded by it.
    let mut table = vec![0u8; usize::try_from(l1_entries * 8).map_err(io::Error::other)?];
    file.read_exact_at(&mut table, l1_offset)?;
    let l2_offsets = table.chunks_exact(8).map(|entry| {
        // Bits 9 to 55 are the offset.
        u64::from_be_bytes(std::array::from_fn(|i| entry[i])) & 0x00ff_ffff_ffff_fe00
    });
    for offset in l2_offsets.filter(|offset| *offset != 0) {
        if !inside(offset, cluster) {
            return Err(cut());
        }
    }
    Ok(())
}
