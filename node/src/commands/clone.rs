//! `blanket clone`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use blanket_drivers::store::{Engine, Format, create_overlay};
use blanket_vmm::api::types::Machine;
use blanket_vmm::config::{CharConfig, DiskConfig, MachineChoice, NetConfig, VmConfig};
use blanket_vmm::snapshot::{Head, How, Opening, Snapshot};
use rustix::fs::ioctl_ficlone;

use super::print;
use super::restore::check_disks;
use super::run::{Start, check_readable, settle};
use super::snapshot::{Save, interrupts, save};
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// How long a guest may take to suspend itself.
const SUSPEND: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
#[command(
    after_help = "Memory is read from the snapshot when a clone needs it; each clone writes to disks \
    of its own (qcow2 images over the source's), which `blanket rm` removes with it. Its interfaces \
    get new addresses and taps."
)]
pub(crate) struct Args {
    /// A VM that runs, or a snapshot's file.
    source: String,

    /// How many.
    #[arg(default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,

    /// Names of the clones, with `{}` for the number [default: the source's name with -{}].
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,

    #[command(flatten)]
    opening: Opening,

    /// User that the monitors become when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,
}

pub(crate) fn clone(home: &Home, args: &Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let interrupted = interrupts()?;
    let vm = args.source.parse::<VmName>().ok();
    let vm = vm.and_then(|name| home.existing(&name).ok());
    match vm {
        Some(vm) => {
            if args.opening != Opening::default() {
                return Err(failure(
                    "--key and --base are for snapshots: this is a VM that runs",
                    "leave them out",
                ));
            }
            let stage = Stage::make(home)?;
            let source = Source::of_vm(&vm, &stage, &interrupted)?;
            source.start(home, args, home_flag, &interrupted)?;
        }
        None => {
            let source = Source::of_file(Path::new(&args.source), &args.opening)?;
            source.start(home, args, home_flag, &interrupted)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A directory for what is needed until the clones run.
struct Stage(PathBuf);

impl Stage {
    fn make(home: &Home) -> Result<Self> {
        let path = home.cloning().join(std::process::id().to_string());
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What a clone uses it has open, or has a link to.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What is cloned.
struct Source {
    file: PathBuf,
    head: Head,
    /// What each disk's overlay is based on, where it needs one.
    bases: Vec<Option<Base>>,
}

/// What an overlay is based on.
struct Base {
    path: PathBuf,
    /// It is a copy for the clones: each has a link to it.
    copied: bool,
}

impl Source {
    /// A snapshot, whose disks are still as they were.
    fn of_file(file: &Path, opening: &Opening) -> Result<Self> {
        check_readable(file)?;
        let context = || format!("the snapshot {}", file.display());
        let snapshot = Snapshot::open_with(file, &opening.access()?).with_context(context)?;
        let head = snapshot.head().clone();
        check_identity(&head.config, head.suspended)?;
        let marks = snapshot.disks().with_context(context)?;
        check_disks(&head.config, &marks)?;
        let base = |disk: &DiskConfig| Base {
            path: disk.path.clone(),
            copied: false,
        };
        Ok(Self {
            file: file.to_owned(),
            bases: each_disk(&head.config, |_, disk| Ok(base(disk)))?,
            head,
        })
    }

    /// A VM that runs on afterwards.
    fn of_vm(vm: &VmDir, stage: &Stage, interrupted: &Arc<AtomicBool>) -> Result<Self> {
        let info = vm.live_client()?.info()?;
        let suspends = info.machine == Machine::Pv && !info.config.net.is_empty();
        let mut config = info.config;
        config.machine = Some(match info.machine {
            Machine::Pv => MachineChoice::Pv,
            Machine::Hvm => MachineChoice::Hvm,
        });
        check_identity(&config, suspends)?;
        let copy_of = |index: usize| stage.0.join(format!("disk{index}"));
        let copies = each_disk(&config, |index, disk| {
            check_can_be_copied(disk)?;
            Ok(Base {
                path: copy_of(index),
                copied: true,
            })
        })?;
        let copy = || {
            each_disk(&config, |index, disk| {
                copy_image(&disk.path, &copy_of(index))
                    .with_context(|| format!("cannot copy the disk {}", disk.path.display()))
            })
            .map(drop)
        };
        let any = copies.iter().any(Option::is_some);
        let file = stage.0.join("snapshot");
        save(
            vm,
            &Save {
                file: &file,
                stop: false,
                suspend: suspends.then_some(SUSPEND),
                deadline: None,
                form: How::default(),
                interrupted: Arc::clone(interrupted),
                at_rest: any.then_some(&copy),
            },
        )?;
        let head = Snapshot::open(&file)?.head().clone();
        Ok(Self {
            file,
            head,
            bases: copies,
        })
    }

    fn start(
        &self,
        home: &Home,
        args: &Args,
        home_flag: Option<&Path>,
        interrupted: &AtomicBool,
    ) -> Result<()> {
        let pattern = args.name.clone();
        let pattern = pattern.unwrap_or_else(|| format!("{}-{{}}", self.head.name));
        if args.count > 1 && !pattern.contains("{}") {
            return Err(failure(
                format!("{} clones cannot all be called '{pattern}'", args.count),
                "put {} where the number belongs",
            ));
        }
        for number in 1..=args.count {
            anyhow::ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
            let name = pattern.replace("{}", &number.to_string());
            let name: VmName = name.parse().map_err(anyhow::Error::msg)?;
            self.start_one(home, args, home_flag, &name)?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }

    fn start_one(
        &self,
        home: &Home,
        args: &Args,
        home_flag: Option<&Path>,
        name: &VmName,
    ) -> Result<()> {
        let vm = home.vm(name);
        let mut config = settle(identity(&self.head), &vm)?;
        for (index, disk) in config.disk.iter_mut().enumerate() {
            if self.bases[index].is_some() {
                let (path, _) = vm.overlay(index);
                *disk = DiskConfig {
                    path,
                    format: Some(Format::Qcow2),
                    backing: true,
                    direct: false,
                    engine: Engine::Auto,
                    ..disk.clone()
                };
            }
        }
        let start = Start {
            config: &config,
            user: args.user.as_deref(),
            home: home_flag,
            attach: false,
            snapshot: Some((&self.file, &args.opening)),
            eager: false,
            prepare: Some(&|vm| self.make_disks(vm)),
            receive: None,
            shared_disks: false,
            origins: None,
        };
        start.claim_and_start(home, name).map(drop)
    }

    /// Makes a clone's disks.
    fn make_disks(&self, vm: &VmDir) -> Result<()> {
        for (index, base) in self.bases.iter().enumerate() {
            let Some(base) = base else { continue };
            let (overlay, link) = vm.overlay(index);
            let base = if base.copied {
                fs::hard_link(&base.path, &link)
                    .with_context(|| format!("cannot link {}", link.display()))?;
                &link
            } else {
                &base.path
            };
            create_overlay(&overlay, base)
                .with_context(|| format!("a disk over {}", base.display()))?;
        }
        Ok(())
    }
}

/// Does `one` to each disk that a clone writes to.
fn each_disk<T>(
    config: &VmConfig,
    one: impl Fn(usize, &DiskConfig) -> Result<T>,
) -> Result<Vec<Option<T>>> {
    let disks = config.disk.iter().enumerate();
    disks
        .map(|(index, disk)| (!disk.readonly).then(|| one(index, disk)).transpose())
        .collect()
}

/// Whether the clones can be told from each other in a network.
fn check_identity(config: &VmConfig, suspended: bool) -> Result<()> {
    if let Some(net) = config.net.iter().find_map(of_others) {
        return Err(failure(
            format!("the clones cannot share the backend at {}", net.display()),
            "clone a VM whose interfaces have taps",
        ));
    }
    match config.machine {
        _ if config.net.is_empty() => Ok(()),
        Some(MachineChoice::Pv) if suspended => Ok(()),
        Some(MachineChoice::Pv) => Err(failure(
            "the guest would not look at its interfaces' new addresses",
            "make the snapshot with --suspend",
        )),
        _ => Err(failure(
            "the guest of an hvm machine does not look at its interfaces' new addresses",
            "clone one without interfaces, or one in a pv machine",
        )),
    }
}

/// The backend of an interface that has one of its own.
fn of_others(net: &NetConfig) -> Option<&PathBuf> {
    // A port of the node's switch can be made for each.
    net.vhost_user.as_ref().filter(|_| net.network.is_none())
}

/// A clone's configuration: like the source's, but for what is its own.
fn identity(head: &Head) -> VmConfig {
    let mut config = head.config.clone();
    for port in [&mut config.serial, &mut config.console] {
        // One that leads somewhere leads to a place of the clone's own.
        if let Some(port) = port.as_mut().filter(|port| **port != CharConfig::default()) {
            *port = CharConfig {
                stdio: true,
                ..CharConfig::default()
            };
        }
    }
    for net in &mut config.net {
        net.mac = None;
        net.tap = None;
        // One interface of the node's has it already.
        net.host_ip = None;
        net.ip = None;
    }
    config
}

fn check_can_be_copied(disk: &DiskConfig) -> Result<()> {
    const REMEDY: &str = "save the VM with --stop, and clone the snapshot";
    let why = |what: &str| {
        let what = format!("the disk {} {what}", disk.path.display());
        Err(failure(what, REMEDY))
    };
    if !disk.stripe.is_empty() || !fs::metadata(&disk.path)?.is_file() {
        return why("is no file that could be copied");
    }
    let mut magic = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&File::open(&disk.path)?, &mut magic, 0)?;
    match magic == *b"QFI\xfb" {
        true => why("is a qcow2 image, which changes while its VM runs"),
        false => Ok(()),
    }
}

/// Copies an image: shares its blocks where the file system can, else its data
/// without the holes.
fn copy_image(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let source = File::open(from)?;
    let mut options = File::options();
    // Whoever reads it reads the guest's data.
    let target = options.write(true).create_new(true).mode(0o600).open(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let Ok(start) = seek(&source, SeekFrom::Data(at)) else {
            // Nothing but a hole is left.
            break;
        };
        let end = seek(&source, SeekFrom::Hole(start))?.min(len);
        seek(&source, SeekFrom::Start(start))?;
        seek(&target, SeekFrom::Start(start))?;
        if io::copy(&mut (&source).take(end - start), &mut &target)? < end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_like_the_image_and_has_its_holes() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(b"middle", 16 << 20).unwrap();
        copy_image(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        fs::write(&from, "").unwrap();
        fs::remove_file(&to).unwrap();
        copy_image(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().len(), 0);
    }

    #[test]
    fn a_clone_has_no_address_or_tap_of_the_sources() {
        let config = VmConfig {
            machine: Some(MachineChoice::Pv),
            net: vec![
                toml::from_str(
                    "tap = \"t\"\nbridge = \"b\"\nhost_ip = \"10.0.0.1/8\"\nmac = \"02:00:00:00:00:01\"",
                )
                .unwrap(),
            ],
            ..VmConfig::default()
        };
        check_identity(&config, true).unwrap();
        assert!(check_identity(&config, false).is_err());
        let net = identity(&Head::new("web".into(), config)).net.remove(0);
        assert_eq!((net.tap, net.mac, net.host_ip), (None, None, None));
        assert_eq!(net.bridge.as_deref(), Some("b"));
    }
}
