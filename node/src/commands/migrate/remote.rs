//! To another node of the cluster: this end.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_drivers::store::default_serial;
use blanket_vmm::api::types::{VmInfo, VmState};
use blanket_vmm::client::Client;
use blanket_vmm::config::{DiskConfig, VmConfig};
use blanket_vmm::migrate::Request;
use sha2::{Digest, Sha256};

use super::{Args, Outcome, Receiver, Report, Shown, forecast, relocate, shared};
use crate::cluster::names::NodeName;
use crate::cluster::parcel::{
    Answer, Base, Blank, Go, Item, Parcel, State, Verdict, What, Wish, hear, say,
};
use crate::daemon::Carriage;
use crate::daemon::local::{self, Hold, Migrate};
use crate::failure::{answered, failure};
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::ports::{self, Leaving};

/// How long the other node may take to come.
const COME: Duration = Duration::from_secs(30);
/// How long it may take for a step: making disks, starting a monitor, asking for
/// a guest's fate.
const STEP: Duration = Duration::from_secs(120);
/// How long it may take to copy the bases of disks.
const COPY: Duration = Duration::from_secs(3600);
/// Bytes of a file that are sent at once.
const PIECE: usize = 256 << 10;

pub(super) fn migrate(
    home: &Home,
    source: &VmDir,
    node: NodeName,
    args: Args,
    shown: &mut Shown,
) -> Result<Outcome> {
    if args.discard {
        return discard(home, source, &node, &args);
    }
    let client = source.live_client()?;
    let info = movable(source, &client)?;
    let new = args.new.clone().unwrap_or_else(|| source.name.clone());
    let config = info.config.clone().overlaid(args.vm.clone());
    // Disks that both nodes have stay where they are.
    let unshared = match args.shared_disks {
        true => without_disks(&config),
        false => config.clone(),
    };
    let (mut parcel, files) = pack(source, &new, &info, &unshared)?;
    parcel.bases = bases(&parcel.disks, &args.base)?;
    parcel.ports = ports::offers(home, source, &info.config, &config)?;
    let mut markers = Vec::new();
    if args.shared_disks {
        (parcel.shared, markers) = shared::mark(&config)?;
    }
    let carriage = match args.plain {
        true => Carriage::Plain,
        false => Carriage::Tls,
    };
    let (_way, mut stream) = call(home, source, &node, carriage)?;
    if !parcel.bases.is_empty() {
        // They are copied there.
        stream.set_read_timeout(Some(COPY))?;
    }
    say(&mut stream, &parcel)?;
    let switch = joined(&mut stream)?;
    stream.set_read_timeout(Some(STEP))?;
    drop(markers);
    let request = Request {
        options: args.options(),
        hand_over: false,
        dry_run: args.dry_run,
        shared_disks: args.shared_disks,
        ..Request::default()
    };
    if args.dry_run {
        // The other node could take it. It forgets it when the stream ends.
        let used = parcel.disks.iter().map(|disk| disk.used).sum();
        return forecast(source, &request, Some(node), used);
    }
    send_files(&mut stream, &files)?;
    let key = switch.unwrap_or_default();
    let leaving = Leaving::begin(home, source, &parcel.ports, &key)?;
    let settled = client.migrate(&request)?.overlaid(args.vm);
    let mut receiver = There {
        stream,
        go: Go {
            config: with_serials(settled),
            user: args.user,
        },
        name: new.clone(),
        node: node.clone(),
        heard: None,
    };
    let status = relocate(source, &mut receiver, &mut |status| shown.show(status));
    let has_it = |info: VmInfo| matches!(info.state, VmState::Running | VmState::Paused);
    // If the guest stays, it stays in its networks; if it is handed over, or
    // that is not known, it does not.
    if !(status.is_err() && client.info().is_ok_and(has_it)) {
        leaving.has_left();
    }
    let status = status?;
    Ok(Outcome::Moved(Box::new(Report {
        name: new,
        node: Some(node),
        left: dispose(home, &unshared, args.delete_disks),
        status,
    })))
}

/// Which images of the other node's are laid under which disks: the first one under
/// the first disk that moves along, and so on.
fn bases(disks: &[Blank], names: &[String]) -> Result<Vec<Base>> {
    if names.len() > disks.len() {
        return Err(failure(
            format!(
                "there are {} bases, and {} disks that move along",
                names.len(),
                disks.len()
            ),
            "name one for each disk that is written to, in their order",
        ));
    }
    let named = disks.iter().zip(names);
    let base = |(disk, name): (&Blank, &String)| Base {
        index: disk.index,
        name: name.clone(),
    };
    Ok(named.map(base).collect())
}

/// Has another node come for a VM. It can as long as what is returned is held.
pub(crate) fn call(
    home: &Home,
    source: &VmDir,
    node: &NodeName,
    carriage: Carriage,
) -> Result<(Hold, UnixStream)> {
    let socket = Socket::bind(source)?;
    let wanted = Migrate {
        node: node.clone(),
        control: socket.path.clone(),
        memory: source.migration_socket(),
        carriage,
    };
    let way = local::hold(home, "/cluster/migrations", &wanted)?;
    let stream = socket.accept(node)?;
    Ok((way, stream))
}

