//! What a file or a block device can do.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

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
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let device = format!("/sys/dev/block/{major}:{minor}");
    // A partition's queue is its disk's.
    ["queue", "../queue"].iter().any(|queue| {
        fs::read_to_string(format!("{device}/{queue}/write_zeroes_max_bytes"))
            .is_ok_and(|most| most.trim() != "0")
    })
}
