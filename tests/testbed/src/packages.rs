//! Debian packages: those that the host needs, and those that images are made from.
//!
//! Everything goes through the machine's own `apt` configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use crate::cache::{self, Key};
use crate::error::{Context, Error, Result, malformed};
use crate::program;

/// Another `apt` that runs is waited for this long, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=600";

/// How long the lists of backports are used.
const BACKPORTS_KEPT: Duration = Duration::from_secs(24 * 3600);

/// The keys that Debian signs its archives with.
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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

/// The named packages' files, without what they depend on: for programs that are not to be
/// installed on this machine, where they would be started.
///
/// # Errors
/// When they cannot be downloaded.
pub fn downloaded(names: &[&str]) -> Result<Vec<PathBuf>> {
    update_lists()?;
    Set::exactly(Source::Machine, names)?.download()
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

/// Where packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The machine's own sources.
    Machine,
    /// The backports to the machine's Debian, whether or not its own sources have them.
    Backports,
}

impl Source {
    /// The options that make `apt` use it. Lists that the machine does not have are fetched.
    fn options(self) -> Result<Vec<String>> {
        update_lists()?;
        if self == Self::Machine {
            return Ok(Vec::new());
        }
        let folder = cache::subfolder("backports")?;
        let lists = folder.join("lists");
        let list = folder.join("sources.list");
        let options: Vec<String> = [
            ("Dir::Etc::sourcelist", list.display().to_string()),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::State::lists", lists.display().to_string()),
            ("Dir::Cache::pkgcache", String::new()),
            ("Dir::Cache::srcpkgcache", String::new()),
            ("APT::Sandbox::User", "root".to_owned()),
        ]
        .into_iter()
        .flat_map(|(name, value)| ["-o".to_owned(), format!("{name}={value}")])
        .collect();
        let _lock = cache::lock(&folder.join("lock"))?;
        let fresh = fs::metadata(&list)
            .and_then(|data| data.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < BACKPORTS_KEPT));
        if !fresh {
            let partial = lists.join("partial");
            fs::create_dir_all(&partial)
                .context(|| format!("cannot make {}", partial.display()))?;
            let written = || format!("cannot write {}", list.display());
            let candidate = folder.join("sources.new");
            fs::write(&candidate, backports()?).context(written)?;
            fs::rename(&candidate, &list).context(written)?;
            let update = program::run(
                Command::new("apt-get")
                    .args(&options)
                    .args(["update", "-qq"]),
            );
            if update.is_err() {
                // Tried anew the next time.
                fs::remove_file(&list).context(written)?;
            }
            update?;
        }
        Ok(options)
    }

    /// A key of all that decides what `apt` answers.
    fn state(self) -> Result<Key> {
        let key = lists_state()?.with([u8::from(self == Self::Backports)]);
        if self == Self::Machine {
            return Ok(key);
        }
        let list = cache::subfolder("backports")?.join("sources.list");
        let time = fs::metadata(&list).and_then(|data| data.modified());
        Ok(key.with(format!("{:?}", time.unwrap_or(UNIX_EPOCH))))
    }
}

/// The line for backports that goes with the machine's line for Debian itself.
fn backports() -> Result<String> {
    let targets = ["Created-By: Packages", "Origin: Debian", "Label: Debian"];
    let format = "$(REPO_URI) $(CODENAME)";
    let lines = program::run(
        Command::new("apt-get")
            .args(["indextargets", "--format", format])
            .args(targets),
    )?;
    let lines = String::from_utf8_lossy(&lines).into_owned();
    let first = lines.lines().find(|line| !line.ends_with("-updates"));
    let (uri, suite) = first
        .and_then(|line| line.split_once(' '))
        .ok_or_else(|| malformed(Path::new("/etc/apt"), "names no archive of Debian"))?;
    Ok(format!(
        "deb [signed-by={DEBIAN_KEYS}] {uri} {suite}-backports main\n"
    ))
}

/// Packages in the exact versions that `apt` would install now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    names: Vec<String>,
    source: Source,
    with_dependencies: bool,
    /// File names with their checksums as `apt` prints them, sorted.
    files: Vec<String>,
}

impl Set {
    /// The named packages alone.
    pub(crate) fn exactly(source: Source, names: &[&str]) -> Result<Self> {
        Self::resolve(source, names, false)
    }

    /// The named packages and all that they depend on.
    pub(crate) fn closure(names: &[&str]) -> Result<Self> {
        Self::resolve(Source::Machine, names, true)
    }

    fn resolve(source: Source, names: &[&str], with_dependencies: bool) -> Result<Self> {
        let options = source.options()?;
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut set = Self {
            names,
            source,
            with_dependencies,
            files: Vec::new(),
        };
        // Asking apt takes a second or two, so its answer is kept while its lists stay the same.
        let key = source
            .state()?
            .with(set.names.join(" "))
            .with([u8::from(with_dependencies)]);
        let answer = cache::subfolder("resolved")?.join(key.hex());
        if let Ok(text) = fs::read_to_string(&answer) {
            set.files = text.lines().map(str::to_owned).collect();
            return Ok(set);
        }
        // apt leaves out what it finds downloaded, so it is shown an empty folder.
        let folder = cache::subfolder("no-debs")?;
        let output = program::run(
            set.apt(&folder, &options)?
                .arg("--print-uris")
                .args(&set.names),
        )?;
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
            let options = self.source.options()?;
            program::run(self.apt(&folder, &options)?.args(&self.names))?;
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
    fn apt(&self, folder: &Path, options: &[String]) -> Result<Command> {
        let status = folder.join("no-packages");
        fs::write(&status, "").context(|| format!("cannot write {}", status.display()))?;
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).context(|| format!("cannot make {}", partial.display()))?;
        let mut command = Command::new("apt-get");
        command
            .current_dir(folder)
            .args(["-qq", "-y", "--no-install-recommends"])
            .args(options);
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
pub(crate) fn behind_meta(source: Source, name: &str) -> Result<String> {
    let output = program::run(Command::new("apt-cache").args(source.options()?).args([
        "show",
        "--no-all-versions",
        name,
    ]))?;
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
