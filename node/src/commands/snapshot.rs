//! `blanket snapshot` and `blanket restore`.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::client::{self, Client};
use blanket_vmm::config::{CharConfig, DiskConfig, VmConfig};
use blanket_vmm::snapshot::{DiskMark, Snapshot, write_disks};

use super::life::suspend_one;
use super::print;
use super::run::{Start, check_readable, settle};
use crate::evacuate::bring_back;
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// How long a VM may take to end after its snapshot.
const END: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(
    after_help = "The disks are not in the file. A VM that goes on writes to them: the snapshot can \
    only be restored with the disks as they are now. --stop leaves them so."
)]
pub(crate) struct Args {
    /// The VM.
    name: VmName,

    /// Where to write it. A file that is there is replaced.
    file: PathBuf,

    /// End the VM then, instead of letting it run on.
    #[arg(long)]
    stop: bool,

    /// Have the guest suspend itself before (pv machines): where it is restored
    /// it sets up its devices anew, and its clock.
    #[arg(long)]
    suspend: bool,

    /// Seconds that the guest has to suspend itself.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// How a VM is saved.
pub(crate) struct Save<'a> {
    pub(crate) file: &'a Path,
    /// End the VM then.
    pub(crate) stop: bool,
    /// So long the guest may take to suspend itself, if it is to do that.
    pub(crate) suspend: Option<Duration>,
    /// When it is too late.
    pub(crate) deadline: Option<Instant>,
}

pub(crate) fn snapshot(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let how = Save {
        file: &args.file,
        stop: args.stop,
        suspend: args.suspend.then(|| Duration::from_secs(args.timeout)),
        deadline: None,
    };
    save(&vm, &how)?;
    Ok(ExitCode::SUCCESS)
}

/// Saves a VM. When that fails it runs on, if it ran.
pub(crate) fn save(vm: &VmDir, how: &Save) -> Result<()> {
    let client = vm.live_client()?;
    let before = client.info()?;
    let ran = before.state == VmState::Running;
    if let (true, Some(timeout)) = (ran, how.suspend) {
        suspend_one(vm, timeout)?;
    } else if ran {
        client.act(Action::Pause)?;
    }
    let disks = before
        .config
        .disk
        .iter()
        .flat_map(DiskConfig::paths)
        .cloned();
    let written = write(vm, &client, how, disks.collect());
    if let Err(error) = written {
        if ran {
            // What went wrong first is what counts.
            let _ = client.act(Action::Resume);
        }
        return Err(error);
    }
    if ran && !how.stop {
        client.act(Action::Resume)?;
    }
    Ok(())
}

/// A file that takes nothing once it is too late.
#[derive(Debug)]
struct InTime {
    file: File,
    deadline: Option<Instant>,
}

impl Write for InTime {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.deadline.is_some_and(|end| Instant::now() >= end) {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the time was over before it was written",
            ));
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes the file, whole or not at all, and ends the VM if that is wanted.
fn write(vm: &VmDir, client: &Client, how: &Save, disks: Vec<PathBuf>) -> Result<()> {
    let mut new = how.file.to_owned().into_os_string();
    new.push(".partial");
    let result = (|| {
        // Whoever reads it reads the guest's secrets.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        let mut out = BufWriter::new(InTime {
            file,
            deadline: how.deadline,
        });
        client.snapshot(&mut out)?;
        out.flush()?;
        out.get_ref().file.sync_all()?;
        if how.stop {
            end(vm, client)?;
        }
        // What is left takes no time worth mentioning, and the VM has ended.
        out.get_mut().deadline = None;
        // Nobody writes to the disks now.
        let marks: Vec<_> = disks
            .into_iter()
            .map(DiskMark::of)
            .collect::<std::io::Result<_>>()?;
        write_disks(&mut out, &marks)?;
        let file = out.into_inner()?.file;
        file.sync_all()?;
        fs::rename(&new, how.file)?;
        anyhow::Ok(())
    })();
    if result.is_err() {
        // It need not be there.
        let _ = fs::remove_file(&new);
    }
    result.with_context(|| format!("the snapshot {}", how.file.display()))
}

/// Powers the VM off and waits until its disks are closed.
fn end(vm: &VmDir, client: &Client) -> Result<()> {
    let process = vm.process()?;
    match client.act(Action::Poweroff) {
        Ok(_) | Err(client::Error::Protocol { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some((_, process)) = process
        && !process.wait(END)?
    {
        return Err(failure(
            format!("'{}' does not end", vm.name),
            format!("end it and try again: blanket rm --force {}", vm.name),
        ));
    }
    Ok(())
}

#[derive(clap::Args)]
#[command(
    after_help = "The VM is configured as the saved one was; options override that, as for `blanket \
    run`. What the guest sees (memory, processors, disks, interfaces) has to stay as it was; where a \
    disk or a tap is on this node may change."
)]
pub(crate) struct RestoreArgs {
    /// The snapshot; with --evacuated, the directory.
    #[arg(required_unless_present = "evacuated")]
    file: Option<PathBuf>,

    /// All guests that `blanket evacuate` has saved. Each one's file is removed once it runs.
    #[arg(long, conflicts_with_all = ["name", "changed_disks", "user"])]
    evacuated: bool,

    /// Name of the VM, unique on this node [default: the saved one's].
    #[arg(long)]
    name: Option<VmName>,

    /// Restore it with disks that were changed since: to a guest that remembers
    /// another content they are damaged.
    #[arg(long)]
    changed_disks: bool,

    /// User that the monitor becomes when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,

    #[command(flatten)]
    vm: VmConfig,
}

pub(crate) fn restore(
    home: &Home,
    args: RestoreArgs,
    home_flag: Option<&Path>,
) -> Result<ExitCode> {
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
    pub(crate) user: Option<&'a str>,
    /// What it is configured otherwise.
    pub(crate) over: VmConfig,
}

impl Restore<'_> {
    /// Starts it; its name.
    pub(crate) fn start(self, home: &Home, home_flag: Option<&Path>) -> Result<VmName> {
        check_readable(self.file)?;
        let context = || format!("the snapshot {}", self.file.display());
        let snapshot = Snapshot::open(self.file).with_context(context)?;
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
            snapshot: Some(self.file),
            receive: None,
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
fn check_disks(config: &VmConfig, marks: &[DiskMark]) -> Result<()> {
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
