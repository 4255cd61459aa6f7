//! A `TPACKET_V3` ring: blocks of frames that the kernel fills and hands over
//! (Linux `Documentation/networking/packet_mmap.rst`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::wire::VIRTIO_HEADER;
use super::{check, set_option};

/// Bytes of a block: more than a whole train with its headers.
const BLOCK: usize = 256 << 10;
/// Blocks.
const BLOCKS: usize = 32;
/// A frame's least share of a block, by which the kernel counts.
const FRAME: usize = 2048;
/// Milliseconds after which a block that is not full is handed over. It is the
/// delay of a packet that nobody follows.
const RETIRE_MS: u32 = 1;

/// `struct tpacket3_hdr` up to what is of use here.
#[repr(C)]
#[derive(Clone, Copy)]
struct FrameHeader {
    next_offset: u32,
    sec: u32,
    nsec: u32,
    snaplen: u32,
    len: u32,
    status: u32,
    mac: u16,
    net: u16,
}

/// Where a block's descriptor (`struct tpacket_block_desc`) has what.
const STATUS_AT: usize = 8;
const COUNT_AT: usize = 12;
const FIRST_AT: usize = 16;

/// A frame in the ring.
pub(super) struct RingFrame<'a> {
    /// The `virtio_net_hdr` in front of it.
    pub(super) virtio: &'a [u8],
    /// What was kept of it.
    pub(super) bytes: &'a [u8],
    /// Whether that is all.
    pub(super) whole: bool,
    /// `TP_STATUS_*`.
    pub(super) status: u32,
}

/// The mapped ring, and the place in it.
pub(super) struct Ring {
    memory: NonNull<u8>,
    block: usize,
    /// Frames of the block that are left, and where the next one is.
    left: u32,
    at: usize,
}

// SAFETY: the mapping is nobody else's, and the kernel does not care which
// thread reads it.
unsafe impl Send for Ring {}

impl Ring {
    /// Sets a ring up for what comes in at a packet socket.
    pub(super) fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: BLOCKS as u32,
            tp_frame_size: FRAME as u32,
            tp_frame_nr: (BLOCK / FRAME * BLOCKS) as u32,
            tp_retire_blk_tov: RETIRE_MS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        // SAFETY: a new mapping of the socket's ring, wherever the kernel
        // likes; it has as many bytes as were just asked for.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK * BLOCKS,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            memory,
            block: 0,
            left: 0,
            at: 0,
        })
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: the block and its descriptor lie within the mapping, whose
        // blocks are page-aligned; the kernel writes the word as a whole.
        unsafe {
            let at = self.memory.add(self.block * BLOCK + STATUS_AT);
            AtomicU32::from_ptr(at.cast().as_ptr())
        }
    }

    /// The present block, if it has been handed over.
    fn current(&self) -> Option<&[u8]> {
        if self.status().load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: the block lies within the mapping, and the kernel does not
        // touch it until it is given back.
        Some(unsafe {
            std::slice::from_raw_parts(self.memory.add(self.block * BLOCK).as_ptr(), BLOCK)
        })
    }

    /// Calls `take` with the next frame, if there is one; whether there was.
    pub(super) fn next(&mut self, take: impl FnOnce(RingFrame<'_>)) -> bool {
        while self.left == 0 {
            let Some(block) = self.current() else {
                return false;
            };
            let (left, at) = (word(block, COUNT_AT), word(block, FIRST_AT));
            if left == 0 {
                self.give_back();
                continue;
            }
            (self.left, self.at) = (left, at as usize);
        }
        if let Some(block) = self.current()
            && let Some((header, frame)) = frame(block, self.at)
        {
            take(frame);
            self.at += header.next_offset as usize;
            self.left -= 1;
        } else {
            self.left = 0;
        }
        if self.left == 0 {
            self.give_back();
        }
        true
    }

    fn give_back(&mut self) {
        self.status()
            .store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.block = (self.block + 1) % BLOCKS;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing
        // borrows from it any more.
        let result = unsafe { libc::munmap(self.memory.as_ptr().cast(), BLOCK * BLOCKS) };
        debug_assert!(check(result).is_ok());
    }
}

fn word(block: &[u8], at: usize) -> u32 {
    let bytes = block
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

/// The frame whose header is at `at` in a block.
fn frame(block: &[u8], at: usize) -> Option<(FrameHeader, RingFrame<'_>)> {
    let bytes = block.get(at..)?;
    let header = bytes.get(..size_of::<FrameHeader>())?;
    // SAFETY: that many bytes are there, and any are a valid FrameHeader.
    let header: FrameHeader = unsafe { header.as_ptr().cast::<FrameHeader>().read_unaligned() };
    let start = usize::from(header.mac);
    let end = start.checked_add(header.snaplen as usize)?;
    let frame = RingFrame {
        virtio: bytes.get(start.checked_sub(VIRTIO_HEADER)?..start)?,
        bytes: bytes.get(start..end)?,
        whole: header.snaplen == header.len,
        status: header.status,
    };
    Some((header, frame))
}