/// Has another node remove what it has kept of a VM's disks.
fn discard(home: &Home, source: &VmDir, node: &NodeName, args: &Args) -> Result<Outcome> {
    let (_way, mut stream) = call(home, source, node, Carriage::Tls)?;
    let name = args.new.as_ref().unwrap_or(&source.name);
    let parcel = Parcel {
        name: name.to_string(),
        id: source.identity()?,
        wish: Wish::Discard,
        files: Vec::new(),
        disks: Vec::new(),
        bases: Vec::new(),
        shared: Vec::new(),
        ports: Vec::new(),
    };
    step(&mut stream, &parcel)?;
    Ok(Outcome::Discarded)
}

/// What the other node needs of a VM before it can come, and the files of it.
pub(crate) fn pack(
    source: &VmDir,
    new: &VmName,
    info: &VmInfo,
    config: &VmConfig,
) -> Result<(Parcel, Vec<(PathBuf, Item)>)> {
    let mut files = Vec::new();
    let mut add = |what, path: &Path| -> Result<()> {
        let meta = fs::metadata(path);
        let len = meta
            .with_context(|| format!("cannot open {}", path.display()))?
            .len();
        files.push((path.to_owned(), Item { what, len }));
        Ok(())
    };
    if let Some(kernel) = &config.kernel {
        add(What::Kernel, kernel)?;
    }
    if let Some(initrd) = &config.initrd {
        add(What::Initrd, initrd)?;
    }
    let mut disks = Vec::new();
    let capacities = info.devices.iter().filter_map(|device| device.capacity);
    for ((index, disk), capacity) in config.disk.iter().enumerate().zip(capacities) {
        if !disk.readonly {
            disks.push(Blank {
                index,
                capacity,
                used: used(disk).min(capacity),
            });
        } else if is_plain(disk) {
            add(What::Disk(index), &disk.path)?;
        } else {
            return Err(failure(
                format!("the read-only disk {} is no raw image", disk.path.display()),
                "convert it with `qemu-img convert -O raw`: only such ones can go to another node",
            ));
        }
    }
    let parcel = Parcel {
        name: new.to_string(),
        id: source.identity()?,
        wish: Wish::Come,
        files: files.iter().map(|(_, item)| *item).collect(),
        disks,
        bases: Vec::new(),
        shared: Vec::new(),
        ports: Vec::new(),
    };
    Ok((parcel, files))
}

/// What there is of a VM that runs or is paused, and is to be moved.
fn movable(source: &VmDir, client: &Client) -> Result<VmInfo> {
    let info = client.info()?;
    if info.state == VmState::Paused {
        return Ok(info);
    }
    running(source, client, "migrated")
}

/// What there is of a VM that runs, and is to be `moved`.
pub(crate) fn running(source: &VmDir, client: &Client, moved: &str) -> Result<VmInfo> {
    let info = client.info()?;
    if info.state == VmState::Running {
        return Ok(info);
    }
    Err(failure(
        format!("'{}' is {}: it cannot be {moved}", source.name, info.state),
        "only VMs that run can; blanket resume it first",
    ))
}

/// The same without disks.
fn without_disks(config: &VmConfig) -> VmConfig {
    VmConfig {
        disk: Vec::new(),
        ..config.clone()
    }
}

/// Whether its file's bytes are the disk's.
fn is_plain(disk: &DiskConfig) -> bool {
    let magic = || {
        let mut magic = [0; 4];
        let mut file = File::open(&disk.path)?;
        file.read_exact(&mut magic)?;
        Ok::<_, std::io::Error>(magic)
    };
    let file = fs::metadata(&disk.path).is_ok_and(|meta| meta.is_file());
    disk.stripe.is_empty() && file && magic().is_ok_and(|magic| magic != *b"QFI\xfb")
}

/// Bytes that a disk takes here; as far as that is known.
fn used(disk: &DiskConfig) -> u64 {
    let of = |path: &PathBuf| match fs::metadata(path) {
        // In units of 512 bytes, whatever the file system's blocks are.
        Ok(meta) if meta.is_file() => meta.blocks() * 512,
        _ => u64::MAX,
    };
    disk.paths().map(of).fold(0, u64::saturating_add)
}

/// The same with the serials that disks have by their files' names: those are
/// others there.
pub(crate) fn with_serials(mut config: VmConfig) -> VmConfig {
    for disk in &mut config.disk {
        let serial = default_serial(&disk.path);
        disk.serial = disk
            .serial
            .take()
            .or(Some(serial))
            .filter(|serial| !serial.is_empty());
    }
    config
}

