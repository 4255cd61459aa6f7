//! What can be changed on a machine: each kind with how to tell that it is
//! done, how to do it, and how to undo it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use blanket_drivers::uplink::Key;
use blanket_drivers::volume::{Volume, list};
use blanket_drivers::{uplink, volume};
use serde::{Deserialize, Serialize};

use super::system::{System, has_program, run};
use super::wants::WATCH;
use crate::failure::failure;

/// A state that something on the machine shall have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Target {
    /// A Debian package is installed. It is missed where `program` is.
    Package { name: String, program: String },
    /// A kernel module is loaded: `sign` is there.
    Module { name: String, sign: PathBuf },
    /// A configuration file has this content.
    File { path: PathBuf, content: String },
    /// A file of the kernel's has this value.
    Setting { path: PathBuf, value: String },
    /// A systemd unit is enabled and active.
    Unit { name: String },
    /// An interface's uplinks have been measured.
    Uplink {
        interface: String,
        address: IpAddr,
        folder: PathBuf,
    },
    /// A volume's engines have been measured.
    Store { volume: String, folder: PathBuf },
}

/// A change, and what undoes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    /// What it brings about.
    #[serde(flatten)]
    pub(crate) target: Target,
    /// What was there before, where that is text.
    pub(crate) prior: Option<String>,
    /// Folders that were made for it, the innermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) made_folders: Vec<PathBuf>,
}

/// What became of a change that was to be undone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// All is as before.
    Yes,
    /// It was left, for this reason, and is no concern of ours any more.
    Left(String),
    /// It was left, for this reason, and can be undone later.
    Kept(String),
}

/// What a setting says: the word in brackets, where all choices are listed.
fn chosen(text: &str) -> &str {
    let bracketed = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text, |(word, _)| word).trim()
}

/// Whether a module is loaded that is not a part of the kernel itself.
pub(super) fn is_loaded(system: &System, name: &str) -> bool {
    system.has(format!("/sys/module/{name}/initstate"))
}

/// Whether any interface is a tap, which need not keep its module loaded.
fn has_taps(system: &System) -> bool {
    let interfaces = std::fs::read_dir(system.path("/sys/class/net"));
    let mut interfaces = interfaces.into_iter().flatten().flatten();
    interfaces.any(|it| it.path().join("tun_flags").exists())
}

/// Whether a setting can be ours: as we set it, or on the way there from what
/// it was (the kernel may find fewer huge pages than it is asked for).
fn is_ours(now: &str, prior: &str, value: &str) -> bool {
    let number = |text: &str| text.parse::<u64>().ok();
    match (number(now), number(prior), number(value)) {
        (Some(now), Some(prior), Some(value)) => {
            (prior.min(value)..=prior.max(value)).contains(&now)
        }
        _ => now == prior || now == value,
    }
}

impl Target {
    /// What tells it from others.
    pub(crate) fn identity(&self) -> String {
        match self {
            Self::Package { name, .. } => format!("package {name}"),
            Self::Module { name, .. } => format!("module {name}"),
            Self::File { path, .. } => format!("file {}", path.display()),
            Self::Setting { path, .. } => format!("setting {}", path.display()),
            Self::Unit { name } => format!("unit {name}"),
            Self::Uplink { interface, .. } => format!("uplink {interface}"),
            Self::Store { volume, .. } => format!("store {volume}"),
        }
    }

    /// What it does, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Package { name, .. } => format!("install {name}"),
            Self::Module { name, .. } => format!("load {name}"),
            Self::File { path, .. } => format!("write {}", path.display()),
            Self::Setting { path, value } => format!("set {} to {value}", path.display()),
            Self::Unit { name } => format!("enable and start {name}"),
            Self::Uplink { interface, .. } => format!("measure the uplinks of {interface}"),
            Self::Store { volume, .. } => format!("measure the engines of {volume}"),
        }
    }

    /// Whether it is so already.
    pub(crate) fn is_met(&self, system: &System) -> Result<bool> {
        Ok(match self {
            Self::Package { program, .. } => has_program(program),
            Self::Module { sign, .. } => system.has(sign),
            Self::File { path, content } => system.read(path)?.as_ref() == Some(content),
            Self::Setting { path, value } => {
                let text = system.read(path)?;
                text.is_some_and(|text| chosen(&text) == value)
            }
            Self::Unit { name } => {
                let says = |verb| run("systemctl", &[verb, "--quiet", name]).is_ok();
                says("is-enabled") && says("is-active")
            }
            Self::Uplink {
                interface, folder, ..
            } => {
                let kept = uplink::Cache::new(folder).load(interface);
                kept.is_some_and(|kept| Key::of(interface).is_ok_and(|key| key == kept.key))
            }
            Self::Store { volume, folder } => {
                volume::Cache::new(folder).load(&find(volume)?).is_some()
            }
        })
    }

    /// The change that brings it about now.
    pub(crate) fn change(&self, system: &System) -> Result<Change> {
        let (prior, made_folders) = match self {
            Self::File { path, .. } => (system.read(path)?, system.missing_folders(path)),
            Self::Setting { path, .. } => {
                let text = system.read(path)?;
                (text.as_deref().map(|text| chosen(text).to_owned()), vec![])
            }
            Self::Package { .. }
            | Self::Module { .. }
            | Self::Unit { .. }
            | Self::Uplink { .. }
            | Self::Store { .. } => (None, vec![]),
        };
        Ok(Change {
            target: self.clone(),
            prior,
            made_folders,
        })
    }

    /// Brings it about.
    pub(crate) fn apply(&self, system: &System) -> Result<()> {
        match self {
            Self::Package { name, .. } => install(name),
            Self::Module { name, .. } => load(system, name),
            Self::File { path, content } => {
                system.write_file(path, content)?;
                reload_units(system, path)
            }
            Self::Setting { path, value } => {
                system.write_setting(path, value)?;
                let now = system.read(path)?.unwrap_or_default();
                if chosen(&now) == value {
                    return Ok(());
                }
                Err(failure(
                    format!("{} is {} instead of {value}", path.display(), chosen(&now)),
                    "where these are huge pages: memory is in pieces; ask for less, or run blanket \
                     up again soon after the next boot",
                ))
            }
            Self::Unit { name } => run("systemctl", &["enable", "--now", "--quiet", name])
                .map(drop)
                .with_context(|| format!("cannot start it; see journalctl -u {name}")),
            Self::Uplink {
                interface,
                address,
                folder,
            } => Ok(uplink::Cache::new(folder)
                .record(interface, *address, false)
                .map(drop)?),
            Self::Store { volume, folder } => Ok(volume::Cache::new(folder)
                .record(&find(volume)?, false)
                .map(drop)?),
        }
    }
}

