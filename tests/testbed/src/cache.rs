//! Things that take long to make and are kept, under a hash of what they are made from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::error::{Context, Result};

/// Entries that nobody has used for this long are removed when a new one is made.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// The workspace's root folder.
pub(crate) fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

/// The folder of everything that the testbed keeps: `target/testbed` of the workspace, whatever
/// Cargo's own target folder is, so that all builds share it.
pub(crate) fn testbed_dir() -> PathBuf {
    workspace().join("target/testbed")
}

/// Makes a subfolder of [`testbed_dir`].
pub(crate) fn subfolder(name: &str) -> Result<PathBuf> {
    let path = testbed_dir().join(name);
    fs::create_dir_all(&path).context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// What an entry is made from.
#[derive(Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds one input.
    pub(crate) fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        self.0.update((input.len() as u64).to_le_bytes());
        self.0.update(input);
        self
    }

    /// Adds the content of a file.
    pub(crate) fn with_file(mut self, path: &Path) -> Result<Self> {
        let reading = || format!("cannot read {}", path.display());
        let mut file = File::open(path).context(reading)?;
        self.0
            .update(file.metadata().context(reading)?.len().to_le_bytes());
        std::io::copy(&mut file, &mut self.0).context(reading)?;
        Ok(self)
    }

    /// The hash, in 16 hexadecimal digits.
    pub(crate) fn hex(self) -> String {
        self.0
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Returns the folder of the entry `kind`-`key`. When it is not there, `make` fills a new folder,
/// which then takes the entry's name; other processes wait meanwhile.
pub(crate) fn entry(
    kind: &str,
    key: Key,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let folder = subfolder("cache")?;
    let path = folder.join(format!("{kind}-{}", key.hex()));
    if !path.exists() {
        let _lock = lock(&folder.join(format!("{kind}.lock")))?;
        if !path.exists() {
            remove_old(&folder, &format!("{kind}-"));
            let partial = tempfile::Builder::new()
                .prefix(".partial-")
                .tempdir_in(&folder)
                .context(|| format!("cannot make a folder in {}", folder.display()))?;
            eprintln!("testbed: building {kind} ...");
            let start = std::time::Instant::now();
            make(partial.path())?;
            fs::rename(partial.path(), &path)
                .context(|| format!("cannot name {}", path.display()))?;
            eprintln!(
                "testbed: {kind} is ready ({:.1} s)",
                start.elapsed().as_secs_f32()
            );
        }
    }
    // The time of the last use. Without it the entry would only be made again some day.
    let _ = File::open(&path).and_then(|folder| folder.set_modified(SystemTime::now()));
    Ok(path)
}

/// Takes a lock that other processes respect, until the returned file is dropped.
pub(crate) fn lock(path: &Path) -> Result<File> {
    let locking = || format!("cannot lock {}", path.display());
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .context(locking)?;
    flock(&file, FlockOperation::LockExclusive)
        .map_err(Into::into)
        .context(locking)?;
    Ok(file)
}

fn remove_old(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(prefix);
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .map(|time| time.elapsed());
        if ours && matches!(age, Ok(Ok(age)) if age > KEPT) {
            // Another process may be removing it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
