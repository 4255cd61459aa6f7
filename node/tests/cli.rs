//! The `blanket` program as a user meets it. No VM is needed: a stand-in for
//! the monitor (this test program itself, see [`monitor`]) speaks the API.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod monitor;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A home of its own, a kernel (of sorts) and the stand-in monitor.
struct Node {
    dir: TempDir,
    behaviour: &'static str,
}

impl Node {
    fn new() -> Self {
        Self::behaving("")
    }

    /// A node whose monitors behave as [`monitor`] describes.
    fn behaving(behaviour: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinuz"), "kernel").unwrap();
        let script = format!(
            "#!/bin/sh\nSTAND_IN_ARGS=\"$*\" exec {} --exact monitor::stand_in --nocapture\n",
            std::env::current_exe().unwrap().display()
        );
        let program = dir.path().join("blanket-vmm");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, behaviour }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blanket"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("BLANKET_HOME", self.path("home"))
            .env("BLANKET_VMM", self.path("blanket-vmm"))
            .env("STAND_IN_BEHAVIOUR", self.behaviour)
            .stdin(Stdio::null());
        command
    }

    fn blanket(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; its output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.blanket(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail; its errors.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.blanket(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    fn run(&self, name: &str) {
        self.ok(&["run", name, "--kernel", "vmlinuz"]);
    }

    fn state(&self, name: &str) -> String {
        let list = self.json(&["ps", "--all", "--json"]);
        let mut vms = list.as_array().unwrap().iter();
        let vm = vms.find(|vm| vm["name"] == name).unwrap();
        vm["state"].as_str().unwrap().to_owned()
    }

    /// Nothing of any VM is left.
    fn assert_empty(&self) {
        for dir in ["home/vms", "home/run"] {
            let left = fs::read_dir(self.path(dir)).map_or(0, Iterator::count);
            assert_eq!(left, 0, "{dir}");
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let list = self.blanket(&["ps", "--json"]);
        let vms: Vec<Value> = serde_json::from_slice(&list.stdout).unwrap_or_default();
        for vm in vms {
            self.blanket(&["rm", "--force", vm["name"].as_str().unwrap_or("")]);
        }
    }
}

#[test]
fn a_vm_lives_from_run_to_rm() {
    let node = Node::new();
    assert_eq!(
        node.ok(&["run", "web", "--kernel", "vmlinuz", "-c", "2"]),
        "web\n"
    );
    let list = node.json(&["ps", "--json"]);
    assert_eq!(list[0]["state"], "running");
    assert_eq!(list[0]["cpus"], 2);
    assert_eq!(list[0]["memory_bytes"], 512 << 20);
    let table = node.ok(&["ps"]);
    assert!(
        table.starts_with("NAME  STATE    MACHINE  CPUS  MEMORY   UPTIME"),
        "{table}"
    );

    node.ok(&["pause", "web"]);
    assert_eq!(node.state("web"), "paused");
    let refused = node.fails(&["pause", "web"]);
    assert!(
        refused.contains("it is paused\n  remedy: resume it"),
        "{refused}"
    );
    node.ok(&["resume", "web"]);

    let info = node.json(&["info", "web", "--json"]);
    assert_eq!(info["vm"]["id"], "web");
    assert_eq!(info["metrics"]["memory"]["resident"], 7 << 20);
    assert!(node.ok(&["info", "web"]).contains("resident:"));

    assert!(node.fails(&["rm", "web"]).contains("is running"));
    node.ok(&["stop", "web"]);
    assert_eq!(node.state("web"), "stopped");
    assert_eq!(node.json(&["ps", "--json"]), Value::Array(vec![]));
    assert!(node.fails(&["pause", "web"]).contains("is not running"));
    node.ok(&["rm", "web"]);
    node.assert_empty();
}

#[test]
fn the_machine_that_was_chosen_is_told_with_the_reason_and_listed() {
    let node = Node::new();
    let output = node.blanket(&["run", "web", "--kernel", "vmlinuz"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("machine, because this node has KVM"),
        "{said}"
    );
    let config = node.json(&["info", "web", "--json"])["config"].clone();
    let chosen = config["machine"].as_str().unwrap();
    assert!(said.contains(&format!("{chosen} machine")), "{said}");

    let stated = "run stated --kernel vmlinuz --machine pv --trust-guest-user";
    let stated: Vec<&str> = stated.split(' ').collect();
    let output = node.blanket(&stated);
    assert!(output.status.success() && output.stderr.is_empty());
    let list = node.json(&["ps", "--json"]);
    assert_eq!(list[0]["trust_guest_user"], true);
    let info = node.json(&["info", "stated", "--json"]);
    assert!(info["config"]["console"]["socket"].is_string());
}

#[test]
fn a_name_in_use_is_refused_and_the_vm_that_has_it_goes_on() {
    let node = Node::new();
    node.run("web");
    let error = node.fails(&["run", "web", "--kernel", "vmlinuz"]);
    assert!(error.contains("remedy: take another, or remove that VM: blanket rm web"));
    assert_eq!(node.state("web"), "running");
}

#[test]
fn a_monitor_that_fails_is_reported_and_leaves_nothing_behind() {
    let node = Node::behaving("fail");
    let error = node.fails(&["run", "web", "--kernel", "vmlinuz"]);
    assert_eq!(
        error,
        "blanket: cannot start 'web': the kernel is truncated\n"
    );
    node.assert_empty();
}

#[test]
fn a_guest_that_ends_at_once_is_no_failure() {
    let node = Node::behaving("end");
    node.run("web");
    assert_eq!(node.state("web"), "stopped");
}

#[test]
fn stop_gets_stronger_with_guests_and_monitors_that_do_not_listen() {
    let deaf = Node::behaving("deaf-guest");
    deaf.run("web");
    deaf.ok(&["stop", "web", "--timeout", "1"]);
    assert_eq!(deaf.state("web"), "stopped");

    let hung = Node::behaving("deaf-monitor");
    hung.run("web");
    hung.ok(&["stop", "web", "--force"]);
    let list = hung.json(&["ps", "-a", "--json"]);
    assert_eq!(list[0]["state"], "failed");
    assert!(list[0]["reason"].as_str().unwrap().contains("SIGKILL"));
}

#[test]
fn a_console_carries_piped_bytes_both_ways_and_the_log_has_them() {
    let node = Node::new();
    node.run("web");
    let mut console = node
        .command(&["console", "web", "--idle", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    console
        .stdin
        .take()
        .unwrap()
        .write_all(b"hi\x1d!\n")
        .unwrap();
    let output = console.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"guest heard: hi\x1d!\n");
    assert_eq!(node.ok(&["logs", "web"]), "guest heard: hi\x1d!\n");
    assert!(node.ok(&["logs", "web", "--monitor"]).contains("stand-in"));
}

#[test]
fn run_attached_is_connected_before_the_guest_starts() {
    let node = Node::new();
    let mut run = node
        .command(&["run", "web", "--kernel", "vmlinuz", "--attach"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    run.stdin.take().unwrap().write_all(b"hi\n").unwrap();
    let mut heard = [0; 16];
    run.stdout.take().unwrap().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"guest heard: hi\n");
    assert_eq!(node.state("web"), "running");
    // Without a terminal it stays until the VM ends.
    node.ok(&["stop", "web"]);
    assert!(run.wait().unwrap().success());
}

#[test]
fn an_unknown_name_lists_those_that_exist() {
    let node = Node::new();
    assert!(node.fails(&["info", "x"]).contains("there are none at all"));
    node.run("web");
    for command in ["console", "stop", "rm", "info", "logs", "pause", "reset"] {
        let error = node.fails(&[command, "db"]);
        assert!(error.contains("there is no VM 'db'"), "{command}: {error}");
        assert!(error.contains("use one of: web"), "{command}: {error}");
    }
}

#[test]
fn of_several_names_the_known_ones_are_done() {
    let node = Node::new();
    node.run("a");
    node.run("b");
    assert!(
        node.fails(&["pause", "a", "nobody", "b"])
            .contains("nobody")
    );
    assert_eq!(
        (node.state("a"), node.state("b")),
        ("paused".into(), "paused".into())
    );
    // Paused guests are let run so that they can shut down.
    node.ok(&["stop", "a", "b"]);
    node.ok(&["rm", "a", "b"]);
    node.assert_empty();
}

/// Expects `run` to fail with `message` before anything is made.
fn refused(node: &Node, args: &[&str], message: &str) {
    let error = node.fails(&[&["run", "web"], args].concat());
    assert!(error.contains(message), "{args:?}: {error}");
    assert!(!Path::new(&node.path("home")).exists(), "{args:?}");
}

#[test]
fn bad_input_is_refused_before_anything_is_made() {
    let node = Node::new();
    refused(&node, &[], "no kernel: name one with --kernel");
    refused(&node, &["--kernel", "gone"], "gone: No such file");
    refused(&node, &["--kernel", "."], "is a directory");
    refused(
        &node,
        &["--kernel", "vmlinuz", "--disk", "no.img"],
        "no.img",
    );
    refused(&node, &["--kernel", "vmlinuz", "-c", "65"], "1 to 64");
    refused(&node, &["--kernel", "vmlinuz", "-m", "12X"], "not a size");
    fs::write(node.path("vm.toml"), "kernel = 'vmlinuz'\nkernal = 1\n").unwrap();
    refused(&node, &["--config", "vm.toml"], "kernal");
    refused(&node, &["--config", "gone.toml"], "gone.toml");
    let off = "--kernel vmlinuz --machine hvm --serial off --attach";
    let off: Vec<&str> = off.split(' ').collect();
    refused(&node, &off, "no serial port socket");
    let off = "--kernel vmlinuz --machine pv --console off --attach";
    let off: Vec<&str> = off.split(' ').collect();
    refused(&node, &off, "no console hvc0 socket");
    assert!(
        node.fails(&["run", "../web", "--kernel", "vmlinuz"])
            .contains("a name starts")
    );
}

#[test]
fn a_configuration_file_is_used_and_options_override_it() {
    let node = Node::new();
    let text = "kernel = 'vmlinuz'\ncpus = 3\nmemory = '1G'\n[[net]]\ntap = 'blk0'\n";
    fs::write(node.path("vm.toml"), text).unwrap();
    node.ok(&["run", "web", "--config", "vm.toml", "--cpus", "4"]);
    let info = node.json(&["info", "web", "--json"]);
    // As the monitor read it from what was handed to it.
    let config = &info["vm"]["config"];
    assert_eq!(config["cpus"], 4);
    assert_eq!(config["memory"], "1G");
    assert_eq!(config["net"][0]["tap"], "blk0");
    assert_eq!(config["kernel"], node.path("vmlinuz").to_str().unwrap());
}

#[test]
fn a_missing_monitor_program_is_named() {
    let node = Node::new();
    fs::remove_file(node.path("blanket-vmm")).unwrap();
    refused(&node, &["--kernel", "vmlinuz"], "BLANKET_VMM");
}

#[test]
fn provider_tells_the_same_in_text_and_json_without_asking_anybody() {
    let node = Node::new();
    let json = node.json(&["provider", "--json", "--no-metadata"]);
    assert_eq!(json["metadata"]["state"], "not-asked");
    let (provider, platform) = (&json["provider"], &json["platform"]);
    let text = node.ok(&["provider", "--no-metadata"]);
    let line = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap()
    };
    assert!(
        line("provider:")
            .trim()
            .starts_with(provider.as_str().unwrap())
    );
    assert_eq!(line("platform:").trim(), platform.as_str().unwrap());
    let doctor = node.blanket(&["doctor", "--json"]);
    let doctor: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let mut checks = doctor["checks"].as_array().unwrap().iter();
    let check = checks.find(|check| check["name"] == "provider").unwrap();
    assert_eq!(&check["facts"]["provider"], provider);
    assert_eq!(&check["facts"]["platform"], platform);
}

#[test]
fn doctor_answers_in_text_and_json_and_fails_only_without_kvm() {
    let node = Node::new();
    let output = node.blanket(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let names: Vec<_> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    for name in [
        "kvm",
        "io_uring",
        "af_xdp",
        "userfaultfd",
        "hugetlb",
        "cgroups",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    assert_eq!(output.status.success(), report["obstacle"].is_null());
    let text = node.blanket(&["doctor"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(names.iter().all(|name| text.contains(name)), "{text}");
}
