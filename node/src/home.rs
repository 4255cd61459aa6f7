//! Where VMs are kept on this node.
//!
//! ```text
//! STATE/vms/NAME/   config.toml, record.json, exit.json, identity, *.log
//! STATE/uplinks/    the self-test of each interface
//! STATE/evacuated/  guests that were saved, all at once
//! STATE/notices.json  the provider's notices for which that was done
//! STATE/up.json     what `blanket up` has changed
//! STATE/stores/     the self-test of each volume
//! STATE/disks/NAME/ disks that came with a VM from another node; with an arrival.json,
//!                   what has come of them
//! STATE/disks/.standby/ replicas of other nodes' VMs
//! STATE/receiving/  what such a VM needs until it is here
//! STATE/node/       blanketd's: keys, certificates, store, audit log
//! RUN/NAME/         api.sock, serial.sock, console.sock, migrate.sock, parcel.sock
//! RUN/../blanketd.sock  where blanketd takes commands
//! RUN/../blanket-switch.sock  where the switch does
//! RUN/../blanket-ports/  NAME.N.sock, where it has the ports of VMs' interfaces
//! ```
//!
//! For root STATE is `/var/lib/blanket` and RUN `/run/blanket`; for others
//! they are in the XDG state and runtime directories. Making `STATE/vms/NAME`
//! is what claims a name: of two that try, one succeeds. Who starts or removes
//! a VM holds a lock on that directory.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::daemon::random_text;
use crate::failure::failure;
use crate::name::VmName;

/// Longest path that a Unix socket can have, without the closing zero.
const MAX_SOCKET_PATH: usize = 107;

/// Where this user's VMs are.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    state: PathBuf,
    run: PathBuf,
    /// What `--home` named.
    flag: Option<PathBuf>,
}

impl Home {
    /// The directories that `flag` (or `BLANKET_HOME`), the user and the
    /// environment imply.
    pub(crate) fn locate(flag: Option<&Path>) -> Result<Self> {
        let root = rustix::process::geteuid().is_root();
        Self::locate_in(flag, root, |name| std::env::var_os(name))
    }

