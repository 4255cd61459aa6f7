//! The program `blanket-vmm` on this machine's own `/dev/kvm`, with small
//! guests that need no hardware virtualization.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blanket_vmm::api::types::{Action, SNAPSHOT_PATH, VmState};
use blanket_vmm::client::Client;
use blanket_vmm::config::VmConfig;

const LIMIT: Duration = Duration::from_secs(60);

/// The guest payload `name`, or `None` after saying why there is none.
fn payload(name: &str) -> Option<PathBuf> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped, because /dev/kvm cannot be used: {error}");
        return None;
    }
    let Some(folder) = std::env::var_os("BLANKET_FIRMWARE_DIR") else {
        println!("skipped, because the payloads are not built: run `cargo xtask test`");
        return None;
    };
    Some(Path::new(&folder).join(name))
}

fn monitor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blanket-vmm"));
    command.stdin(Stdio::null());
    command
}

/// A monitor that ends with its test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }

    fn wait(mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the monitor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client of the API at `socket`, once it is there.
fn client(socket: &Path) -> Client {
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "no API at {}", socket.display());
        std::thread::sleep(Duration::from_millis(2));
    }
    Client::new(socket).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_guest_speaks_on_its_serial_port_and_powers_itself_off() {
    let Some(kernel) = payload("hello") else {
        return;
    };
    let output = monitor()
        .args([
            "--memory",
            "32M",
            "--cmdline",
            "spoken",
            "--machine",
            "hvm",
            "--kernel",
        ])
        .arg(kernel)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(
        said.contains("hello from a guest, command line 'spoken'"),
        "{said}"
    );
}

#[test]
fn the_api_leads_a_vm_through_its_life() {
    let Some(kernel) = payload("hello") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let log = folder.path().join("serial");
    let running = Running::start(
        monitor()
            .args(["--id", "test", "--api-socket"])
            .arg(&socket),
    );
    let api = client(&socket);
    assert!(api.info().is_err(), "there is no VM yet");
    let broken = VmConfig {
        kernel: Some(folder.path().join("absent")),
        ..VmConfig::default()
    };
    let error = api.create(&broken).unwrap_err().to_string();
    assert!(error.contains("absent"), "{error}");
    let config: VmConfig = serde_json::from_value(serde_json::json!({
        "machine": "hvm", "kernel": kernel, "memory": "32M", "cpus": 3, "serial": { "log": log },
    }))
    .unwrap();
    let info = api.create(&config).unwrap();
    assert_eq!(
        (info.state, info.config),
        (VmState::Created, config.clone())
    );
    assert!(api.act(Action::Pause).is_err(), "it does not run");
    assert!(api.create(&config).is_err(), "one process, one VM");
    let phases: Vec<_> = info.boot.iter().map(|phase| phase.at_us).collect();
    assert!(phases.len() >= 3 && phases.is_sorted(), "{phases:?}");
    assert_eq!(api.metrics().unwrap().vcpus.len(), 3);
    api.act(Action::Boot).unwrap();
    assert!(running.wait().success());
    assert!(fs::read_to_string(log).unwrap().contains("hello"));
}

