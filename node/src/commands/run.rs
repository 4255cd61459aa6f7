//! `blanket run`.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_drivers::probe::Virtualization;
use blanket_vmm::api::types::{Action, VmState};
use blanket_vmm::config::{CharConfig, DiskConfig, MachineChoice, VmConfig};
use blanket_vmm::snapshot::Opening;

use super::{console, print, store};
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::machine;
use crate::name::VmName;
use crate::ports::{self, Origins};
use crate::up::{SERVICE, System, has_program};
use crate::vm::{Exit, last_line};

/// How long a monitor may take until its guest runs. Reserving much memory in
/// huge pages takes its time.
const START: Duration = Duration::from_secs(90);

#[derive(clap::Args)]
#[command(
    after_help = "Paths in --config are relative to the current directory, as those of the \
    options are.\nThe guest's console -- the serial port in an hvm machine, hvc0 in a pv machine -- \
    gets a socket (blanket console) and a log (blanket logs) unless --serial or --console says \
    otherwise; `stdio` means the same here."
)]
pub(crate) struct Args {
    /// Name of the VM, unique on this node.
    name: VmName,

    /// A VM's configuration in TOML; options override it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Attach this terminal to the guest's console once the VM runs.
    #[arg(long, short)]
    attach: bool,

    /// User that the monitor becomes when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,

    #[command(flatten)]
    vm: VmConfig,
}

pub(crate) fn run(home: &Home, args: Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let base = match &args.config {
        Some(file) => VmConfig::from_file(file)?,
        None => VmConfig::default(),
    };
    let mut config = base.overlaid(args.vm);
    let why = machine::choose(&mut config, Virtualization::of_this_machine());
    let mut config = settle(config, &home.vm(&args.name))?;
    ports::set_mtus(home, &mut config)?;
    for disk in &mut config.disk {
        store::choose_engine(home, disk);
    }
    if args.attach && machine::console(&config).socket().is_none() {
        return Err(failure(
            format!(
                "there is no {} socket to attach to",
                machine::console(&config).name
            ),
            "leave out --attach, or --serial and --console",
        ));
    }
    let start = Start {
        config: &config,
        user: args.user.as_deref(),
        home: home_flag,
        attach: args.attach,
        snapshot: None,
        eager: false,
        prepare: None,
        receive: None,
        shared_disks: false,
        origins: None,
    };
    let (vm, stream) = start.claim_and_start(home, &args.name)?;
    if let Some(why) = why {
        eprintln!("[{}: {why}]", args.name);
    }
    if args.attach {
        return console::attach_new(&vm, stream.as_ref());
    }
    print(&format!("{}\n", args.name))?;
    Ok(ExitCode::SUCCESS)
}

/// Makes paths absolute, gives the ports their sockets, and checks whatever
/// can be checked before anything is made.
pub(super) fn settle(mut config: VmConfig, vm: &VmDir) -> Result<VmConfig> {
    let own = |socket, log| CharConfig {
        stdio: false,
        socket: Some(socket),
        log: Some(log),
    };
    // A VM that is detached has no standard input: "stdio" means its own socket.
    if config.serial.as_ref().is_none_or(|serial| serial.stdio) {
        config.serial = Some(own(vm.serial_socket(), vm.serial_log()));
    }
    let wanted = match &config.console {
        Some(console) => console.stdio,
        // It is where such a guest speaks.
        None => config.machine == Some(MachineChoice::Pv),
    };
    if wanted {
        config.console = Some(own(vm.console_socket(), vm.console_log()));
    }
    ports::settle(&mut config, vm)?;
    let ports = [&mut config.serial, &mut config.console];
    let port_paths = ports.into_iter().flatten().flat_map(|port| {
        let CharConfig { socket, log, .. } = port;
        [socket, log].into_iter().flatten()
    });
    let disks = config.disk.iter_mut().flat_map(DiskConfig::paths_mut);
    let backends = config.net.iter_mut();
    let backends = backends.filter_map(|net| net.vhost_user.as_mut());
    let others = disks.chain(backends).chain(port_paths);
    let images = [&mut config.kernel, &mut config.initrd];
    for path in images.into_iter().flatten().chain(others) {
        *path = std::path::absolute(&*path)
            .with_context(|| format!("the path '{}'", path.display()))?;
    }
    config.validate()?;
    let images = config.kernel.iter().chain(&config.initrd);
    for path in images.chain(config.disk.iter().flat_map(DiskConfig::paths)) {
        check_readable(path)?;
    }
    Ok(config)
}

