//! `blanket restore`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_vmm::config::{CharConfig, DiskConfig, VmConfig};
use blanket_vmm::snapshot::{DiskMark, Opening, Snapshot};

use super::print;
use super::run::{Start, check_readable, settle};
use crate::evacuate::bring_back;
use crate::failure::failure;
use crate::home::Home;
use crate::name::VmName;

#[derive(clap::Args)]
#[command(
    after_help = "The VM is configured as the saved one was; options override that, as for `blanket \
    run`. What the guest sees (memory, processors, disks, interfaces) has to stay as it was; where a \
    disk or a tap is on this node may change."
)]
pub(crate) struct Args {
    /// The snapshot; with --evacuated, the directory.
    #[arg(required_unless_present = "evacuated")]
    file: Option<PathBuf>,

    /// All guests that `blanket evacuate` has saved. Each one's file is removed once it runs.
    #[arg(long, conflicts_with_all = ["name", "changed_disks", "user", "key", "base"])]
    evacuated: bool,

    /// Name of the VM, unique on this node [default: the saved one's].
    #[arg(long)]
    name: Option<VmName>,

    /// Restore it with disks that were changed since: to a guest that remembers
    /// another content they are damaged.
    #[arg(long)]
    changed_disks: bool,

    /// Read all of the memory before the guest goes on, instead of each part when it is needed.
    #[arg(long)]
    eager: bool,

    #[command(flatten)]
    opening: Opening,

    /// User that the monitor becomes when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,

    #[command(flatten)]
    vm: VmConfig,
}

pub(crate) fn restore(home: &Home, args: Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let file = match args.file {
        from if args.evacuated => {
            if args.vm != VmConfig::default() {
                return Err(failure(
                    "--evacuated brings guests back as they were: it takes no options of theirs",
                    "restore each by its file",
                ));
            }
            return bring_back(home, &from.unwrap_or_else(|| home.evacuated()), home_flag);
        }
        Some(file) => file,
        None => return Err(failure("no snapshot is named", "name one")),
    };
    let back = Restore {
        file: &file,
        name: args.name,
        changed_disks: args.changed_disks,
        eager: args.eager,
        opening: args.opening,
        user: args.user.as_deref(),
        over: args.vm,
    };
    let name = back.start(home, home_flag)?;
    print(&format!("{name}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// How a saved VM is started.
pub(crate) struct Restore<'a> {
    pub(crate) file: &'a Path,
    pub(crate) name: Option<VmName>,
    pub(crate) changed_disks: bool,
    /// Read all of the memory at once.
    pub(crate) eager: bool,
    pub(crate) opening: Opening,
    pub(crate) user: Option<&'a str>,
    /// What it is configured otherwise.
    pub(crate) over: VmConfig,
}

impl Restore<'_> {
    /// Starts it; its name.
    pub(crate) fn start(self, home: &Home, home_flag: Option<&Path>) -> Result<VmName> {
        check_readable(self.file)?;
        let context = || format!("the snapshot {}", self.file.display());
        let access = self.opening.access()?;
        let snapshot = Snapshot::open_with(self.file, &access).with_context(context)?;
        let head = snapshot.head().clone();
        let name = match self.name {
            Some(name) => name,
            None => head.name.parse().map_err(|_| {
                failure(
                    "the snapshot has no name that a VM can have",
                    "give it one with --name",
                )
            })?,
        };
        let mut config = head.config;
        let console = |port| without_own_places(port, &head.name);
        config.serial = config.serial.map(console);
        config.console = config.console.map(console);
        let config = settle(config.overlaid(self.over), &home.vm(&name))?;
        if !self.changed_disks {
            check_disks(&config, &snapshot.disks().with_context(context)?)?;
        }
        let start = Start {
            config: &config,
            user: self.user,
            home: home_flag,
            attach: false,
            snapshot: Some((self.file, &self.opening)),
            eager: self.eager,
            prepare: None,
            receive: None,
            shared_disks: false,
            origins: None,
        };
        start.claim_and_start(home, &name)?;
        Ok(name)
    }
}

/// The port of a VM called `name`; in the new VM's directory where it was in
/// that one's.
pub(super) fn without_own_places(port: CharConfig, name: &str) -> CharConfig {
    let own = |path: &PathBuf| path.parent().is_some_and(|folder| folder.ends_with(name));
    if port.socket.as_ref().is_some_and(own) && port.log.as_ref().is_none_or(own) {
        return CharConfig {
            stdio: true,
            ..CharConfig::default()
        };
    }
    port
}

/// Whether the disks are as the saved guest remembers them.
pub(super) fn check_disks(config: &VmConfig, marks: &[DiskMark]) -> Result<()> {
    for mark in marks {
        // One that was replaced on the command line is somebody's decision.
        let used = config
            .disk
            .iter()
            .flat_map(DiskConfig::paths)
            .any(|path| *path == mark.path);
        if used && DiskMark::of(mark.path.clone())? != *mark {
            return Err(failure(
                format!(
                    "the disk {} has changed since the snapshot was made",
                    mark.path.display()
                ),
                "put it back as it was (with its time: cp -p), name another with --disk, or take it \
                 as it is with --changed-disks",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_ports_in_the_saved_vms_own_directory_move() {
        let port = |socket: &str, log: Option<&str>| CharConfig {
            stdio: false,
            socket: Some(socket.into()),
            log: log.map(PathBuf::from),
        };
        let own = port(
            "/run/blanket/web/console.sock",
            Some("/var/vms/web/console.log"),
        );
        assert!(without_own_places(own, "web").stdio);
        for other in [
            port("/run/web.sock", None),
            port("/run/web/console.sock", Some("/var/log/console")),
            port("/run/other/console.sock", None),
        ] {
            assert_eq!(without_own_places(other.clone(), "web"), other);
        }
    }

    #[test]
    fn a_disk_that_has_changed_is_refused_unless_another_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let marks = [DiskMark::of(path.clone()).unwrap()];
        let config = |path: &Path| VmConfig {
            disk: vec![toml::from_str(&format!("path = {path:?}")).unwrap()],
            ..VmConfig::default()
        };
        check_disks(&config(&path), &marks).unwrap();
        fs::write(&path, "changed").unwrap();
        let error = check_disks(&config(&path), &marks).unwrap_err();
        assert!(crate::failure::describe(&error).contains("--changed-disks"));
        check_disks(&config(Path::new("/another")), &marks).unwrap();
    }
}