#[test]
fn a_guest_is_reset_paused_and_ended_from_outside() {
    let Some(kernel) = payload("idle") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let log = folder.path().join("serial");
    let running = Running::start(
        monitor()
            .args(["--memory", "32M", "--machine", "hvm", "--kernel"])
            .arg(kernel)
            .arg("--serial")
            .arg(format!("log={}", log.display()))
            .arg("--api-socket")
            .arg(&socket),
    );
    let api = client(&socket);
    let starts = || {
        fs::read_to_string(&log)
            .unwrap_or_default()
            .matches("idle")
            .count()
    };
    let started = |n| {
        let deadline = Instant::now() + LIMIT;
        while starts() < n {
            assert!(Instant::now() < deadline, "{} starts", starts());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    started(1);
    for _ in 0..20 {
        assert_eq!(api.act(Action::Pause).unwrap().state, VmState::Paused);
        assert_eq!(api.act(Action::Resume).unwrap().state, VmState::Running);
    }
    for n in 2..6 {
        api.act(Action::Reset).unwrap();
        started(n);
    }
    assert_eq!(api.act(Action::Poweroff).unwrap().state, VmState::Stopped);
    assert!(running.wait().success());
}

#[test]
fn a_vm_whose_snapshot_is_being_written_stays_at_rest_and_goes_on_in_another_process() {
    let Some(kernel) = payload("idle") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (socket, snapshot) = (path("api"), path("snapshot"));
    // More than a socket's buffer takes.
    fs::write(path("initrd"), vec![0x55; 8 << 20]).unwrap();
    let running = Running::start(
        monitor()
            .args(["--memory", "64M", "--serial", "off", "--cpus", "2"])
            .arg("--initrd")
            .arg(path("initrd"))
            .args(["--machine", "hvm", "--kernel"])
            .arg(kernel)
            .arg("--api-socket")
            .arg(&socket),
    );
    let api = client(&socket);
    // Where there is a userfaultfd it is saved while it runs.
    let mut live = Vec::new();
    match api.snapshot(&mut live) {
        Ok(()) => assert!(live.len() > 8 << 20, "{}", live.len()),
        Err(error) => assert!(error.to_string().contains("pause it first"), "{error}"),
    }
    api.act(Action::Pause).unwrap();
    // Somebody begins to read it and does not go on.
    let mut reader = UnixStream::connect(&socket).unwrap();
    let request = format!("GET {SNAPSHOT_PATH} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    reader.write_all(request.as_bytes()).unwrap();
    reader.read_exact(&mut [0; 64]).unwrap();
    for action in [Action::Resume, Action::Reset] {
        let error = api.act(action).unwrap_err().to_string();
        assert!(error.contains("is being written"), "{error}");
    }
    drop(reader);
    let mut bytes = Vec::new();
    api.snapshot(&mut bytes).unwrap();
    fs::write(&snapshot, &bytes).unwrap();
    let deadline = Instant::now() + LIMIT;
    while api.act(Action::Resume).is_err() {
        assert!(Instant::now() < deadline, "it is never free again");
    }
    api.act(Action::Poweroff).unwrap();
    assert!(running.wait().success());

    let socket = path("other");
    let restored = |snapshot: &Path| {
        let mut command = monitor();
        command.arg("--restore").arg(snapshot);
        command.arg("--api-socket").arg(&socket);
        command
    };
    let running = Running::start(&mut restored(&snapshot));
    let api = client(&socket);
    let info = api.info().unwrap();
    assert_eq!(info.state, VmState::Running);
    assert_eq!(info.config.cpus, Some(2));
    // From its kernel, which the snapshot names.
    api.act(Action::Reset).unwrap();
    api.act(Action::Poweroff).unwrap();
    assert!(running.wait().success());
    bytes.truncate(bytes.len() - 1);
    fs::write(&snapshot, &bytes).unwrap();
    let output = restored(&snapshot).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("cut off"), "{output:?}");
}

/// Every thread of a process with a field of its status.
fn threads(pid: u32, field: &str) -> Vec<(String, String)> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let value = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line[name.len()..].trim().to_owned()
            };
            (value("Name:"), value(&format!("{field}:")))
        })
        // The kernel's own helper counts as a thread of the process.
        .filter(|(name, _)| !name.starts_with("kvm-"))
        .collect()
}

