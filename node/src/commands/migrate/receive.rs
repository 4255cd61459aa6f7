//! `blanket receive`, which `blanketd` starts when a VM comes from another node:
//! it makes what the VM needs here, starts its monitor, and waits until it is
//! decided who has the guest.
//!
//! What comes is another node's word: no path in it is used.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_drivers::store::{Engine, Format};
use blanket_migration::Phase;
use blanket_vmm::api::types::VmState;
use blanket_vmm::client::Client;
use blanket_vmm::config::{CharConfig, VmConfig};
use sha2::{Digest, Sha256};

use super::folder::{self, Folder, Owner};
use super::remote::is_readable;
use super::shared;
use super::{INQUIRY, LOOK, has_arrived, has_ended, is_followed, resume_orphan};
use crate::cluster::names::NodeName;
use crate::cluster::parcel::{
    self, Answer, Go, Item, MAX_ITEMS, Parcel, State, Verdict, What, Wish, hear, say,
};
use crate::commands::replicate::standby::stand_by;
use crate::commands::run::{Start, settle};
use crate::commands::store::choose_engine;
use crate::failure::{failure, problem};
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::ports::{self, Origins};

/// How long the other node may be silent before the guest has begun to move.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is looked whether the VM runs, and on.
const ATTENTION: Duration = Duration::from_millis(100);
/// The largest kernel or initial RAM disk.
pub(crate) const MAX_BOOT: u64 = 4 << 30;
/// Bytes of a file that are taken at once.
const PIECE: usize = 256 << 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory with the sockets that lead to the other node.
    stage: PathBuf,

    /// The other node.
    #[arg(long)]
    from: NodeName,

    /// Where disks may be that both nodes have.
    #[arg(long)]
    shared: Vec<PathBuf>,
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
    let hex = |id: &str| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    anyhow::ensure!(hex(&parcel.id), "the VM has no identity");
    let owner = Owner {
        id: parcel.id.clone(),
        from: args.from.clone(),
    };
    match parcel.wish {
        Wish::Come => {}
        Wish::Discard => {
            answer(&mut stream, || folder::discard(home, &owner))?;
            return Ok(ExitCode::SUCCESS);
        }
        Wish::StandBy => return stand_by(home, &args.stage, &mut stream, &parcel, owner),
    }
    let prepare = || Arrival::prepare(home, args, &parcel, owner);
    let mut arrival = answer_as(&mut stream, prepare, |arrival| {
        let key = arrival.switch.clone();
        key.map_or(Answer::Done, Answer::Joined)
    })?;
    for item in &parcel.files {
        let taken = arrival.take_file(&mut stream, item);
        answer(&mut stream, || taken)?;
    }
    let go: Go = hear(&mut stream)?;
    answer(&mut stream, || arrival.start(home, go))?;
    // However long it takes: the engine has its own limits.
    stream.set_read_timeout(None)?;
    let mut ran = false;
    let state = match arrival.attend(&stream, &mut ran)? {
        Some(ended) => ended,
        None => match hear(&mut stream) {
            Ok(Verdict::Moved | Verdict::Stayed) => arrival.settle(ran)?,
            Ok(Verdict::Orphaned) => resume_orphan(&arrival.vm)?,
            // Nobody is there to be told: the guest's monitors know.
            Err(_) => arrival.settle(ran)?,
        },
    };
    if matches!(state, State::Runs) {
        ports::arrived(home, &arrival.vm, &arrival.ports);
    }
    arrival.end(state)?;
    let _ = say(&mut stream, &state);
    Ok(ExitCode::SUCCESS)
}

/// Does a step and says how it went.
pub(crate) fn answer<T>(stream: &mut UnixStream, work: impl FnOnce() -> Result<T>) -> Result<T> {
    answer_as(stream, work, |_| Answer::Done)
}

/// The same, with more to say of what was done.
fn answer_as<T>(
    stream: &mut UnixStream,
    work: impl FnOnce() -> Result<T>,
    done_as: impl FnOnce(&T) -> Answer,
) -> Result<T> {
    let done = work();
    let answer = match &done {
        Ok(done) => done_as(done),
        Err(error) => Answer::Refused(problem(error)),
    };
    say(stream, &answer)?;
    done
}

/// Takes a file's bytes; zeros need no room.
pub(crate) fn take_bytes(
    stream: &mut UnixStream,
    file: &mut File,
    path: &Path,
    len: u64,
) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut left = len;
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
    file.set_len(len).with_context(context)?;
    file.sync_data().with_context(context)?;
    let mut sum = [0; 32];
    stream.read_exact(&mut sum)?;
    anyhow::ensure!(sum == *hasher.finalize(), "a file was changed on the way");
    Ok(())
}

