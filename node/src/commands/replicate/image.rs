//! A replica's disk: a raw image that no monitor has open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use blanket_drivers::store::{self, Engine, Format, Spec};
use blanket_migration::Disk;
use blanket_vmm::migrate::Content;
use rustix::fs::{OFlags, ioctl_ficlone};

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

/// An image.
pub(super) struct Image {
    file: File,
    content: Arc<Content>,
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
        let spec = Spec {
            path: path.to_owned(),
            readonly: false,
            format: Some(Format::Raw),
            direct: false,
            backing: false,
            engine: Engine::Sync,
            stripe: Vec::new(),
        };
        let image = store::Image::adopt(&spec, file.try_clone()?).map_err(io::Error::other)?;
        let content = Arc::new(Content::of(&image));
        Ok(Self { file, content })
    }

    /// What is in it.
    pub(super) fn content(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.content) as _
    }

    /// Takes over what is in another image, which may be one of some other time.
    pub(super) fn copy(&self, from: &Self) -> io::Result<()> {
        if ioctl_ficlone(&self.file, &from.file).is_ok() {
            return Ok(());
        }
        let (from, to) = (&from.content, &self.content);
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while let Some(data) = from.next_data(at)? {
            at = data.start;
            while at < data.end {
                let left = usize::try_from(data.end - at).unwrap_or(PIECE);
                let piece = piece.get_mut(..left.min(PIECE)).unwrap_or_default();
                from.read(at, piece)?;
                to.write(at, piece)?;
                at += piece.len() as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_what_was_written_to_it_and_copies_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let one = Image::open(&dir.path().join("one"), 3 << 20).unwrap();
        one.content().write(1 << 20, &[7; 5120]).unwrap();
        one.content().write((3 << 20) - 512, &[8; 512]).unwrap();
        one.content().clear(1 << 20, 4096).unwrap();
        let two = Image::open(&dir.path().join("two"), 3 << 20).unwrap();
        two.copy(&one).unwrap();
        let [a, b] = ["one", "two"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
        assert!(a == b && a[1 << 20] == 0 && a[(1 << 20) + 4096] == 7);
        assert!(Image::open(&dir.path().join("two"), 4 << 20).is_err());
        let blank = Image::open(&dir.path().join("blank"), 1 << 20).unwrap();
        assert_eq!(blank.content().next_data(0).unwrap(), None);
    }
}
