//! Debian packages: those that the host needs, and those that images are made from.
//!
//! Everything goes through the machine's own `apt` configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

use crate::cache::{self, Key};
use crate::error::{Context, Error, Result};
use crate::program;

/// Another `apt` that runs is waited for this long, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=600";

/// Where `apt` keeps the lists of packages.
const LISTS: &str = "/var/lib/apt/lists";

/// Installs those of the named packages that are missing on this machine, and says so.
///
/// # Errors
/// [`Error::MissingPackages`] when they are missing and this is not root;
/// [`Error::Program`] when `apt` fails.
pub fn ensure_packages(names: &[&str]) -> Result<()> {
    let missing = missing(names)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        return Err(Error::MissingPackages(list));
    }
    eprintln!("testbed: installing {list} ...");
    update_lists()?;
    program::run(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args([
                "-o",
                LOCK_TIMEOUT,
                "install",
                "-y",
                "-qq",
                "--no-install-recommends",
            ])
            .args(&missing),
    )?;
    Ok(())
}

fn missing<'a>(names: &[&'a str]) -> Result<Vec<&'a str>> {
    // Fails when one of them is not even known; its output names the ones that are installed.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(names)
        .output()
        .context(|| "cannot run dpkg-query: the testbed needs a Debian machine".to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed = |name: &&&str| text.lines().any(|line| line == format!("{name} installed"));
    Ok(names
        .iter()
        .filter(|name| !installed(name))
        .copied()
        .collect())
}

/// Fetches the lists of packages when the machine has none, as in a fresh container.
fn update_lists() -> Result<()> {
    let have_lists = fs::read_dir(LISTS).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|f| f.file_name().to_string_lossy().contains("_Packages")))
    });
    if !have_lists {
        eprintln!("testbed: apt-get update ...");
        program::run(Command::new("apt-get").args(["-o", LOCK_TIMEOUT, "update", "-qq"]))?;
    }
    Ok(())
}

/// Packages in the exact versions that `apt` would install now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    names: Vec<String>,
    with_dependencies: bool,
    /// File names with their checksums as `apt` prints them, sorted.
    files: Vec<String>,
}

impl Set {
    /// The named packages alone.
    pub(crate) fn exactly(names: &[&str]) -> Result<Self> {
        Self::resolve(names, false)
    }

    /// The named packages and all that they depend on.
    pub(crate) fn closure(names: &[&str]) -> Result<Self> {
        Self::resolve(names, true)
    }

    fn resolve(names: &[&str], with_dependencies: bool) -> Result<Self> {
        update_lists()?;
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut set = Self {
            names,
            with_dependencies,
            files: Vec::new(),
        };
        // Asking apt takes a second or two, so its answer is kept while its lists stay the same.
        let key = lists_state()?
            .with(set.names.join(" "))
            .with([u8::from(with_dependencies)]);
        let answer = cache::subfolder("resolved")?.join(key.hex());
        if let Ok(text) = fs::read_to_string(&answer) {
            set.files = text.lines().map(str::to_owned).collect();
            return Ok(set);
        }
        // apt leaves out what it finds downloaded, so it is shown an empty folder.
        let folder = cache::subfolder("no-debs")?;
        let output = program::run(set.apt(&folder)?.arg("--print-uris").args(&set.names))?;
        set.files = String::from_utf8_lossy(&output)
            .lines()
            .filter_map(|line| line.strip_prefix('\''))
            .filter_map(|line| line.split_once("' "))
            .map(|(_, file)| file.to_owned())
            .collect();
        set.files.sort();
        if set.files.is_empty() {
            return Err(Error::Format {
                what: format!("packages {}", set.names.join(" ")),
                problem: "apt-get finds nothing to download".to_owned(),
            });
        }
        let partial = tempfile::NamedTempFile::new_in(cache::subfolder("resolved")?)
            .context(|| "cannot make a temporary file".to_owned())?;
        fs::write(&partial, set.files.join("\n") + "\n")
            .and_then(|()| partial.persist(&answer).map_err(|error| error.error))
            .context(|| format!("cannot write {}", answer.display()))?;
        Ok(set)
    }

    /// What the set consists of, for the key of something made from it.
    pub(crate) fn identity(&self) -> String {
        self.files.join("\n")
    }

    /// Downloads what is not there yet and returns the packages' files.
    pub(crate) fn download(&self) -> Result<Vec<PathBuf>> {
        let folder = cache::subfolder("debs")?;
        let paths: Vec<PathBuf> = self
            .files
            .iter()
            .filter_map(|line| line.split(' ').next())
            .map(|name| folder.join(name))
            .collect();
        let _lock = cache::lock(&folder.join("lock"))?;
        if !paths.iter().all(|path| path.exists()) {
            eprintln!("testbed: downloading {} packages ...", paths.len());
            program::run(self.apt(&folder)?.args(&self.names))?;
        }
        match paths.iter().find(|path| !path.exists()) {
            Some(path) => Err(Error::Format {
                what: path.display().to_string(),
                problem: "apt-get did not download it; its lists may be old: run `apt-get update`"
                    .to_owned(),
            }),
            None => Ok(paths),
        }
    }

    /// `apt-get` set up to download the packages to `folder`, as if nothing were installed.
    fn apt(&self, folder: &Path) -> Result<Command> {
        let status = folder.join("no-packages");
        fs::write(&status, "").context(|| format!("cannot write {}", status.display()))?;
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).context(|| format!("cannot make {}", partial.display()))?;
        let mut command = Command::new("apt-get");
        command
            .current_dir(folder)
            .args(["-qq", "-y", "--no-install-recommends"]);
        for option in [
            "Debug::NoLocking=1",
            "APT::Sandbox::User=root",
            "Dir::Cache::pkgcache=",
        ] {
            command.args(["-o", option]);
        }
        if self.with_dependencies {
            command
                .arg("-o")
                .arg(format!("Dir::State::status={}", status.display()));
            command
                .arg("-o")
                .arg(format!("Dir::Cache::archives={}/", folder.display()));
            command.args(["--download-only", "install"]);
        } else {
            command.arg("download");
        }
        Ok(command)
    }
}

/// The one package that a meta package stands for: its first dependency.
pub(crate) fn behind_meta(name: &str) -> Result<String> {
    update_lists()?;
    let output = program::run(Command::new("apt-cache").args(["show", "--no-all-versions", name]))?;
    String::from_utf8_lossy(&output)
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))
        .and_then(|depends| depends.split([' ', ',']).next())
        .map(str::to_owned)
        .ok_or_else(|| Error::Format {
            what: format!("package {name}"),
            problem: "is no meta package".to_owned(),
        })
}

/// A key of all that decides what `apt` answers: its lists and its configuration.
fn lists_state() -> Result<Key> {
    static STATE: OnceLock<String> = OnceLock::new();
    if let Some(state) = STATE.get() {
        return Ok(Key::default().with(state));
    }
    let mut state = Vec::new();
    let folders = [
        LISTS,
        "/etc/apt",
        "/etc/apt/sources.list.d",
        "/etc/apt/preferences.d",
    ];
    for folder in folders
        .into_iter()
        .filter(|folder| Path::new(folder).exists())
    {
        for file in fs::read_dir(folder)
            .context(|| format!("cannot read {folder}"))?
            .flatten()
        {
            let time = file
                .metadata()
                .and_then(|data| data.modified())
                .unwrap_or(UNIX_EPOCH);
            state.push(format!("{}@{time:?}", file.path().display()));
        }
    }
    state.sort();
    Ok(Key::default().with(STATE.get_or_init(|| state.join("\n"))))
}