pub(super) fn check_readable(path: &Path) -> Result<()> {
    let remedy = match File::open(path).and_then(|file| file.metadata()) {
        Ok(meta) if meta.is_dir() => {
            return Err(failure(
                format!("{} is a directory", path.display()),
                "name a file in it",
            ));
        }
        Ok(_) => return Ok(()),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => (error, "check the path; it must exist on this node"),
            io::ErrorKind::PermissionDenied => (error, "make it readable for you, or run as root"),
            _ => (error, "check the file"),
        },
    };
    let (error, remedy) = remedy;
    Err(failure(
        format!("cannot open {}: {error}", path.display()),
        remedy,
    ))
}

/// The monitor's program: `BLANKET_VMM`, or beside this one, or in `PATH`.
fn find_monitor() -> Result<PathBuf> {
    const PROGRAM: &str = "blanket-vmm";
    let runs = |path: &Path| {
        fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if let Some(path) = env::var_os("BLANKET_VMM") {
        let path = std::path::absolute(path).context("BLANKET_VMM")?;
        return if runs(&path) {
            Ok(path)
        } else {
            Err(failure(
                format!("BLANKET_VMM is {}, which is no program", path.display()),
                "set it to the blanket-vmm program, or unset it",
            ))
        };
    }
    let beside = env::current_exe()
        .ok()
        .and_then(|path| Some(path.parent()?.join(PROGRAM)));
    let search = env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(env::split_paths(&search).map(|dir| dir.join(PROGRAM)))
        .find(|path| runs(path))
        .ok_or_else(|| {
            failure(
                format!("the program {PROGRAM} was not found"),
                "install it beside blanket or in PATH, or set BLANKET_VMM",
            )
        })
}

/// Makes what the monitor needs in a VM's directory.
pub(super) type Prepare<'a> = &'a dyn Fn(&VmDir) -> Result<()>;

/// How a VM is started.
pub(super) struct Start<'a> {
    /// Its configuration, settled.
    pub(super) config: &'a VmConfig,
    /// User that the monitor becomes.
    pub(super) user: Option<&'a str>,
    /// The directory that `--home` names.
    pub(super) home: Option<&'a Path>,
    /// Connect to the guest's console before it says its first word.
    pub(super) attach: bool,
    /// The snapshot whose guest goes on, and what it takes to open it.
    pub(super) snapshot: Option<(&'a Path, &'a Opening)>,
    /// Read all of its memory at once.
    pub(super) eager: bool,
    /// What is done once the name is taken.
    pub(super) prepare: Option<Prepare<'a>>,
    /// The migration socket of the monitor whose guest it gets. Its machine is
    /// ready then, and no more.
    pub(super) receive: Option<&'a Path>,
    /// Its disks are that one's, too, until the guest comes.
    pub(super) shared_disks: bool,
    /// Where the ports of the guest's interfaces on networks are until then.
    pub(super) origins: Option<Origins<'a>>,
}

