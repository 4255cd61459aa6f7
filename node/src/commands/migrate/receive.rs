//! `blanket receive`, which `blanketd` starts when a VM comes from another node:
//! it makes what the VM needs here, starts its monitor, and waits until it is
//! decided who has the guest.
//!
//! What comes is another node's word: no path in it is used.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_drivers::store::{Engine, Format};
use blanket_vmm::api::types::VmState;
use blanket_vmm::config::{CharConfig, VmConfig};
use sha2::{Digest, Sha256};

use super::{INQUIRY, LOOK, has_ended, is_followed, resume_orphan};
use crate::cluster::parcel::{
    Answer, Go, Item, MAX_ITEMS, Parcel, State, Verdict, What, hear, say,
};
use crate::commands::run::{Start, settle};
use crate::commands::store::choose_engine;
use crate::failure::{failure, problem};
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// How long the other node may be silent before the guest has begun to move.
const PATIENCE: Duration = Duration::from_secs(120);
/// The largest kernel or initial RAM disk.
const MAX_BOOT: u64 = 4 << 30;
/// Bytes of a file that are taken at once.
const PIECE: usize = 256 << 10;
/// So much of the node's disk is left free.
const SPARE: u64 = 64 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory with the sockets that lead to the other node.
    stage: PathBuf,
}

/// The socket that leads to `blanket migrate`.
pub(crate) const CONTROL: &str = "control.sock";
/// The socket that leads to the guest's monitor.
pub(crate) const MEMORY: &str = "memory.sock";

pub(crate) fn receive(home: &Home, args: &Args) -> Result<ExitCode> {
    let mut stream = UnixStream::connect(args.stage.join(CONTROL))
        .context("cannot connect to the other node")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let parcel: Parcel = hear(&mut stream)?;
    let mut arrival = answer(&mut stream, || Arrival::prepare(home, &args.stage, &parcel))?;
    for item in &parcel.files {
        let taken = arrival.take_file(&mut stream, item);
        answer(&mut stream, || taken)?;
    }
    let go: Go = hear(&mut stream)?;
    answer(&mut stream, || arrival.start(home, go))?;
    // However long it takes: the engine has its own limits.
    stream.set_read_timeout(None)?;
    let state = match hear(&mut stream) {
        Ok(Verdict::Moved | Verdict::Stayed) => arrival.settle()?,
        Ok(Verdict::Orphaned) => resume_orphan(&arrival.vm)?,
        // Nobody is there to be told: the guest's monitors know.
        Err(_) => arrival.settle()?,
    };
    if state == State::Gone {
        arrival.discard();
    } else {
        arrival.made.clear();
    }
    let _ = say(&mut stream, &state);
    Ok(ExitCode::SUCCESS)
}

/// Does a step and says how it went.
fn answer<T>(stream: &mut UnixStream, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = work();
    let answer = match &done {
        Ok(_) => Answer::Done,
        Err(error) => Answer::Refused(problem(error)),
    };
    say(stream, &answer)?;
    done
}

/// A VM that comes.
struct Arrival {
    vm: VmDir,
    stage: PathBuf,
    /// The directory of its disks.
    disks: PathBuf,
    /// What has been made for it, to be unmade if it does not come.
    made: Vec<PathBuf>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.discard();
    }
}