/// Removes the disks that came from another node, and all other files if that
/// is wanted; those that are left.
fn dispose(home: &Home, config: &VmConfig, all: bool) -> Vec<PathBuf> {
    let own = home.disks();
    let mut left = Vec::new();
    for path in config.disk.iter().flat_map(DiskConfig::paths) {
        let is_own = path.starts_with(&own);
        let is_file = fs::metadata(path).is_ok_and(|meta| meta.is_file());
        // Of a clone, and gone with its directory.
        if !path.exists() {
            continue;
        }
        let removed = is_file && (is_own || all) && fs::remove_file(path).is_ok();
        if !removed {
            left.push(path.clone());
        }
        if is_own && let Some(folder) = path.parent() {
            // Once it is empty.
            let _ = fs::remove_dir(folder);
        }
    }
    left
}

/// Where the other node comes.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(source: &VmDir) -> Result<Self> {
        let path = source.parcel_socket();
        let context = || format!("cannot listen on {}", path.display());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).with_context(context)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    fn accept(&self, node: &NodeName) -> Result<UnixStream> {
        let deadline = Instant::now() + COME;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(STEP))?;
                    stream.set_write_timeout(Some(STEP))?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot wait for the other node"),
            }
            if Instant::now() > deadline {
                return Err(failure(
                    format!("node {node} does not come for the VM"),
                    "see the log of blanketd there (journalctl -u blanketd); the program blanket has to be beside it",
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether something can be read, or the other end is gone, within a time.
pub(crate) fn is_readable(stream: &UnixStream, within: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec::try_from(within).ok();
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

/// Says something and waits until it is done there.
pub(crate) fn step(stream: &mut UnixStream, what: &impl serde::Serialize) -> Result<()> {
    say(stream, what)?;
    heard(stream)
}

fn heard(stream: &mut UnixStream) -> Result<()> {
    joined(stream).map(drop)
}

/// Waits until it is done there; the key of the switch there, if it told that.
fn joined(stream: &mut UnixStream) -> Result<Option<String>> {
    match hear(stream)? {
        Answer::Done => Ok(None),
        Answer::Joined(key) => Ok(Some(key)),
        Answer::Refused(problem) => Err(answered(problem)),
    }
}

/// Sends all files, one after the other.
pub(crate) fn send_files(stream: &mut UnixStream, files: &[(PathBuf, Item)]) -> Result<()> {
    for (path, item) in files {
        send_file(stream, path, item.len)
            .with_context(|| format!("cannot send {}", path.display()))?;
        heard(stream)?;
    }
    Ok(())
}

/// Sends `len` bytes of a file, and what they hash to.
fn send_file(stream: &mut UnixStream, path: &Path, len: u64) -> Result<()> {
    let mut file = File::open(path)?.take(len);
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut left = len;
    while left > 0 {
        let n = file.read(&mut piece)?;
        anyhow::ensure!(n > 0, "it has become shorter");
        hasher.update(&piece[..n]);
        stream.write_all(&piece[..n])?;
        left -= n as u64;
    }
    stream.write_all(&hasher.finalize())?;
    Ok(())
}

/// A monitor on another node.
struct There {
    stream: UnixStream,
    go: Go,
    name: VmName,
    node: NodeName,
    /// What it has said before it was asked.
    heard: Option<State>,
}

impl There {
    fn ends(&mut self, verdict: Verdict) -> Result<State> {
        if let Some(state) = self.heard {
            return Ok(state);
        }
        say(&mut self.stream, &verdict)?;
        Ok(hear(&mut self.stream)?)
    }
}

impl Receiver for There {
    fn start(&mut self) -> Result<()> {
        step(&mut self.stream, &self.go)
    }

    fn moved(&mut self) -> Result<()> {
        match self.ends(Verdict::Moved) {
            Ok(State::Runs) => Ok(()),
            Ok(_) => Err(failure(
                format!(
                    "'{}' arrived on node {}, but runs no more",
                    self.name, self.node
                ),
                "see blanket ps -a and blanket logs there",
            )),
            // Its monitor has said that it runs.
            Err(error) => {
                eprintln!("[{}: {error:#}; the VM runs there]", self.node);
                Ok(())
            }
        }
    }

    fn stayed(&mut self) -> Result<()> {
        // If the stream is cut, the other end removes it by itself.
        match self.ends(Verdict::Stayed) {
            Ok(State::Runs) => Err(failure(
                format!("node {} says that it runs '{}'", self.node, self.name),
                "stop it there (blanket stop --force)",
            )),
            _ => Ok(()),
        }
    }

    fn take_over(&mut self) -> Result<State> {
        self.ends(Verdict::Orphaned)
    }

    fn has_ended(&mut self) -> bool {
        if self.heard.is_none() && is_readable(&self.stream, Duration::ZERO) {
            self.heard = hear(&mut self.stream).ok();
        }
        matches!(self.heard, Some(State::Ended | State::Lost))
    }

    fn called(&self) -> String {
        format!("'{}' on node {}", self.name, self.node)
    }
}