impl Start<'_> {
    /// Takes the name and starts the VM; on failure, everything is unmade.
    pub(super) fn claim_and_start(
        &self,
        home: &Home,
        name: &VmName,
    ) -> Result<(VmDir, Option<UnixStream>)> {
        let monitor = find_monitor()?;
        let (vm, _lock) = home.claim(name)?;
        let launch = Launch {
            vm: &vm,
            monitor: &monitor,
            how: self,
        };
        let plug = || ports::plug(home, &vm, self.config, self.user, self.origins.as_ref());
        let prepared = self.prepare.map_or(Ok(()), |prepare| prepare(&vm));
        match prepared.and_then(|()| plug()).and_then(|()| launch.start()) {
            Ok(stream) => Ok((vm, stream)),
            Err(error) => {
                ports::unplug(home, &vm, self.config);
                vm.remove()?;
                Err(error)
            }
        }
    }
}

/// The start of one VM whose name is claimed.
struct Launch<'a> {
    vm: &'a VmDir,
    monitor: &'a Path,
    how: &'a Start<'a>,
}

impl Launch<'_> {
    /// Starts the VM and waits until its guest runs (or has already ended
    /// well). Returns the connection to its console, if that was asked for.
    fn start(&self) -> Result<Option<UnixStream>> {
        let vm = self.vm;
        let text = toml::to_string(self.how.config).context("cannot write the configuration")?;
        vm.write(&vm.config(), text.as_bytes())?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(vm.monitor_log())
            .with_context(|| format!("cannot write {}", vm.monitor_log().display()))?;
        let mut supervisor = self
            .command()?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start the supervisor")?;
        let result = self.wait_until_running(&mut supervisor);
        if result.is_err() {
            end(vm, &mut supervisor)?;
        }
        result
    }

    /// The supervisor's command line, with the monitor's at its end.
    fn command(&self) -> Result<Command> {
        let vm = self.vm;
        let program = env::current_exe().context("cannot find this program")?;
        let mut command = own_scope(&vm.name, &program);
        command.arg("supervise").arg(vm.name.as_str());
        command.arg("--monitor").arg(self.monitor);
        if let Some(home) = self.how.home {
            command.arg("--home").arg(std::path::absolute(home)?);
        }
        command.args(["--", "--id", vm.name.as_str()]);
        command.arg("--api-socket").arg(vm.api_socket());
        command.arg("--migration-socket").arg(vm.migration_socket());
        command.arg("--config").arg(vm.config());
        if let Some(user) = self.how.user {
            command.args(["--user", user]);
        }
        if self.how.attach {
            command.arg("--no-boot");
        }
        if let Some((snapshot, opening)) = self.how.snapshot {
            command.arg("--restore").arg(std::path::absolute(snapshot)?);
            command.args(opening.to_flags()?);
            if self.how.eager {
                command.arg("--eager");
            }
        }
        if let Some(source) = self.how.receive {
            command.arg("--receive").arg(source);
            if self.how.shared_disks {
                command.arg("--shared-disks");
            }
        }
        Ok(command)
    }

    fn wait_until_running(&self, supervisor: &mut Child) -> Result<Option<UnixStream>> {
        let vm = self.vm;
        let client = vm.client()?.with_timeout(START);
        let deadline = Instant::now() + START;
        while Instant::now() < deadline {
            match client.info() {
                Ok(info) if self.how.attach && info.state == VmState::Created => {
                    let stream = self.connect_console()?;
                    client.act(Action::Boot)?;
                    return Ok(stream);
                }
                Ok(info) if info.state != VmState::Created => return Ok(None),
                Ok(_) if self.how.receive.is_some() => return Ok(None),
                _ => (),
            }
            if supervisor.try_wait()?.is_some() {
                return match vm.read::<Exit>(&vm.exit())? {
                    Some(exit) if exit.clean => Ok(None),
                    exit => Err(cannot_start(vm, exit)),
                };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(failure(
            format!(
                "'{}' did not start within {} s; its monitor was ended",
                vm.name,
                START.as_secs()
            ),
            "run blanket-vmm with the same options to see where it stays",
        ))
    }

    fn connect_console(&self) -> Result<Option<UnixStream>> {
        let socket = machine::console(self.how.config).socket();
        let connect = |socket: &Path| {
            UnixStream::connect(socket)
                .with_context(|| format!("cannot attach to {}", socket.display()))
        };
        socket.map(connect).transpose()
    }
}

/// `program`, in a scope of systemd's on machines that `blanket up` has
/// prepared: guests then outlive the session or service that started them, and
/// at the machine's end are left alone until they are saved.
fn own_scope(name: &VmName, program: &Path) -> Command {
    let system = System::this();
    let unit = Path::new("/etc/systemd/system").join(SERVICE);
    let root = rustix::process::geteuid().is_root();
    if !(root && system.has_systemd() && system.has(unit) && has_program("systemd-run")) {
        return Command::new(program);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--scope", "--quiet", "--collect", "--slice=machine.slice"]);
    command.arg(format!("--property=Before={SERVICE}"));
    command.arg(format!("--description=Blanket guest {name}"));
    command.arg("--").arg(program);
    command
}

fn cannot_start(vm: &VmDir, exit: Option<Exit>) -> anyhow::Error {
    let reason = exit
        .map(|exit| exit.reason)
        .or_else(|| last_line(&vm.monitor_log()))
        .unwrap_or_else(|| "the supervisor ended without a word".into());
    anyhow::anyhow!("cannot start '{}': {reason}", vm.name)
}

/// Ends whatever was started, so that nothing is left behind.
fn end(vm: &VmDir, supervisor: &mut Child) -> Result<()> {
    if let Some((_, monitor)) = vm.process()? {
        // The supervisor ends with it.
        monitor.kill()?;
    } else {
        supervisor.kill()?;
    }
    supervisor.wait()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use blanket_vmm::config::ByteSize;

    fn vm(dir: &Path) -> VmDir {
        let home = Home::locate(Some(dir)).unwrap();
        home.vm(&"web".parse().unwrap())
    }

    #[test]
    fn ports_without_a_place_get_the_vms_own_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm(dir.path());
        let kernel = dir.path().join("vmlinuz");
        fs::write(&kernel, "x").unwrap();
        let stdio = CharConfig {
            stdio: true,
            ..CharConfig::default()
        };
        let config = VmConfig {
            kernel: Some(kernel),
            console: Some(stdio.clone()),
            serial: Some(stdio),
            ..VmConfig::default()
        };
        let settled = settle(config.clone(), &vm).unwrap();
        assert_eq!(settled.serial.unwrap().socket, Some(vm.serial_socket()));
        assert_eq!(settled.console.unwrap().log, Some(vm.console_log()));
        let off = VmConfig {
            serial: Some(CharConfig::default()),
            console: None,
            ..config
        };
        let settled = settle(off.clone(), &vm).unwrap();
        assert_eq!((&settled.serial, settled.console), (&off.serial, None));
        let pv = VmConfig {
            machine: Some(MachineChoice::Pv),
            ..off
        };
        let settled = settle(pv, &vm).unwrap();
        assert_eq!(settled.console.unwrap().socket, Some(vm.console_socket()));
    }

    #[test]
    fn the_stored_configuration_is_read_back_as_it_was() {
        let config = VmConfig {
            kernel: Some("/k".into()),
            memory: Some(ByteSize(1 << 30)),
            disk: vec![DiskConfig {
                path: "/d".into(),
                readonly: true,
                format: None,
                serial: Some("s".into()),
                direct: false,
                backing: false,
                engine: blanket_drivers::store::Engine::Auto,
                queues: None,
                persistent: Some(false),
                stripe: Vec::new(),
            }],
            net: vec![Default::default()],
            serial: Some(CharConfig::default()),
            rng: Some(false),
            io_threads: Some(2),
            ..VmConfig::default()
        };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config);
    }

    #[test]
    fn missing_files_and_directories_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let error = check_readable(&gone).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
        assert!(check_readable(dir.path()).is_err());
    }
}
