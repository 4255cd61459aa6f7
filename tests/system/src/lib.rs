//! What whole-system tests share: nodes with Blanket on them, and its VMs.

mod clouds;
mod member;

pub use clouds::{Clouds, Pings, blanket};
pub use member::Member;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blanket_testbed::{
    Client, GuestImages, Host, HostBuilder, Node, NodeBuilder, Output, Provider, guest,
};

/// How long a guest may take to answer: generous, because hardware
/// virtualization may be emulated.
pub const GUEST_LIMIT: Duration = Duration::from_secs(100);

/// A file from `BLANKET_BIN_DIR` or `BLANKET_FIRMWARE_DIR`, which `cargo xtask
/// test` sets.
fn built(variable: &str, name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os(variable)
        .with_context(|| format!("{variable} is not set: run `cargo xtask test`"))?;
    Ok(PathBuf::from(folder).join(name))
}

/// A program of Blanket, built for nodes.
///
/// # Errors
/// Not run by `cargo xtask test`.
pub fn program(name: &str) -> Result<PathBuf> {
    built("BLANKET_BIN_DIR", name)
}

/// A freestanding guest payload.
///
/// # Errors
/// Not run by `cargo xtask test`.
pub fn payload(name: &str) -> Result<PathBuf> {
    built("BLANKET_FIRMWARE_DIR", name)
}

/// A node with Blanket's programs in `/usr/bin` and the guest images in
/// `/payload/guest`: 2 CPUs, 2 GiB.
///
/// # Errors
/// Not run by `cargo xtask test`, or an image cannot be built.
pub fn provider(name: &str) -> Result<NodeBuilder> {
    let folder = program("")?;
    provider_with(name, &folder)
}

/// The same with the programs in `folder`.
///
/// # Errors
/// An image cannot be built.
pub fn provider_with(name: &str, folder: &Path) -> Result<NodeBuilder> {
    Ok(Node::builder(name)
        .cpus(2)
        .memory_mib(2048)
        .payload(&GuestImages::get()?.payload()?)
        .inject(folder.join("blanket"), "/usr/bin/blanket")
        .inject(folder.join("blanket-vmm"), "/usr/bin/blanket-vmm"))
}

/// A guest of a real Xen with `blanket` in `/usr/bin`, from `folder`. The control domain offers it
/// pages and events again and again: see [`xen_invitation`].
pub fn xen_pair(name: &str, folder: &Path) -> NodeBuilder {
    let program = folder.join("blanket");
    Node::builder(name)
        .provider(Provider::Xen)
        .inject(&program, "/usr/bin/blanket")
        .beside(&program, "while blanket doctor --offer 1; do :; done")
}