impl Arrival {
    /// Checks that the VM can come, and makes its disks.
    fn prepare(home: &Home, stage: &Path, parcel: &Parcel) -> Result<Self> {
        let name: VmName = parcel.name.parse().map_err(anyhow::Error::msg)?;
        let vm = home.vm(&name);
        if home.existing(&name).is_ok() {
            return Err(failure(
                format!("the name '{name}' is in use there"),
                "take another with --as, or remove that VM there",
            ));
        }
        anyhow::ensure!(
            parcel.files.len() <= MAX_ITEMS && parcel.disks.len() <= MAX_ITEMS,
            "the VM has too many disks"
        );
        let mut arrival = Self {
            vm,
            stage: stage.to_owned(),
            disks: home.disks().join(name.as_str()),
            made: Vec::new(),
            kernel: None,
            initrd: None,
        };
        let is_disk = |item: &&Item| matches!(item.what, What::Disk(_));
        let files: u64 = parcel
            .files
            .iter()
            .filter(is_disk)
            .map(|item| item.len)
            .sum();
        let blanks = parcel
            .disks
            .iter()
            .map(|blank| blank.used.min(blank.capacity));
        let needed = blanks.fold(files, u64::saturating_add);
        if needed > 0 || !parcel.disks.is_empty() {
            arrival.make_folder(needed)?;
        }
        for blank in &parcel.disks {
            let (path, file) = arrival.make_disk(blank.index)?;
            file.set_len(blank.capacity)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(arrival)
    }

    fn make_folder(&mut self, needed: u64) -> Result<()> {
        let folder = self.disks.clone();
        let context = || format!("cannot make {}", folder.display());
        if let Some(above) = folder.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(above)
                .with_context(context)?;
        }
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(failure(
                    format!(
                        "there are disks of an earlier VM of that name in {} there",
                        folder.display()
                    ),
                    "take another name with --as, or delete them if nobody needs them",
                ));
            }
            made => made.with_context(context)?,
        }
        self.made.push(folder.clone());
        let space = rustix::fs::statvfs(&folder).with_context(context)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < needed.saturating_add(SPARE) {
            return Err(failure(
                format!(
                    "the VM's disks take {} MiB, and {} has {} MiB left there",
                    needed >> 20,
                    folder.display(),
                    free >> 20
                ),
                "make room there, or mount a larger volume at the directory above",
            ));
        }
        Ok(())
    }

    fn disk(&self, index: usize) -> PathBuf {
        self.disks.join(format!("{index}.img"))
    }

    fn make_disk(&mut self, index: usize) -> Result<(PathBuf, File)> {
        self.make(self.disk(index))
    }

    fn make(&mut self, path: PathBuf) -> Result<(PathBuf, File)> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        self.made.push(path.clone());
        Ok((path, file))
    }

    /// Takes a file's bytes; zeros need no room.
    fn take_file(&mut self, stream: &mut UnixStream, item: &Item) -> Result<()> {
        let boot = !matches!(item.what, What::Disk(_));
        anyhow::ensure!(!boot || item.len <= MAX_BOOT, "its kernel is too large");
        let (path, mut file) = match item.what {
            What::Disk(index) => self.make_disk(index)?,
            What::Kernel => self.make(self.stage.join("kernel"))?,
            What::Initrd => self.make(self.stage.join("initrd"))?,
        };
        let context = || format!("cannot write {}", path.display());
        let mut hasher = Sha256::new();
        let mut piece = vec![0; PIECE];
        let mut left = item.len;
        while left > 0 {
            let n = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            let piece = &mut piece[..n];
            stream
                .read_exact(piece)
                .context("the other node stopped sending")?;
            hasher.update(&*piece);
            if piece.iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(n as i64))
                    .with_context(context)?;
            } else {
                file.write_all(piece).with_context(context)?;
            }
            left -= n as u64;
        }
        file.set_len(item.len).with_context(context)?;
        file.sync_data().with_context(context)?;
        let mut sum = [0; 32];
        stream.read_exact(&mut sum)?;
        anyhow::ensure!(sum == *hasher.finalize(), "a file was changed on the way");
        match item.what {
            What::Kernel => self.kernel = Some(path),
            What::Initrd => self.initrd = Some(path),
            What::Disk(_) => {}
        }
        Ok(())
    }

    /// Starts the monitor.
    fn start(&mut self, home: &Home, go: Go) -> Result<()> {
        let config = settle(self.here(home, go.config), &self.vm)?;
        // They are moved to the VM's directory once that is there.
        let mut kept = config.clone();
        kept.kernel = self.kernel.as_ref().map(|_| self.vm.kernel());
        kept.initrd = self.initrd.as_ref().map(|_| self.vm.initrd());
        let prepare = |vm: &VmDir| {
            let pairs = [(&self.kernel, vm.kernel()), (&self.initrd, vm.initrd())];
            for (from, to) in pairs {
                if let Some(from) = from {
                    fs::rename(from, &to)
                        .with_context(|| format!("cannot make {}", to.display()))?;
                }
            }
            Ok(())
        };
        let start = Start {
            config: &kept,
            user: go.user.as_deref(),
            home: home.flag(),
            attach: false,
            snapshot: None,
            eager: false,
            prepare: Some(&prepare),
            receive: Some(&self.stage.join(MEMORY)),
        };
        start.claim_and_start(home, &self.vm.name).map(drop)
    }

    /// The other node's configuration with this one's places.
    fn here(&self, home: &Home, mut config: VmConfig) -> VmConfig {
        config.kernel.clone_from(&self.kernel);
        config.initrd.clone_from(&self.initrd);
        for (index, disk) in config.disk.iter_mut().enumerate() {
            disk.path = self.disk(index);
            disk.format = Some(Format::Raw);
            disk.backing = false;
            disk.stripe.clear();
            disk.direct = false;
            disk.engine = Engine::Auto;
            choose_engine(home, disk);
        }
        // Sockets and logs are where a new VM has them.
        let own = |port: Option<CharConfig>| {
            port.map(|port| CharConfig {
                stdio: port.stdio || port.socket.is_some() || port.log.is_some(),
                ..CharConfig::default()
            })
        };
        config.serial = own(config.serial);
        config.console = own(config.console);
        config
    }

    /// Waits until it is decided who has the guest: the monitor here runs it, or
    /// ends.
    fn settle(&self) -> Result<State> {
        let client = self.vm.client()?;
        let mut paused = None;
        loop {
            if self.vm.process()?.is_none() {
                return has_ended(&self.vm);
            }
            match client.info() {
                // What carries its memory here ends with this process.
                Ok(info) if info.state == VmState::Running && !is_followed(&client) => {
                    return Ok(State::Runs);
                }
                // It asks the source for a while. After that it is for people
                // to say whether it may run.
                Ok(info) if info.state == VmState::Paused => {
                    let since = *paused.get_or_insert_with(Instant::now);
                    if since.elapsed() > INQUIRY {
                        return Ok(State::Undecided);
                    }
                }
                _ => {}
            }
            std::thread::sleep(LOOK);
        }
    }

    fn discard(&mut self) {
        for path in self.made.drain(..).rev() {
            let _ = if path.is_dir() {
                fs::remove_dir(&path)
            } else {
                fs::remove_file(&path)
            };
        }
    }
}
