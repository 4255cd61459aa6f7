//! What a file or a block device can do.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use blanket_memory::IoVec;
use imago::io_buffers::IoBuffer;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::raw::punch;

/// Size and block sizes, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// The whole file or device.
    pub(super) len: u64,
    /// Smallest unit of I/O.
    pub(super) logical: u32,
    /// Unit that is written at once below.
    pub(super) physical: u32,
}

/// Asks for sizes.
pub(super) fn geometry(mut file: &File) -> io::Result<Geometry> {
    let metadata = file.metadata()?;
    // Works for devices, too, whose metadata has no size.
    let len = file.seek(SeekFrom::End(0))?;
    let (logical, physical) = if metadata.file_type().is_block_device() {
        let (mut logical, mut physical) = (0 as libc::c_int, 0 as libc::c_uint);
        // SAFETY: both ioctls write one integer of the given type.
        let failed = unsafe {
            ioctl_with_mut_ref(file, libc::BLKSSZGET, &mut logical) < 0
                || ioctl_with_mut_ref(file, libc::BLKPBSZGET, &mut physical) < 0
        };
        if failed {
            return Err(io::Error::last_os_error());
        }
        (u32::try_from(logical).unwrap_or(512), physical)
    } else {
        // Network file systems call their best transfer size a block.
        (
            512,
            u32::try_from(metadata.blksize()).unwrap_or(4096).min(4096),
        )
    };
    Ok(Geometry {
        len,
        logical,
        physical: if physical.is_power_of_two() {
            physical.max(logical)
        } else {
            logical
        },
    })
}

/// Switches `file` to direct I/O.
pub(super) fn set_direct(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL involve no memory.
    let status = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT)
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The unit of direct I/O on `file` (already direct), at least `least`: found
/// by reading.
pub(super) fn direct_block(file: &File, least: u32) -> io::Result<u32> {
    let mut buffer = IoBuffer::new(8192, 4096)?;
    for block in [512u32, 1024, 2048, 4096] {
        let bytes = buffer.as_mut().into_slice();
        // SAFETY: [block, 2 * block) lies within the buffer's 8192 bytes. It is
        // aligned to `block` and no more, and so is the offset.
        let n = unsafe {
            libc::pread64(
                file.as_raw_fd(),
                bytes.as_mut_ptr().add(block as usize).cast(),
                block as usize,
                block.into(),
            )
        };
        if n >= 0 && block >= least {
            return Ok(block);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

/// Whether room can be given back. Changes nothing.
pub(super) fn discard(file: &File, geometry: &Geometry) -> bool {
    let Ok(metadata) = file.metadata() else {
        return false;
    };
    if !metadata.file_type().is_block_device() {
        // Behind the end, where there is nothing to lose.
        return punch(file, geometry.len.next_multiple_of(4096), 4096).is_ok();
    }
    queue_says(file, "write_zeroes_max_bytes").is_some_and(|most| most != "0")
}

/// The number of a block device, by which `/sys/dev/block` has it.
pub(super) fn device_number(file: &File) -> Option<(u32, u32)> {
    let metadata = file.metadata().ok()?;
    let rdev = metadata.rdev();
    let is_device = metadata.file_type().is_block_device();
    is_device.then(|| (libc::major(rdev), libc::minor(rdev)))
}

/// What the kernel says about a block device's queue.
fn queue_says(file: &File, attribute: &str) -> Option<String> {
    let (major, minor) = device_number(file)?;
    let device = format!("/sys/dev/block/{major}:{minor}");
    // A partition's queue is its disk's.
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = fs::read_to_string(format!("{device}/{queue}/{attribute}")).ok()?;
        Some(text.trim().to_owned())
    })
}

/// Whether a block device has no volatile cache: what it has completed is
/// durable.
pub(super) fn is_durable(file: &File) -> bool {
    queue_says(file, "write_cache").as_deref() == Some("write through")
}

/// Whether a block device has queues whose completions can be polled for.
pub(super) fn can_be_polled(file: &File) -> bool {
    queue_says(file, "io_poll").as_deref() == Some("1")
}

/// What a block device takes without cutting it into pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct AtOnce {
    /// Most bytes.
    bytes: usize,
    /// Most pages, or parts of one.
    pages: usize,
    /// What is not crossed: a multiple of this many bytes.
    chunk: u64,
}

/// The unit of a device's scatter lists.
const PAGE: usize = 4096;

impl AtOnce {
    /// Asks for it. Where the kernel does not tell, nothing is known to fit.
    pub(super) fn of(file: &File) -> Self {
        let number = |attribute| queue_says(file, attribute)?.parse::<usize>().ok();
        Self {
            bytes: number("max_sectors_kb").unwrap_or(0).saturating_mul(1024),
            pages: number("max_segments").unwrap_or(0),
            chunk: match number("chunk_sectors") {
                None | Some(0) => u64::MAX,
                Some(sectors) => sectors as u64 * 512,
            },
        }
    }

    /// Whether `piece`, at `offset` of the device, surely stays whole.
    pub(super) fn fits(&self, piece: &[IoVec], offset: u64) -> bool {
        let total = IoVec::total(piece);
        let pages = piece.iter().map(|vector| {
            let within = vector.as_ptr() as usize % PAGE;
            (within + vector.len()).div_ceil(PAGE)
        });
        // Some devices' lists have no gaps: only the first may begin, and only the last may end,
        // within a page.
        let joined = piece.windows(2).all(|pair| {
            let end = pair[0].as_ptr() as usize + pair[0].len();
            end.is_multiple_of(PAGE) && (pair[1].as_ptr() as usize).is_multiple_of(PAGE)
        });
        total <= self.bytes
            && pages.sum::<usize>() <= self.pages
            && joined
            && offset % self.chunk + total as u64 <= self.chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_surely_stays_whole_is_told_from_what_may_be_cut() {
        let device = AtOnce {
            bytes: 128 << 10,
            pages: 16,
            chunk: 1 << 20,
        };
        let piece = |all: &[(usize, usize)]| -> Vec<IoVec> {
            let vector = |&(at, len): &(usize, usize)| IoVec::new(at as *mut u8, len);
            all.iter().map(vector).collect()
        };
        let fits = |all: &[(usize, usize)], offset| device.fits(&piece(all), offset);
        assert!(fits(&[(0x1000, 0x1000), (0x8000, 0x1000)], 0));
        assert!(fits(&[(0x1e00, 0x200), (0x8000, 0x600)], 0));
        // Gaps within pages.
        assert!(!fits(&[(0x1000, 0x200), (0x8000, 0x1000)], 0));
        assert!(!fits(&[(0x1000, 0x1000), (0x8200, 0x200)], 0));
        // Sixteen pages, but not in seventeen parts.
        assert!(fits(&[(0x1_0000, 0x1_0000)], 0));
        assert!(!fits(&[(0x1_0200, 0x1_0000)], 0));
        // Within a chunk, and across.
        assert!(fits(&[(0x1000, 0x2000)], (1 << 20) - 0x2000));
        assert!(!fits(&[(0x1000, 0x2000)], (1 << 20) - 0x1000));
        let long = AtOnce {
            pages: 1000,
            ..device
        };
        assert!(long.fits(&piece(&[(0, 128 << 10)]), 0));
        assert!(!long.fits(&piece(&[(0, (128 << 10) + 512)]), 0));
        // Nothing is known of what is no device.
        let file = File::open("/proc/self/exe").unwrap();
        assert!(!AtOnce::of(&file).fits(&piece(&[(0, 512)]), 0));
    }
}