impl Change {
    /// Brings back what was there before. Packages go with `purge` only.
    pub(crate) fn undo(&self, system: &System, purge: bool) -> Result<Undone> {
        match &self.target {
            Target::Package { name, .. } if purge => {
                run("apt-get", &["purge", "--yes", name])?;
            }
            Target::Package { .. } => return Ok(Undone::Kept("--purge removes it".into())),
            Target::Module { name, .. } => {
                if name == "tun" && has_taps(system) {
                    // Unloading it would remove them.
                    return Ok(Undone::Left("this machine has taps".into()));
                }
                if is_loaded(system, name)
                    && let Err(error) = run("modprobe", &["--remove", name])
                {
                    return Ok(Undone::Left(format!(
                        "it is in use until the next boot: {error}"
                    )));
                }
            }
            Target::File { path, .. } => {
                match &self.prior {
                    Some(text) => system.write_file(path, text)?,
                    None => system.remove(path)?,
                }
                system.remove_empty(&self.made_folders);
                reload_units(system, path)?;
            }
            Target::Setting { path, value } => {
                let now = system.read(path)?.unwrap_or_default();
                let Some(prior) = &self.prior else {
                    return Ok(Undone::Yes);
                };
                let now = chosen(&now);
                if !is_ours(now, prior, value) {
                    return Ok(Undone::Left(format!("somebody has set it to {now} since")));
                }
                system.write_setting(path, prior)?;
            }
            Target::Unit { name } => {
                run("systemctl", &["disable", "--now", "--quiet", name])?;
            }
            Target::Uplink {
                interface, folder, ..
            } => system.remove(folder.join(format!("{interface}.json")))?,
            Target::Store { volume, folder } => {
                system.remove(folder.join(format!("{volume}.json")))?;
            }
        }
        Ok(Undone::Yes)
    }
}

/// The volume of this name. What its provider says of it makes no difference.
fn find(name: &str) -> Result<Volume> {
    let mut all = list(Path::new("/"), "").into_iter();
    all.find(|volume| volume.name == name)
        .with_context(|| format!("{name} has gone"))
}

/// Tells systemd of a unit's new file. The watcher reads its command line when
/// it starts; the other unit must not be restarted, which would save the guests.
fn reload_units(system: &System, path: &Path) -> Result<()> {
    if path.extension().is_some_and(|it| it == "service") && system.has_systemd() {
        run("systemctl", &["daemon-reload"])?;
        if path.ends_with(WATCH) && system.has(path) {
            run("systemctl", &["try-restart", WATCH])?;
        }
    }
    Ok(())
}

fn install(name: &str) -> Result<()> {
    if !has_program("apt-get") {
        let others = ["dnf", "zypper", "apk", "pacman"];
        let how = others.into_iter().find(|other| has_program(other));
        let how = match how {
            Some("pacman") => format!("pacman -S {name}"),
            Some("apk") => format!("apk add {name}"),
            Some(other) => format!("{other} install {name}"),
            None => format!("install {name} by hand"),
        };
        return Err(failure(
            format!("{name} is missing, and Blanket installs with apt only"),
            format!("{how}; then blanket up again"),
        ));
    }
    let arguments = ["install", "--yes", "--no-install-recommends", name];
    if run("apt-get", &arguments).is_ok() {
        return Ok(());
    }
    // The lists of packages may be missing or old.
    run("apt-get", &["update"])?;
    run("apt-get", &arguments).map(drop)
}

fn load(system: &System, name: &str) -> Result<()> {
    run("modprobe", &[name]).map(drop).map_err(|error| {
        let remedy = if name.starts_with("kvm") {
            "switch virtualization on in the firmware, or use an instance type with nested \
             virtualization; blanket doctor tells more"
                .to_owned()
        } else {
            let kernel = system.kernel().unwrap_or_default();
            format!("install the modules of the kernel {kernel}, or boot one that has them")
        };
        failure(format!("{error:#}"), remedy)
    })
}

impl Change {
    /// The file of the setting that it changes, if it does.
    pub(crate) fn setting(&self) -> Option<PathBuf> {
        match &self.target {
            Target::Setting { path, .. } => Some(path.clone()),
            _ => None,
        }
    }
}