/// The control domain's `number`th offer, from 0; each is good for one test.
///
/// # Errors
/// It does not come.
pub fn xen_invitation(node: &Node, number: usize) -> Result<String> {
    let deadline = Instant::now() + GUEST_LIMIT;
    loop {
        let console = node.console();
        // A line that has no end yet is not all of it.
        let mut offers = console
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n')?.split_once("--accept "));
        if let Some((_, offer)) = offers.nth(number) {
            return Ok(offer.trim().to_owned());
        }
        ensure!(Instant::now() < deadline, "no offer {number}:\n{console}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// This machine itself with Blanket's programs in `/usr/bin`, and in `/payload/guest` the guest
/// images but the disk.
///
/// # Errors
/// Not run by `cargo xtask test`, or an image cannot be built.
pub fn native(name: &str) -> Result<HostBuilder> {
    let folder = program("")?;
    native_with(name, &folder)
}

/// The same with the programs in `folder`.
///
/// # Errors
/// An image cannot be built.
pub fn native_with(name: &str, folder: &Path) -> Result<HostBuilder> {
    let images = GuestImages::get()?;
    let mut builder = Host::builder(name)
        .inject(folder.join("blanket"), "/usr/bin/blanket")
        .inject(folder.join("blanket-vmm"), "/usr/bin/blanket-vmm");
    for (file, name) in images.files() {
        if file != images.disk {
            builder = builder.inject(file, format!("/payload/guest/{name}"));
        }
    }
    Ok(builder)
}

/// Runs a test with guests on this machine's own KVM, where that can be.
///
/// # Panics
/// The test fails, or it cannot be set up.
pub fn natively(describe: impl FnOnce() -> HostBuilder, test: impl FnOnce(&Host)) {
    if let Some(reason) = Host::obstacle() {
        println!("skipped, because {reason}");
        return;
    }
    let host = match describe().open() {
        Ok(host) => host,
        Err(error) => panic!("no native guests: {error:?}"),
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(&host))) {
        tell_of_monitors(&host);
        resume_unwind(panic);
    }
}

/// Boots a node and runs a test on it.
///
/// # Panics
/// The node cannot be booted, or the test fails.
pub fn on_node(describe: impl FnOnce() -> NodeBuilder, test: impl FnOnce(&Node)) {
    let node = match describe().boot() {
        Ok(node) => node,
        Err(error) => panic!("the node does not boot: {error:?}"),
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(&node))) {
        // Its connections end a moment before the emulator does.
        std::thread::sleep(Duration::from_millis(500));
        if node.is_running() {
            tell_of_monitors(&node);
        } else {
            println!("the node's machine has ended");
        }
        resume_unwind(panic);
    }
}

/// Prints what the monitors on a node were about when a test failed, if that still answers.
fn tell_of_monitors(node: &Client) {
    let tell = "set +e; blanket ps -a; for vm in $(ls /var/lib/blanket/vms); do \
                echo \"$vm, its monitor:\"; blanket logs --monitor $vm | tail -n 20; \
                timeout 10 blanket info --json $vm; done; \
                for task in $(grep -ls blanket /proc/[0-9]*/comm); do \
                for task in ${task%/comm}/task/*; do \
                echo \"$task $(cat $task/comm) $(grep State $task/status)\"; cat $task/stack; \
                done; done";
    if let Ok(output) = node.sh(tell).timeout(Duration::from_secs(60)).run() {
        println!("{output}");
    }
}

/// Waits until something is so.
///
/// # Panics
/// It is not for two minutes.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A VM on a node, or on this machine.
pub struct Vm<'a> {
    node: &'a Client,
    name: String,
    /// The agent's console.
    console: String,
    /// How `blanket` is called.
    command: String,
}

impl<'a> Vm<'a> {
    /// `blanket run NAME FLAGS` on `node`, the agent's console included.
    ///
    /// # Errors
    /// It did not start; what `blanket` said.
    pub fn run(node: &'a Client, name: &str, flags: &str) -> Result<Self> {
        let socket = console(name);
        node.sh(format!(
            "blanket run {name} --console socket={socket} {flags}"
        ))
        .text()?;
        Ok(Self {
            node,
            name: name.to_owned(),
            console: socket,
            command: "blanket".to_owned(),
        })
    }

    /// One that has been started otherwise, with the agent's console where `blanket` puts it.
    #[must_use]
    pub fn started(node: &'a Client, name: &str) -> Self {
        Self {
            node,
            name: name.to_owned(),
            console: format!("/run/blanket/{name}/console.sock"),
            command: "blanket".to_owned(),
        }
    }

    /// The same in the directory `home`, where `blanket` is called like this.
    #[must_use]
    pub fn started_in(node: &'a Client, home: &str, command: String, name: &str) -> Self {
        Self {
            console: format!("{home}/run/{name}/console.sock"),
            command,
            ..Self::started(node, name)
        }
    }

    /// `blanket run` with an initrd whose agent answers when the guest is up.
    ///
    /// # Errors
    /// It did not start.
    pub fn linux(node: &'a Client, name: &str, cmdline: &str, flags: &str) -> Result<Self> {
        Self::run(
            node,
            name,
            &format!(
                "--kernel /payload/guest/vmlinux --initrd /payload/guest/initrd.cpio \
                 --cmdline 'console=ttyS0 quiet panic=-1 {cmdline}' {flags}"
            ),
        )
    }