    fn locate_in(
        flag: Option<&Path>,
        root: bool,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        if let Some(home) = flag {
            let home = std::path::absolute(home).context("the path of --home")?;
            return Ok(Self {
                state: home.join("vms"),
                run: home.join("run"),
                flag: Some(home),
            });
        }
        if root {
            return Ok(Self {
                state: "/var/lib/blanket/vms".into(),
                run: "/run/blanket".into(),
                flag: None,
            });
        }
        // The XDG specification has relative paths ignored.
        let absolute = |name| {
            env(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let state = absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
            .ok_or_else(|| {
                failure(
                    "neither HOME nor XDG_STATE_HOME is set",
                    "set one, or name a directory with --home",
                )
            })?
            .join("blanket");
        Ok(Self {
            run: absolute("XDG_RUNTIME_DIR")
                .map_or_else(|| state.join("run"), |run| run.join("blanket")),
            state: state.join("vms"),
            flag: None,
        })
    }

    /// The directory that `--home` named, if any.
    pub(crate) fn flag(&self) -> Option<&Path> {
        self.flag.as_deref()
    }

    /// Where the uplinks' self-tests are kept.
    pub(crate) fn uplinks(&self) -> PathBuf {
        self.state.with_file_name("uplinks")
    }

    /// Where the volumes' self-tests are kept.
    pub(crate) fn stores(&self) -> PathBuf {
        self.state.with_file_name("stores")
    }

    /// What `blanket up` has changed on this machine.
    pub(crate) fn up_record(&self) -> PathBuf {
        self.state.with_file_name("up.json")
    }

    /// What `blanketd` keeps.
    pub(crate) fn node(&self) -> PathBuf {
        self.state.with_file_name("node")
    }

    /// Where `blanketd` takes commands. No VM's directory can be there.
    pub(crate) fn daemon_socket(&self) -> PathBuf {
        self.run.with_file_name("blanketd.sock")
    }

    /// Where the switch takes commands. No VM's directory can be there.
    pub(crate) fn switch_socket(&self) -> PathBuf {
        self.run.with_file_name("blanket-switch.sock")
    }

    /// Where guests are saved unless another place is named.
    pub(crate) fn evacuated(&self) -> PathBuf {
        self.state.with_file_name("evacuated")
    }

    /// Where a running VM is saved to be cloned.
    pub(crate) fn cloning(&self) -> PathBuf {
        self.state.with_file_name("cloning")
    }

    /// Where disks are that came with VMs from other nodes: these are Blanket's.
    pub(crate) fn disks(&self) -> PathBuf {
        self.state.with_file_name("disks")
    }

    /// Where images are that disks of VMs that come may have much in common with.
    pub(crate) fn bases(&self) -> PathBuf {
        self.state.with_file_name("bases")
    }

    /// Where replicas of other nodes' VMs are. No VM is called so.
    pub(crate) fn standby(&self) -> PathBuf {
        self.disks().join(".standby")
    }

    /// What a VM that comes from another node needs until it is here.
    pub(crate) fn receiving(&self) -> PathBuf {
        self.state.with_file_name("receiving")
    }

    /// The provider's notices for which guests have been saved.
    pub(crate) fn notices(&self) -> PathBuf {
        self.state.with_file_name("notices.json")
    }

    /// The directories of `name`, which need not exist.
    pub(crate) fn vm(&self, name: &VmName) -> VmDir {
        VmDir {
            name: name.clone(),
            state: self.state.join(name.as_str()),
            run: self.run.join(name.as_str()),
        }
    }

    /// All VMs, by name.
    pub(crate) fn vms(&self) -> Result<Vec<VmDir>> {
        let entries = match fs::read_dir(&self.state) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.state.display()));
            }
        };
        let mut names: Vec<VmName> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        Ok(names.iter().map(|name| self.vm(name)).collect())
    }

    /// The VM called `name`; an error that lists what exists if there is none.
    pub(crate) fn existing(&self, name: &VmName) -> Result<VmDir> {
        let vm = self.vm(name);
        if vm.state.is_dir() {
            return Ok(vm);
        }
        let names: Vec<_> = self.vms()?.iter().map(|vm| vm.name.to_string()).collect();
        Err(failure(
            format!("there is no VM '{name}'"),
            if names.is_empty() {
                "there are none at all; start one with blanket run".to_owned()
            } else {
                format!("use one of: {}", names.join(", "))
            },
        ))
    }

    /// Takes `name` for a new VM and locks it.
    pub(crate) fn claim(&self, name: &VmName) -> Result<(VmDir, Lock)> {
        let vm = self.vm(name);
        vm.check_socket_paths()?;
        for parent in [&self.state, &self.run] {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        let private = |dir: &Path| DirBuilder::new().mode(0o700).create(dir);
        match private(&vm.state) {
            Ok(()) => (),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(failure(
                    format!("the name '{name}' is in use"),
                    format!("take another, or remove that VM: blanket rm {name}"),
                ));
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make {}", vm.state.display()));
            }
        }
        let lock = vm.lock()?;
        // Left by a VM of that name whose node lost its state directory.
        let _ = fs::remove_dir_all(&vm.run);
        if let Err(error) = private(&vm.run) {
            vm.remove()?;
            return Err(error).with_context(|| format!("cannot make {}", vm.run.display()));
        }
        Ok((vm, lock))
    }
}

/// The right to start or remove a VM, given back when dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _dir: File,
}

/// One VM's directories.
#[derive(Clone, Debug)]
pub(crate) struct VmDir {
    pub(crate) name: VmName,
    state: PathBuf,
    run: PathBuf,
}

