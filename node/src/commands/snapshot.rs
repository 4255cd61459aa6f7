//! `blanket snapshot`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::client::{self, Client};
use blanket_vmm::config::DiskConfig;
use blanket_vmm::snapshot::{
    Access, Base, Compression, DiskMark, How, Key, Recorder, Written, working_set_of,
};
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::life::suspend_one;
use super::{print, print_json};
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

    /// Compress the memory with zstd.
    #[arg(long)]
    compress: bool,

    /// Write only the pages that are not as in this snapshot, without which the new one cannot be
    /// restored.
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,

    /// Encrypt it with this key: a file of 32 bytes or 64 hex digits. The base has the same key, if
    /// any.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,

    /// Tell how it went as JSON.
    #[arg(long)]
    json: bool,
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
    /// What is written of it, and how.
    pub(crate) form: How,
    /// Set when the user does not want it any more.
    pub(crate) interrupted: Arc<AtomicBool>,
    /// To be done while the guest stands still after it was written.
    pub(crate) at_rest: Option<&'a dyn Fn() -> Result<()>>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Saved {
    /// Bytes that the file takes on its disk.
    pub(crate) bytes: u64,
    /// Bytes of memory in it that are not zeros.
    pub(crate) memory_bytes: u64,
    /// Milliseconds for which the guest stood still; none if it did before, or
    /// has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pause_ms: Option<f64>,
    /// Whether the guest ran while it was written.
    pub(crate) live: bool,
    /// Why not, if that was possible otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) not_live: Option<String>,
}

pub(crate) fn snapshot(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let compression = match args.compress {
        true => Compression::Zstd,
        false => Compression::None,
    };
    let access = Access {
        key: args.key.as_deref().map(Key::from_file).transpose()?,
        bases: Vec::new(),
    };
    let base = args.base.as_deref();
    let base = base.map(|base| Base::open(base, &args.file, &access));
    let form = How {
        compression,
        base: base.transpose().with_context(|| context(&args.file))?,
        key: access.key,
    };
    let how = Save {
        file: &args.file,
        stop: args.stop,
        suspend: args.suspend.then(|| Duration::from_secs(args.timeout)),
        deadline: None,
        form,
        interrupted: interrupts()?,
        at_rest: None,
    };
    let saved = save(&vm, &how)?;
    if args.json {
        print_json(&saved)?;
    } else {
        print(&describe(&args.file, &saved))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(file: &Path, saved: &Saved) -> String {
    let mut line = format!("{}: {} on disk", file.display(), BinaryBytes(saved.bytes));
    if let Some(pause) = saved.pause_ms {
        line.push_str(&format!(", the guest stood still for {pause:.1} ms"));
    }
    if let Some(why) = &saved.not_live {
        line.push_str(&format!(" ({why})"));
    }
    line.push('\n');
    line
}

/// Saves a VM. When that fails it runs on, if it ran.
pub(crate) fn save(vm: &VmDir, how: &Save) -> Result<Saved> {
    let client = vm.live_client()?;
    let before = client.info()?;
    let ran = before.state == VmState::Running;
    let disks = before.config.disk.iter().flat_map(DiskConfig::paths);
    let disks: Vec<_> = disks.cloned().collect();
    let mut not_live = None;
    if ran && !how.stop && how.suspend.is_none() && how.at_rest.is_none() {
        match write(vm, &client, how, &disks, true) {
            Err(error) => match refusal(&error) {
                Some(why) => not_live = Some(why),
                None => return Err(error),
            },
            done => return done,
        }
    }
    let start = Instant::now();
    if let (true, Some(timeout)) = (ran, how.suspend) {
        suspend_one(vm, timeout)?;
    } else if ran {
        client.act(Action::Pause)?;
    }
    let written = write(vm, &client, how, &disks, false).and_then(|saved| {
        how.at_rest.map_or(Ok(()), |at_rest| at_rest())?;
        Ok(saved)
    });
    let mut saved = match written {
        Ok(saved) => saved,
        Err(error) => {
            if ran {
                // What went wrong first is what counts.
                let _ = client.act(Action::Resume);
            }
            return Err(error);
        }
    };
    if ran && !how.stop {
        client.act(Action::Resume)?;
        saved.pause_ms = Some(start.elapsed().as_secs_f64() * 1e3);
        saved.not_live = not_live;
    }
    Ok(saved)
}

/// Why the monitor does not save a VM that runs, if that is the error.
fn refusal(error: &anyhow::Error) -> Option<String> {
    const CONFLICT: u16 = 409;
    match error.downcast_ref() {
        Some(client::Error::Refused { status, problem }) if *status == CONFLICT => {
            Some(problem.error.clone())
        }
        _ => None,
    }
}

/// What signals that end a process set from now on: it has to see to its end
/// itself.
pub(super) fn interrupts() -> io::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

/// Takes nothing once it is too late, or the user does not want it any more.
struct InTime {
    out: Recorder,
    deadline: Option<Instant>,
    interrupted: Arc<AtomicBool>,
    progress: ProgressBar,
}

impl InTime {
    fn new(file: File, how: &Save, memory: u64) -> Result<Self> {
        let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
        let progress = ProgressBar::new(memory).with_style(ProgressStyle::with_template(style)?);
        Ok(Self {
            out: Recorder::new(file, how.form.clone()),
            deadline: how.deadline,
            interrupted: Arc::clone(&how.interrupted),
            progress,
        })
    }
}

impl Write for InTime {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(io::Error::other("interrupted"));
        }
        if self.deadline.is_some_and(|end| Instant::now() >= end) {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the time was over before it was written",
            ));
        }
        let taken = self.out.write(bytes)?;
        self.progress.set_position(self.out.memory());
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes the file, whole or not at all, and ends the VM if that is wanted.
fn write(vm: &VmDir, client: &Client, how: &Save, disks: &[PathBuf], live: bool) -> Result<Saved> {
    let mut new = how.file.to_owned().into_os_string();
    new.push(".partial");
    let result = (|| {
        // Whoever reads it reads the guest's secrets.
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        let memory = client.metrics()?.memory.guest_resident;
        let mut out = InTime::new(file, how, memory)?;
        // While the guest runs they change: those from before show that later.
        let marks = live.then(|| marks(disks)).transpose()?;
        let sent = client.snapshot(&mut out);
        out.progress.finish_and_clear();
        sent?;
        if how.stop {
            end(vm, client)?;
        }
        // Otherwise nobody writes to the disks now.
        let marks = marks.map_or_else(|| self::marks(disks), Ok)?;
        let pause = out.out.report().map(|report| report.pause_us as f64 / 1e3);
        let Written { on_disk, memory } = out.out.finish(&marks)?;
        fs::rename(&new, how.file)?;
        // It was of the file that was there.
        let _ = fs::remove_file(working_set_of(how.file));
        anyhow::Ok(Saved {
            bytes: on_disk,
            memory_bytes: memory,
            pause_ms: pause.filter(|_| live),
            live,
            not_live: None,
        })
    })();
    if result.is_err() {
        // It need not be there.
        let _ = fs::remove_file(&new);
    }
    result.with_context(|| context(how.file))
}

fn context(file: &Path) -> String {
    format!("the snapshot {}", file.display())
}

/// What the disks look like.
fn marks(disks: &[PathBuf]) -> io::Result<Vec<DiskMark>> {
    disks.iter().cloned().map(DiskMark::of).collect()
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