    /// The same in a `pv` machine. The agent shares its console with the kernel, which keeps
    /// quiet; output from before the console works is the serial port's.
    ///
    /// # Errors
    /// It did not start.
    pub fn pv(node: &'a Client, name: &str, cmdline: &str, flags: &str) -> Result<Self> {
        Self::pv_kernel(node, name, "vmlinuz", "initrd.cpio", cmdline, flags)
    }

    /// The same with other files of `/payload/guest`.
    ///
    /// # Errors
    /// It did not start.
    pub fn pv_kernel(
        node: &'a Client,
        name: &str,
        kernel: &str,
        initrd: &str,
        cmdline: &str,
        flags: &str,
    ) -> Result<Self> {
        Self::run(
            node,
            name,
            &format!(
                "--machine pv --kernel /payload/guest/{kernel} --initrd /payload/guest/{initrd} \
                 --cmdline 'console=hvc0 quiet loglevel=1 panic=-1 {cmdline}' {flags}"
            ),
        )
    }

    /// The channel into the guest; waits until it is up.
    ///
    /// # Errors
    /// It does not answer: what it said on its serial port.
    pub fn guest(&self) -> Result<Client> {
        guest(self.node, &self.console, GUEST_LIMIT)
            .map_err(anyhow::Error::from)
            .with_context(|| {
                let logs = ["", "--monitor"].map(|which| {
                    let log = self.blanket("logs", which).map(|output| output.stdout);
                    String::from_utf8_lossy(&log.unwrap_or_default()).into_owned()
                });
                logs.join("\nthe monitor: ")
            })
    }

    /// `blanket COMMAND NAME FLAGS`.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn blanket(&self, command: &str, flags: &str) -> Result<Output> {
        let line = format!("{} {command} {} {flags}", self.command, self.name);
        Ok(self.node.sh(line).timeout(GUEST_LIMIT).run()?)
    }

    /// `blanket migrate NAME --as NEW FLAGS`: the VM under its new name, and the report.
    ///
    /// # Errors
    /// It was not migrated: what `blanket` said.
    pub fn migrate(&self, new: &str, flags: &str) -> Result<(Self, serde_json::Value)> {
        let socket = console(new);
        let flags = format!("--as {new} --json --console socket={socket} {flags}");
        let output = self.blanket("migrate", &flags)?;
        ensure!(output.status.success(), "{output}");
        let vm = Self {
            node: self.node,
            name: new.to_owned(),
            console: socket,
            command: self.command.clone(),
        };
        Ok((vm, serde_json::from_slice(&output.stdout)?))
    }

    /// `blanket info --json`.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn info(&self) -> Result<serde_json::Value> {
        let output = self.blanket("info", "--json")?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Waits until the monitor has ended, and returns `blanket ps`' reason.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&self) -> Result<String> {
        let wait = format!(
            "until ! blanket ps --json | grep -q '\"{}\"'; do sleep 0.2; done; blanket ps -a | grep -w {}",
            self.name, self.name
        );
        Ok(self.node.sh(wait).timeout(GUEST_LIMIT).text()?)
    }
}

/// Bytes that iperf3 carries from `client` to the guest `server` at `address`, or the other way
/// with `-R` among the options. The server serves this once: one that still ends with another
/// client is busy.
///
/// # Errors
/// Either fails: what iperf3 says.
pub fn iperf3(server: &Client, client: &Client, address: &str, options: &str) -> Result<u64> {
    const LISTENS: &str = "while pidof iperf3; do sleep 0.1; done; iperf3 -s -1 -D; \
                           until grep -q ':1451 [^ ]* 0A ' /proc/net/tcp /proc/net/tcp6; do \
                           sleep 0.1; done";
    server.sh(LISTENS).text()?;
    let run = client
        .sh(format!("iperf3 -J -c {address} {options}"))
        .run()?;
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap_or_default();
    let received = report["end"]["sum_received"]["bytes"].as_u64();
    received.with_context(|| format!("iperf3 {options}: {run}"))
}

/// Where a VM's virtio console is on its node.
fn console(name: &str) -> String {
    format!("/run/{name}.console")
}
