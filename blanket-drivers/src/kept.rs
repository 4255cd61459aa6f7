//! Files in which results are kept: JSON, replaced as a whole.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::Serialize;

/// Bytes of a file at most; ours have a few thousand.
const LONGEST: u64 = 64 << 10;

/// What is in a file, or as much of it as could be ours.
pub(crate) fn load(path: &Path) -> Option<Vec<u8>> {
    let file = fs::File::open(path).ok()?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Puts a value in place of what is in a file; makes its folder.
///
/// # Errors
/// It cannot be written.
pub(crate) fn store(path: &Path, value: &impl Serialize) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = fs::File::create(&new)?;
    let written = serde_json::to_writer_pretty(&mut file, value)
        .map_err(io::Error::from)
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}
