//! A replica's disk: a raw image that no monitor has open.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use blanket_migration::Disk;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, ioctl_ficlone, seek};

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

/// An image.
pub(super) struct Image {
    file: File,
    capacity: u64,
}

impl Image {
    /// Opens the one at `path`, or makes it; of so many bytes.
    ///
    /// # Errors
    /// It is none, has another length, or there is no room.
    pub(super) fn open(path: &Path, capacity: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits() as i32);
        let file = options.open(path)?;
        let len = file.metadata()?.len();
        match len {
            0 => file.set_len(capacity)?,
            len if len != capacity => {
                return Err(io::Error::other(format!(
                    "it has {len} bytes, and the disk {capacity}"
                )));
            }
            _ => {}
        }
        Ok(Self { file, capacity })
    }

    /// Takes over what is in another image, which may be one of some other time.
    pub(super) fn copy(&self, from: &Self) -> io::Result<()> {
        if ioctl_ficlone(&self.file, &from.file).is_ok() {
            return Ok(());
        }
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while let Some(data) = from.next_data(at)? {
            at = data.start;
            while at < data.end.min(self.capacity) {
                let left = usize::try_from(data.end.min(self.capacity) - at).unwrap_or(PIECE);
                let piece = piece.get_mut(..left.min(PIECE)).unwrap_or_default();
                from.read(at, piece)?;
                self.write(at, piece)?;
                at += piece.len() as u64;
            }
            at = data.end;
        }
        Ok(())
    }
}

impl Disk for Image {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.capacity {
            return Ok(None);
        }
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) if start >= self.capacity => Ok(None),
            Ok(start) => {
                let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.capacity);
                Ok(Some(start..end.min(self.capacity)))
            }
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system that does not tell.
            Err(_) => Ok(Some(offset..self.capacity)),
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, punch, offset, len).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; PIECE];
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let n = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
            self.write(at, zeros.get(..n).unwrap_or_default())?;
            at += n as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_what_was_written_to_it_and_copies_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let one = Image::open(&dir.path().join("one"), 3 << 20).unwrap();
        one.write(1 << 20, &[7; 5000]).unwrap();
        one.write((3 << 20) - 512, &[8; 512]).unwrap();
        one.clear(1 << 20, 4096).unwrap();
        let two = Image::open(&dir.path().join("two"), 3 << 20).unwrap();
        two.copy(&one).unwrap();
        let [a, b] = ["one", "two"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
        assert!(a == b && a[1 << 20] == 0 && a[(1 << 20) + 4096] == 7);
        assert!(Image::open(&dir.path().join("two"), 4 << 20).is_err());
        let blank = Image::open(&dir.path().join("blank"), 1 << 20).unwrap();
        assert_eq!(blank.next_data(0).unwrap(), None);
    }
}
