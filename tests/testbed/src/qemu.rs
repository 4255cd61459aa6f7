//! One QEMU process.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::cache;
use crate::cleanup;
use crate::error::{Context, Result};

const PROGRAM: &str = "qemu-system-x86_64";

/// The emulated CPU. TCG does not tell a nested hypervisor of its guests'
/// `xsetbv`, so there is no XSAVE; and it copies byte by byte what processors
/// with fast string operations copy at once, so there are none.
const TCG_CPU: &str = "max,-xsave,-erms,-fsrm";

/// How a machine's processor is provided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM with VMX or SVM, nested: fast.
    Kvm,
    /// Emulation in software, with emulated SVM and nested paging: runs everywhere, about ten
    /// times slower.
    Tcg,
}

impl Accelerator {
    /// What this host can do. KVM is chosen only if it can run a machine that has KVM itself:
    /// `/dev/kvm` alone does not say so, as there is KVM without hardware support.
    pub fn probe() -> Self {
        let has = |path: &str, accept: fn(&str) -> bool| {
            fs::read_to_string(path).is_ok_and(|text| accept(&text))
        };
        let hardware = has("/proc/cpuinfo", |text| {
            text.lines()
                .find(|line| line.starts_with("flags"))
                .is_some_and(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
        });
        let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            has(&format!("/sys/module/{module}/parameters/nested"), |text| {
                matches!(text.trim(), "Y" | "1")
            })
        });
        let usable = || {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok()
        };
        if hardware && nested && usable() {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    /// QEMU's arguments, with more properties of the processor, such as `hypervisor=off`.
    pub(crate) fn arguments(self, properties: &str) -> [String; 4] {
        let (accelerator, processor) = match self {
            Self::Kvm => ("kvm", "host"),
            Self::Tcg => ("tcg,thread=multi", TCG_CPU),
        };
        let comma = if properties.is_empty() { "" } else { "," };
        [
            "-accel".to_owned(),
            accelerator.to_owned(),
            "-cpu".to_owned(),
            format!("{processor}{comma}{properties}"),
        ]
    }
}

/// A folder for one machine's sockets and logs, removed in the end. QEMU runs in it, so that the
/// names of sockets stay short however deep the workspace is.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    handle: File,
}

impl RunFolder {
    pub(crate) fn new() -> Result<Self> {
        let parent = cache::subfolder("run")?;
        remove_stale(&parent);
        let path = tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .tempdir_in(&parent)
            .context(|| format!("cannot make a folder in {}", parent.display()))?
            .keep();
        cleanup::folder_made(&path);
        let handle = File::open(&path).context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path, handle })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A path to the socket `name` that is short enough for the system calls.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // A later run removes what is left.
        let _ = fs::remove_dir_all(&self.path);
        cleanup::folder_removed(&self.path);
    }
}

/// Removes the folders of processes that were killed.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let owner = name.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            // Another process may be removing it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A QEMU process. It is killed when this is dropped.
pub(crate) struct Qemu {
    child: Mutex<Child>,
}

impl Qemu {
    /// Starts QEMU in the folder. Its messages go to `qemu.log` there.
    pub(crate) fn start(folder: &RunFolder, arguments: &[OsString]) -> Result<Self> {
        let log = folder.path().join("qemu.log");
        let output = || File::options().create(true).append(true).open(&log);
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .current_dir(folder.path())
            // For the temporary files behind disks whose writes are discarded.
            .env("TMPDIR", folder.path())
            .stdin(Stdio::null())
            .stdout(output().context(|| format!("cannot write {}", log.display()))?)
            .stderr(output().context(|| format!("cannot write {}", log.display()))?);
        // SAFETY: between fork and exec the closure makes one system call, which is
        // async-signal-safe, and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = spawn(command).context(|| format!("cannot run {PROGRAM}"))?;
        cleanup::process_started(child.id());
        Ok(Self {
            child: Mutex::new(child),
        })
    }

    /// Connects to a socket that QEMU serves, as soon as it does.
    pub(crate) fn connect(&self, path: &Path, deadline: Instant) -> io::Result<UnixStream> {
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => {}
            }
            if let Some(status) = self.exited() {
                return Err(io::Error::other(format!("QEMU ended with {status}")));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The status with which QEMU has ended, if it has.
    pub(crate) fn exited(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let status = child.try_wait().ok().flatten();
        if status.is_some() {
            cleanup::process_ended(child.id());
        }
        status
    }

    /// Waits until QEMU ends by itself.
    pub(crate) fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.exited();
            if status.is_some() || Instant::now() > deadline {
                return status;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills QEMU.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Both fail only when it has ended already.
        let _ = child.kill();
        cleanup::process_ended(child.id());
        let _ = child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What is asked of the thread that starts processes: a command, and where its child goes.
type Order = (Command, SyncSender<io::Result<Child>>);

/// Starts a process on a thread that never ends: the death signal comes when the *thread* that
/// started the child ends, and nodes may outlive the thread that boots them.
fn spawn(command: Command) -> io::Result<Child> {
    static STARTER: LazyLock<SyncSender<Order>> = LazyLock::new(|| {
        let (orders, received): (SyncSender<Order>, Receiver<Order>) = sync_channel(0);
        thread::spawn(move || {
            for (mut command, reply) in received {
                // Nobody waits when the asking thread has ended.
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes has ended");
    STARTER.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// Kills a machine that runs for too long.
pub(crate) struct Watchdog {
    /// Dropping it calls the dog off.
    _leash: SyncSender<()>,
}

impl Watchdog {
    pub(crate) fn new(limit: Duration, bite: impl FnOnce() + Send + 'static) -> Self {
        let (leash, kept) = sync_channel::<()>(0);
        thread::spawn(move || {
            if kept.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                bite();
            }
        });
        Self { _leash: leash }
    }
}