#[test]
fn no_thread_keeps_root_a_capability_or_an_open_door() {
    let Some(kernel) = payload("idle") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let disk = folder.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let running = Running::start(
        monitor()
            .args(["--cpus", "2", "--io-threads", "2", "--serial", "off"])
            .arg("--disk")
            .arg(format!("path={},engine=sync,queues=2", disk.display()))
            .args(["--machine", "hvm", "--kernel"])
            .arg(kernel)
            .arg("--api-socket")
            .arg(&socket),
    );
    assert_eq!(client(&socket).info().unwrap().state, VmState::Running);
    let pid = running.0.id();
    // The one that populates memory ends by itself; one that moves it there is
    // where there is a userfaultfd.
    let mut all = threads(pid, "Seccomp");
    let count = |all: &[(String, String)]| all.iter().filter(|(name, _)| name != "pager").count();
    for _ in 0..100 {
        if count(&all) == 8 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        all = threads(pid, "Seccomp");
    }
    // The main one, two vCPUs, two for queues, two of the disk, the one that migrates.
    assert_eq!(count(&all), 8, "{all:?}");
    assert!(all.iter().all(|(_, mode)| mode == "2"), "{all:?}");
    for field in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        // Who is not root cannot shrink the bounding set, nor needs to.
        if field == "CapBnd"
            && !threads(pid, "Uid")
                .iter()
                .all(|(_, u)| u.starts_with("65534"))
        {
            continue;
        }
        let held = threads(pid, field);
        assert!(
            held.iter().all(|(_, set)| set.trim_matches('0').is_empty()),
            "{field} {held:?}"
        );
    }
    assert!(threads(pid, "NoNewPrivs").iter().all(|(_, set)| set == "1"));
    assert!(
        threads(pid, "Uid")
            .iter()
            .all(|(_, uid)| !uid.starts_with("0\t"))
    );
}

/// Runs the monitor with `arguments`; it must fail with one clear line.
fn refused(arguments: &[&str]) -> String {
    let output: Output = monitor().args(arguments).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
    let lines: Vec<_> = error
        .lines()
        .filter(|line| line.starts_with("blanket-vmm: "))
        .collect();
    assert_eq!(lines.len(), 1, "{arguments:?}: {error}");
    lines[0].to_owned()
}

#[test]
fn bad_input_gets_one_clear_line_and_leaves_nothing() {
    let Some(kernel) = payload("hello") else {
        return;
    };
    let kernel = kernel.to_str().unwrap().to_owned();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let whole = fs::read(&kernel).unwrap();
    fs::write(path("cut"), &whole[..whole.len() / 2]).unwrap();
    fs::write(path("empty"), b"").unwrap();
    fs::write(path("bad.toml"), "kernel = \"x\"\nmemroy = \"1G\"\n").unwrap();
    fs::write(path("disk"), [0; 4096]).unwrap();
    let socket = path("api");
    let bad_initrd = path("empty");
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["--kernel", "--api-socket"]),
        (&["--kernel", &path("absent")], &["absent", "No such file"]),
        (&["--kernel", &path("cut")], &["cut", "truncated"]),
        (&["--kernel", &path("empty")], &["empty", "bzImage"]),
        (
            &["--kernel", &kernel, "--initrd", &path("absent")],
            &["initrd", "absent"],
        ),
        (
            &["--kernel", &kernel, "--initrd", &bad_initrd],
            &["initrd", "empty"],
        ),
        (
            &["--kernel", &kernel, "--disk", &path("absent")],
            &["disk", "absent"],
        ),
        (
            &["--kernel", &kernel, "--disk", &path("empty")],
            &["disk", "empty"],
        ),
        (
            &["--kernel", &kernel, "--cpu", "host", "--memory", "8T"],
            &["--memory"],
        ),
        (
            &["--kernel", &kernel, "--hugepages", "1g", "--memory", "900G"],
            &["900"],
        ),
        (&["--kernel", &kernel, "--cpus", "65"], &["64"]),
        (&["--config", &path("bad.toml")], &["memroy"]),
        (&["--config", &path("absent")], &["absent"]),
        (
            &["--kernel", &kernel, "--net", "tap=name-that-is-too-long"],
            &["name"],
        ),
        (
            &["--kernel", &kernel, "--net", "bridge=nobridge0"],
            &["nobridge0"],
        ),
    ];
    for (arguments, said) in cases {
        let mut arguments = arguments.to_vec();
        if !arguments.is_empty() {
            arguments.extend(["--machine", "hvm", "--api-socket", &socket]);
        }
        let error = refused(&arguments);
        for word in *said {
            assert!(error.contains(word), "{arguments:?}: {error}");
        }
        assert!(
            !Path::new(&socket).exists(),
            "{arguments:?} leaves a socket"
        );
    }
}