impl VmDir {
    pub(crate) fn config(&self) -> PathBuf {
        self.state.join("config.toml")
    }
    pub(crate) fn record(&self) -> PathBuf {
        self.state.join("record.json")
    }
    pub(crate) fn exit(&self) -> PathBuf {
        self.state.join("exit.json")
    }
    pub(crate) fn monitor_log(&self) -> PathBuf {
        self.state.join("monitor.log")
    }
    pub(crate) fn serial_log(&self) -> PathBuf {
        self.state.join("serial.log")
    }
    pub(crate) fn console_log(&self) -> PathBuf {
        self.state.join("console.log")
    }
    /// The image of a clone's disk, and what that is based on.
    pub(crate) fn overlay(&self, index: usize) -> (PathBuf, PathBuf) {
        let disk = |suffix: &str| self.state.join(format!("disk{index}.{suffix}"));
        (disk("qcow2"), disk("base"))
    }
    /// The kernel of a VM that came from another node.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.state.join("kernel")
    }
    /// Its initial RAM disk.
    pub(crate) fn initrd(&self) -> PathBuf {
        self.state.join("initrd")
    }
    /// What the VM is known by on other nodes, whatever it is called: random.
    pub(crate) fn identity(&self) -> Result<String> {
        let path = self.state.join("identity");
        match fs::read_to_string(&path) {
            Ok(id) => return Ok(id.trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        }
        let id = random_text()?;
        self.set_identity(&id)?;
        Ok(id)
    }

    /// The same, if it has ever been asked for.
    pub(crate) fn known_identity(&self) -> Option<String> {
        let id = fs::read_to_string(self.state.join("identity")).ok()?;
        Some(id.trim().to_owned())
    }

    /// Has it known by this.
    pub(crate) fn set_identity(&self, id: &str) -> Result<()> {
        self.write(&self.state.join("identity"), id.as_bytes())
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }
    pub(crate) fn serial_socket(&self) -> PathBuf {
        self.run.join("serial.sock")
    }
    pub(crate) fn migration_socket(&self) -> PathBuf {
        self.run.join("migrate.sock")
    }
    /// Where the node comes that the VM is to move to.
    pub(crate) fn parcel_socket(&self) -> PathBuf {
        self.run.join("parcel.sock")
    }
    /// Where the switch has the port of an interface. Beside the directories
    /// of VMs, which are their owner's only: the monitor, which has become
    /// another user, connects again when the switch has been started again.
    pub(crate) fn net_socket(&self, index: usize) -> PathBuf {
        let all = self.run.parent().unwrap_or(&self.run);
        let ports = all.with_file_name("blanket-ports");
        ports.join(format!("{}.{index}.sock", self.name))
    }
    pub(crate) fn console_socket(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    fn check_socket_paths(&self) -> Result<()> {
        let sockets = [self.console_socket(), self.net_socket(15)];
        let len = |path: &PathBuf| path.as_os_str().len();
        let longest = sockets.into_iter().max_by_key(len).unwrap_or_default();
        let len = len(&longest);
        if len > MAX_SOCKET_PATH {
            return Err(failure(
                format!(
                    "{} has {len} bytes; a Unix socket's path has at most {MAX_SOCKET_PATH}",
                    longest.display()
                ),
                "use a shorter name, or a shorter directory with --home",
            ));
        }
        Ok(())
    }

    /// Takes the lock, or says that another command has it.
    pub(crate) fn lock(&self) -> Result<Lock> {
        // `blanket ps` holds it for a moment: that is worth a little wait.
        for _ in 0..20 {
            if let Some(lock) = self.try_lock(FlockOperation::NonBlockingLockExclusive)? {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(failure(
            format!("'{}' is being started or removed", self.name),
            "wait for that to end, then try again",
        ))
    }

    /// Whether another command is starting or removing it.
    pub(crate) fn is_busy(&self) -> Result<bool> {
        let lock = self.try_lock(FlockOperation::NonBlockingLockShared)?;
        Ok(lock.is_none())
    }

    fn try_lock(&self, operation: FlockOperation) -> Result<Option<Lock>> {
        let dir = File::open(&self.state)
            .with_context(|| format!("cannot open {}", self.state.display()))?;
        match flock(&dir, operation) {
            Ok(()) => (),
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot lock {}", self.state.display()));
            }
        }
        // The directory may have been removed, and another made, before the
        // lock was had.
        let held = dir.metadata()?.ino();
        let same = fs::metadata(&self.state).is_ok_and(|now| now.ino() == held);
        Ok(same.then_some(Lock { _dir: dir }))
    }

    /// Reads one of the JSON files; `None` if it is not there.
    pub(crate) fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes one of the files, whole or not at all.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let new = path.with_extension("new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            fs::rename(&new, path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes one of the JSON files, whole or not at all.
    pub(crate) fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<()> {
        self.write(path, &serde_json::to_vec_pretty(value)?)
    }

    /// Removes the sockets.
    pub(crate) fn remove_run(&self) -> Result<()> {
        remove_tree(&self.run)
    }

    /// Removes everything; from then on the name is free.
    pub(crate) fn remove(&self) -> Result<()> {
        self.remove_run()?;
        remove_tree(&self.state)
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::locate(Some(dir.path())).unwrap();
        (dir, home)
    }

    fn name(text: &str) -> VmName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_can_be_claimed_once_until_it_is_removed() {
        let (_dir, home) = home();
        let (vm, _lock) = home.claim(&name("web")).unwrap();
        let error = home.claim(&name("web")).unwrap_err();
        assert!(crate::failure::describe(&error).contains("blanket rm web"));
        vm.remove().unwrap();
        home.claim(&name("web")).unwrap();
    }

    #[test]
    fn of_many_that_claim_a_name_at_once_one_gets_it() {
        let (_dir, home) = home();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let home = home.clone();
                std::thread::spawn(move || home.claim(&name("web")).is_ok())
            })
            .collect();
        let won = threads.into_iter().map(|thread| thread.join().unwrap());
        assert_eq!(won.filter(|won| *won).count(), 1);
    }

    #[test]
    fn a_locked_vm_is_busy_and_an_unlocked_one_is_not() {
        let (_dir, home) = home();
        let (vm, lock) = home.claim(&name("web")).unwrap();
        assert!(vm.lock().unwrap_err().to_string().contains("being started"));
        drop(lock);
        vm.lock().unwrap();
    }

    #[test]
    fn an_unknown_name_lists_those_that_exist() {
        let (_dir, home) = home();
        let _b = home.claim(&name("b")).unwrap();
        let _a = home.claim(&name("a")).unwrap();
        let error = home.existing(&name("c")).unwrap_err();
        assert!(crate::failure::describe(&error).ends_with("use one of: a, b"));
        assert_eq!(home.vms().unwrap().len(), 2);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(100));
        let home = Home::locate(Some(&deep)).unwrap();
        let error = home.claim(&name("web")).unwrap_err();
        assert!(error.to_string().contains("at most 107"), "{error}");
        assert!(!deep.exists());
    }

    #[test]
    fn the_xdg_directories_are_used_and_relative_ones_ignored() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |wanted: &str| {
                let found = pairs.iter().find(|(name, _)| *name == wanted);
                found.map(|(_, value)| OsString::from(*value))
            }
        };
        let all = &[
            ("HOME", "/h"),
            ("XDG_STATE_HOME", "/s"),
            ("XDG_RUNTIME_DIR", "/r"),
        ];
        let home = Home::locate_in(None, false, env(all)).unwrap();
        assert_eq!(home.state, Path::new("/s/blanket/vms"));
        assert_eq!(home.run, Path::new("/r/blanket"));
        let home =
            Home::locate_in(None, false, env(&[("HOME", "/h"), ("XDG_STATE_HOME", "s")])).unwrap();
        assert_eq!(home.state, Path::new("/h/.local/state/blanket/vms"));
        assert_eq!(home.run, Path::new("/h/.local/state/blanket/run"));
        assert!(Home::locate_in(None, false, env(&[])).is_err());
        let home = Home::locate_in(None, true, env(all)).unwrap();
        assert_eq!(home.run, Path::new("/run/blanket"));
    }

    #[test]
    fn files_are_replaced_whole_and_absent_ones_read_as_none() {
        let (_dir, home) = home();
        let (vm, _lock) = home.claim(&name("web")).unwrap();
        assert_eq!(vm.read::<u32>(&vm.exit()).unwrap(), None);
        vm.write_json(&vm.exit(), &7).unwrap();
        vm.write_json(&vm.exit(), &8).unwrap();
        assert_eq!(vm.read::<u32>(&vm.exit()).unwrap(), Some(8));
        vm.write(&vm.exit(), b"{").unwrap();
        assert!(vm.read::<u32>(&vm.exit()).is_err());
    }
}
