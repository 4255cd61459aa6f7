//! The machine that is prepared, as files and programs.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::failure::failure;

/// The machine; in tests a directory stands for its root.
#[derive(Clone, Debug)]
pub(crate) struct System {
    root: PathBuf,
}

impl System {
    /// This machine.
    pub(crate) fn this() -> Self {
        Self { root: "/".into() }
    }

    #[cfg(test)]
    pub(crate) fn under(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where an absolute path is.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether something is there.
    pub(crate) fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// A file's text; `None` if there is no such file.
    pub(crate) fn read(&self, path: impl AsRef<Path>) -> Result<Option<String>> {
        let path = self.path(path);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes a configuration file, whole or not at all; makes its folder.
    pub(crate) fn write_file(&self, path: impl AsRef<Path>, text: &str) -> Result<()> {
        let path = self.path(path);
        let new = path.with_extension("blanket-new");
        let write = || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let mut file = fs::File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        let written = write();
        if written.is_err() {
            // It need not be there.
            let _ = fs::remove_file(&new);
        }
        written.with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes to a file of the kernel's.
    pub(crate) fn write_setting(&self, path: impl AsRef<Path>, value: &str) -> Result<()> {
        let path = self.path(path);
        fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes a file, if it is there.
    pub(crate) fn remove(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = self.path(path);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// The folders above `path` that are not there, the innermost first.
    pub(crate) fn missing_folders(&self, path: &Path) -> Vec<PathBuf> {
        let above = path.ancestors().skip(1);
        above
            .take_while(|folder| !self.has(folder))
            .map(Path::to_owned)
            .collect()
    }

    /// Removes those folders that are empty.
    pub(crate) fn remove_empty(&self, folders: &[PathBuf]) {
        for folder in folders {
            // Others have put something there: it stays.
            let _ = fs::remove_dir(self.path(folder));
        }
    }

    /// Whether systemd runs this machine (sd_booted(3)).
    pub(crate) fn has_systemd(&self) -> bool {
        self.has("/run/systemd/system")
    }

    /// The running kernel's release.
    pub(crate) fn kernel(&self) -> Result<String> {
        let text = self.read("/proc/sys/kernel/osrelease")?;
        Ok(text.unwrap_or_default().trim().to_owned())
    }
}

/// Whether a program is in `PATH`.
pub(crate) fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Runs a program to its end; what it wrote to its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let line = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output();
    let output = match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(failure(
                format!("the program {program} was not found"),
                "install it, or put it in PATH",
            ));
        }
        other => other.with_context(line)?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().lines().next_back().unwrap_or("no reason given");
        return Err(anyhow!("{}: {said} ({})", line(), output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