#[test]
fn a_disk_has_one_writer() {
    let Some(kernel) = payload("idle") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let disk = folder.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let (kernel, disk) = (kernel.to_str().unwrap(), disk.to_str().unwrap());
    let arguments = [
        "--machine",
        "hvm",
        "--kernel",
        kernel,
        "--disk",
        disk,
        "--serial",
        "off",
    ];
    let _running = Running::start(monitor().args(arguments).arg("--api-socket").arg(&socket));
    client(&socket).info().unwrap();
    let error = refused(&arguments);
    assert!(
        error.contains("in use") && error.contains("readonly=on"),
        "{error}"
    );
}

#[test]
fn the_monitor_itself_stays_small() {
    let Some(kernel) = payload("idle") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let _running = Running::start(
        monitor()
            .args([
                "--cpus",
                "64",
                "--memory",
                "256M",
                "--serial",
                "off",
                "--machine",
                "hvm",
                "--kernel",
            ])
            .arg(kernel)
            .arg("--api-socket")
            .arg(&socket),
    );
    let api = client(&socket);
    assert_eq!(
        api.metrics().unwrap().vcpus.len(),
        64,
        "all the vCPUs there can be"
    );
    let memory = api.metrics().unwrap().memory;
    // The built program is not optimised here; `cargo xtask bench boot` has the
    // figure of the one that ships.
    let overhead = memory.resident - memory.guest_resident;
    assert!(overhead < 24 << 20, "{overhead} bytes");
    assert!(memory.guest_resident < 16 << 20, "{memory:?}");
}

/// Runs the monitor by `wrapper` (which gets its command line) and returns what
/// it said; `None` if the wrapper is not permitted here.
fn wrapped(wrapper: &mut Command, kernel: &Path) -> Option<String> {
    let output = wrapper
        .args(["--machine", "hvm", "--kernel"])
        .arg(kernel)
        .output()
        .unwrap();
    let error = text(&output.stderr);
    if !error.contains("blanket-vmm: ") {
        println!("skipped, because this user may not set it up: {error}");
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{error}");
    Some(error)
}

#[test]
fn without_kvm_or_the_right_to_it_the_remedy_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let Some(kernel) = payload("hello") else {
        return;
    };
    // A namespace of its own, in which /dev has nothing or a closed door.
    for (dev, remedy) in [
        ("true", "modprobe"),
        ("mknod -m 600 /dev/kvm c 10 232", "group kvm"),
    ] {
        // A copy that everybody may run.
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        open(folder.path(), 0o755);
        let (program, guest) = (folder.path().join("vmm"), folder.path().join("kernel"));
        fs::copy(env!("CARGO_BIN_EXE_blanket-vmm"), &program).unwrap();
        fs::copy(&kernel, &guest).unwrap();
        open(&program, 0o755);
        open(&guest, 0o644);
        let script = format!(
            "mount -t tmpfs none /dev && {dev} && \
             exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\""
        );
        let mut wrapper = Command::new("unshare");
        wrapper
            .args(["--mount", "sh", "-ec", &script, "sh"])
            .arg(&program)
            .stdin(Stdio::null());
        let Some(error) = wrapped(&mut wrapper, &guest) else {
            return;
        };
        assert!(
            error.contains("/dev/kvm") && error.contains(remedy),
            "{error}"
        );
    }
}
