//! Files that nodes get as a disk: too large for the memory they would otherwise be in.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::Disk;
use crate::error::{Context, Result, malformed};
use crate::program;

/// Space for files that the node adds or lets grow, in MiB. The image is sparse.
const ROOM_MIB: u64 = 256;

/// A file system with files for nodes, which appears as `/payload/NAME`. The node may change it;
/// the changes are gone when the node is.
#[derive(Clone, Debug)]
pub struct Payload {
    name: String,
    image: PathBuf,
}

impl Payload {
    /// The payload in an image that [`make`] made.
    pub(crate) fn new(name: &str, image: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            image,
        }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where the node sees it.
    pub fn mount_point(&self) -> String {
        format!("/payload/{}", self.name)
    }

    /// Its image on the host.
    pub fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn disk(&self) -> Disk {
        Disk::scratch(&self.image).serial(format!("payload-{}", self.name))
    }
}

/// Makes a payload's ext4 image of the folder. No mount is needed.
pub(crate) fn make(folder: &Path, image: &Path) -> Result<()> {
    let output = program::run(
        Command::new("du")
            .args(["-s", "-m", "--apparent-size"])
            .arg(folder),
    )?;
    let text = String::from_utf8_lossy(&output).into_owned();
    let used: u64 = text
        .split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| malformed(folder, format!("du says `{text}`")))?;
    let mut command = Command::new("mke2fs");
    command.args([
        "-q",
        "-t",
        "ext4",
        "-m",
        "0",
        "-O",
        "^has_journal",
        "-E",
        "root_owner=0:0",
    ]);
    command.arg("-d").arg(folder).arg(image);
    // Room for the file system's own tables too.
    program::run(command.arg(format!("{}M", used + used / 8 + ROOM_MIB))).map(drop)
}

/// Copies a file, with its holes.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    program::run(
        Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(from)
            .arg(to),
    )
    .map(drop)
}

/// Makes a folder within another.
pub(crate) fn subfolder(parent: &Path, name: &str) -> Result<PathBuf> {
    let path = parent.join(name);
    std::fs::create_dir_all(&path).context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}