/// Another node's configuration with this one's places.
pub(crate) fn localized(
    home: &Home,
    mut config: VmConfig,
    [kernel, initrd]: [&Option<PathBuf>; 2],
    disk_of: impl Fn(usize) -> PathBuf,
) -> VmConfig {
    config.kernel.clone_from(kernel);
    config.initrd.clone_from(initrd);
    for (index, disk) in config.disk.iter_mut().enumerate() {
        disk.path = disk_of(index);
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

/// Whether a VM in this state, which another monitor's guest comes to, has run it.
fn has_run(client: &Client, state: VmState) -> bool {
    let came = || {
        let status = client.migration();
        status.is_ok_and(|it| matches!(it.phase, Phase::Following | Phase::Moved))
    };
    match state {
        VmState::Running => true,
        VmState::Stopped => came(),
        VmState::Created | VmState::Paused | VmState::Suspended => false,
    }
}

/// A VM that comes.
struct Arrival {
    vm: VmDir,
    /// What it is known by.
    id: String,
    stage: PathBuf,
    /// The directory of its disks, if it has any.
    folder: Option<Folder>,
    /// Disks that both nodes have.
    shared: Vec<(usize, PathBuf)>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    /// Its interfaces on networks of the other node's switch.
    ports: Vec<parcel::Port>,
    /// The key of the switch here, if there are some.
    switch: Option<String>,
}

impl Arrival {
    /// Checks that the VM can come, and makes its disks.
    fn prepare(home: &Home, args: &Args, parcel: &Parcel, owner: Owner) -> Result<Self> {
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
        anyhow::ensure!(
            parcel.ports.len() <= MAX_ITEMS,
            "the VM has too many interfaces"
        );
        let switch = ports::can_come(home, &parcel.ports)?;
        let is_disk = |item: &&Item| matches!(item.what, What::Disk(_));
        let files = parcel.files.iter().filter(is_disk).map(|item| item.len);
        let files = files.fold(0, u64::saturating_add);
        let folder = if files > 0 || !parcel.disks.is_empty() {
            let parts = (&*parcel.disks, &*parcel.bases);
            Some(Folder::open(home, &name, owner, parts, files)?)
        } else {
            None
        };
        Ok(Self {
            vm,
            id: parcel.id.clone(),
            stage: args.stage.clone(),
            shared: shared::find(&parcel.shared, &args.shared)?,
            folder,
            kernel: None,
            initrd: None,
            switch,
            ports: parcel.ports.clone(),
        })
    }

    /// A file that comes, and its place.
    fn make(&mut self, what: What) -> Result<(PathBuf, File)> {
        let path = match (what, &mut self.folder) {
            (What::Kernel, _) => self.stage.join("kernel"),
            (What::Initrd, _) => self.stage.join("initrd"),
            (What::Disk(index), Some(folder)) => {
                let path = folder.disk(index);
                folder.not_kept(path.clone());
                path
            }
            (What::Disk(_), None) => anyhow::bail!("there is no place for a disk"),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        Ok((path, file))
    }

    /// Takes a file's bytes; zeros need no room.
    fn take_file(&mut self, stream: &mut UnixStream, item: &Item) -> Result<()> {
        let boot = !matches!(item.what, What::Disk(_));
        anyhow::ensure!(!boot || item.len <= MAX_BOOT, "its kernel is too large");
        let (path, mut file) = self.make(item.what)?;
        take_bytes(stream, &mut file, &path, item.len)?;
        match item.what {
            What::Kernel => self.kernel = Some(path),
            What::Initrd => self.initrd = Some(path),
            What::Disk(_) => {}
        }
        Ok(())
    }

    /// Starts the monitor.
    fn start(&mut self, home: &Home, go: Go) -> Result<()> {
        let folder = self.folder.as_ref();
        let shared = &self.shared;
        let disk = |index| match shared.iter().find(|(it, _)| *it == index) {
            Some((_, path)) => path.clone(),
            None => folder.map(|folder| folder.disk(index)).unwrap_or_default(),
        };
        let direct: Vec<_> = go.config.disk.iter().map(|disk| disk.direct).collect();
        let mut config = localized(home, go.config, [&self.kernel, &self.initrd], disk);
        // Where it is the same storage, it can what it could.
        for (index, _) in shared {
            if let (Some(disk), Some(direct)) = (config.disk.get_mut(*index), direct.get(*index)) {
                disk.direct = *direct;
            }
        }
        ports::make_networks(home, &self.ports, &mut config)?;
        let config = settle(config, &self.vm)?;
        // They are moved to the VM's directory once that is there.
        let mut kept = config.clone();
        kept.kernel = self.kernel.as_ref().map(|_| self.vm.kernel());
        kept.initrd = self.initrd.as_ref().map(|_| self.vm.initrd());
        if let Some(folder) = &mut self.folder {
            folder.begin()?;
        }
        let prepare = |vm: &VmDir| {
            vm.set_identity(&self.id)?;
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
            shared_disks: !self.shared.is_empty(),
            origins: Some(Origins::There(&self.ports)),
        };
        start.claim_and_start(home, &self.vm.name).map(drop)
    }

    /// Waits for the other node's word; or until the guest has run here, and its
    /// monitor has ended before that. `ran` is told whether it has.
    fn attend(&self, stream: &UnixStream, ran: &mut bool) -> Result<Option<State>> {
        let client = self.vm.client()?;
        while !is_readable(stream, ATTENTION) {
            if self.vm.process()?.is_some() {
                let info = client.info();
                *ran |= info.is_ok_and(|info| has_run(&client, info.state));
            } else if *ran {
                return has_ended(&self.vm, true).map(Some);
            }
        }
        Ok(None)
    }

    /// Waits until it is decided who has the guest: the monitor here runs it, or
    /// ends; it `ran` here or has not yet.
    fn settle(&self, mut ran: bool) -> Result<State> {
        let client = self.vm.client()?;
        let mut paused = None;
        loop {
            if self.vm.process()?.is_none() {
                return has_ended(&self.vm, ran);
            }
            let info = client.info();
            ran |= info.as_ref().is_ok_and(|info| has_run(&client, info.state));
            match info {
                // What carries its memory here ends with this process.
                Ok(info) if has_arrived(&client, info.state) => return Ok(State::Runs),
                // It asks the source for a while. After that it is for people
                // to say whether it may run.
                Ok(info) if info.state == VmState::Paused && !is_followed(&client) => {
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

    /// What has come of its disks is the VM's, or is kept for the next time.
    fn end(&mut self, state: State) -> Result<()> {
        match self.folder.take() {
            Some(folder) if state != State::Gone => folder.settle(),
            _ => Ok(()),
        }
    }
}
