//! The file that receives a port's output.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::{Error, LOG_LIMIT};

#[derive(Debug)]
pub(super) struct Log {
    file: File,
    size: u64,
}

impl Log {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Log {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        let size = file.metadata().map_err(fail)?.len();
        Ok(Self { file, size })
    }

    /// Appends `data`; a file that would grow beyond its limit starts anew.
    /// False if it could not be written (the disk may be full).
    pub(super) fn write(&mut self, data: &[u8]) -> bool {
        if self.size + data.len() as u64 > LOG_LIMIT {
            if let Err(error) = self.file.set_len(0) {
                tracing::warn!(%error, "a console log cannot be started anew");
                return false;
            }
            self.size = 0;
        }
        self.size += data.len() as u64;
        self.file.write_all(data).is_ok()
    }
}
