//! How fast a stock kernel gets to its init, and what the monitor costs:
//! against QEMU from Debian, with the same kernel, initrd, memory and devices
//! on the same node, in turns.
//!
//! No monitor gets memory that a guest had before: the emulated node checks
//! each store to memory that it once translated code from, so that to zero
//! 2 MiB of it takes 1 to 250 ms. A monitor that was measured is stopped and
//! keeps its memory to the end.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blanket_system_tests::provider_with;
use blanket_testbed::{Node, tools};

use super::row::Row;
use crate::build;
use crate::progress::Progress;
use crate::setup;
use crate::workspace::Workspace;

const RUNS: usize = 5;
/// All of them, with those of the first round.
const BOOTS: u32 = 3 * (RUNS as u32 + 1);
const LIMIT: Duration = Duration::from_secs(120);
/// What the initrd writes to the serial port first.
const INIT: &str = "guest: init";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// The node's own memory, and what a stopped monitor keeps at most, in MiB.
const NODE_MIB: u32 = 1024;
const MONITOR_MIB: u32 = 384;

/// A monitor and its command line on the node, serial port on stdio; `$n` is
/// the number of the boot.
struct Monitor {
    name: &'static str,
    command: String,
}

fn monitors() -> [Monitor; 3] {
    let files = "-kernel /payload/guest/vmlinux -initrd /payload/guest/initrd.cpio";
    let qemu = format!(
        "qemu-system-x86_64 -accel kvm -cpu host -smp 1 -m 256 -nodefaults -no-reboot \
         -display none -serial stdio {files} -append '{CMDLINE}' \
         -netdev tap,id=n,ifname=tap$n,script=no,downscript=no \
         -drive id=d,if=none,format=raw,file=/run/disk$n"
    );
    [
        Monitor {
            name: "blanket",
            command: format!(
                "blanket-vmm --api-socket /run/api --memory 256M --cpu host --rng false --disk /run/disk$n --net tap=tap$n \
                 --kernel /payload/guest/vmlinux --initrd /payload/guest/initrd.cpio \
                 --cmdline '{CMDLINE}'"
            ),
        },
        Monitor {
            name: "QEMU microvm",
            command: format!(
                "{qemu} -M microvm -device virtio-net-device,netdev=n \
                 -device virtio-blk-device,drive=d"
            ),
        },
        Monitor {
            name: "QEMU q35",
            command: format!(
                "{qemu} -M q35 -device virtio-net-pci,netdev=n,romfile= \
                 -device virtio-blk-pci,drive=d"
            ),
        },
    ]
}

/// One boot on the node.
struct Boot {
    /// From exec to the guest's init, in ms.
    init: f64,
    /// The monitor's resident memory without the guest's, in MiB.
    overhead: f64,
    /// Steps of our own monitor: (name, ms since its start).
    phases: Vec<(String, f64)>,
}

/// Measures all of it.
///
/// # Errors
/// The node or a monitor does not start.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    setup::run(progress)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let programs = workspace.programs(build::RELEASE);
    let step = progress.step("a node boots");
    let node = provider_with("bench", &programs)?
        .payload(&tools()?)
        .memory_mib(NODE_MIB + BOOTS * MONITOR_MIB)
        .boot()?;
    step.done("");
    let monitors = monitors();
    let mut number = 0;
    let mut boots: [Vec<Boot>; 3] = Default::default();
    for round in 0..=RUNS {
        let step = progress.step(&format!("boots, round {round} of {RUNS}"));
        for (monitor, boots) in monitors.iter().zip(&mut boots) {
            let boot = boot(&node, monitor, number).with_context(|| monitor.name)?;
            number += 1;
            step.note(&format!("{} {:.0} ms", monitor.name, boot.init));
            // The first round warms the caches.
            if round > 0 {
                boots.push(boot);
            }
        }
        step.done("");
    }
    let mut rows = boot_rows(&monitors, &boots);
    let step = progress.step("process start to API, on this machine");
    rows.extend(api_row(&programs)?);
    step.done("");
    Ok(rows)
}

fn boot(node: &Node, monitor: &Monitor, number: u32) -> Result<Boot> {
    // exec of the monitor, the first line of its guest's init, and then the
    // mappings of the monitor: those as large as the guest's memory are its.
    let script = format!(
        "n={number}; truncate -s 64M /run/disk$n; ip tuntap add tap$n mode tap; ip link set tap$n up; \
         rm -f /run/api /run/out; mkfifo /run/out; \
         read s _ < /proc/uptime; {} < /dev/null > /run/out 2> /run/err & p=$!; \
         grep -q -m 1 '{INIT}' /run/out; read e _ < /proc/uptime; echo \"start $s\"; echo \"init $e\"; \
         awk '/^[0-9a-f]+-[0-9a-f]+ / {{ guest = 0 }} /^Size:/ {{ guest = $2 >= 240 * 1024 }} \
              /^Rss:/ && !guest {{ rss += $2 }} END {{ print \"rss\", rss }}' /proc/$p/smaps; \
         [ ! -S /run/api ] || curl -s --unix-socket /run/api http://vm/vm; \
         kill -STOP $p",
        monitor.command
    );
    let text = node.sh(script).timeout(LIMIT).text()?;
    let field = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.with_context(|| format!("no {name} in: {text}"))?;
        Ok(value.trim().parse()?)
    };
    let info = text.find('{').map(|at| &text[at..]);
    let info: serde_json::Value = serde_json::from_str(info.unwrap_or("{}"))?;
    let phases = info["boot"].as_array().map_or_else(Vec::new, |phases| {
        let of = |phase: &serde_json::Value| {
            let at = phase["at_us"].as_f64().unwrap_or_default() / 1000.0;
            (phase["phase"].as_str().unwrap_or_default().to_owned(), at)
        };
        phases.iter().map(of).collect()
    });
    Ok(Boot {
        // The node's clock counts hundredths of a second.
        init: (field("init")? - field("start")?) * 1000.0,
        overhead: field("rss")? / 1024.0,
        phases,
    })
}

fn boot_rows(monitors: &[Monitor; 3], boots: &[Vec<Boot>; 3]) -> Vec<Row> {
    let all =
        |i: usize, value: fn(&Boot) -> f64| -> Vec<f64> { boots[i].iter().map(value).collect() };
    let mut rows = Vec::new();
    for peer in [1, 2] {
        let compared = [
            ("exec to init", "ms", (|boot| boot.init) as fn(&Boot) -> f64),
            ("monitor's own memory", "MiB", |boot| boot.overhead),
        ];
        for (metric, unit, value) in compared {
            let row = Row::new(metric, unit, &all(0, value));
            rows.extend(row.map(|row| row.against(monitors[peer].name, &all(peer, value))));
        }
    }
    // By phase: each step's own time, and the rest is the guest's kernel.
    let names: Vec<_> = boots[0].first().map_or_else(Vec::new, |boot| {
        boot.phases.iter().map(|(name, _)| name.clone()).collect()
    });
    for (i, name) in names.iter().enumerate() {
        let times: Vec<f64> = boots[0]
            .iter()
            .map(|boot| boot.phases[i].1 - if i > 0 { boot.phases[i - 1].1 } else { 0.0 })
            .collect();
        rows.extend(Row::new(&format!("phase: {name}"), "ms", &times));
    }
    let kernel = all(0, |boot| {
        boot.init - boot.phases.last().map_or(0.0, |(_, at)| *at)
    });
    rows.extend(Row::new(
        "phase: exec and the guest's kernel",
        "ms",
        &kernel,
    ));
    rows
}

/// CPU time from process start until the API listens; QEMU's is QMP.
fn api_row(programs: &Path) -> Result<Option<Row>> {
    let folder = std::env::temp_dir().join(format!("blanket-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let socket = folder.join("api");
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..2 * RUNS {
        let mut command = Command::new(programs.join("blanket-vmm"));
        command.arg("--api-socket").arg(&socket);
        ours.push(cpu_until_ready(command, &socket)?);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "q35", "-S", "-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        theirs.push(cpu_until_ready(command, &socket)?);
    }
    std::fs::remove_dir_all(&folder)?;
    let row = Row::new("process start to API, CPU time", "ms", &ours);
    Ok(row.map(|row| row.against("QEMU q35 to QMP", &theirs)))
}

/// A process that ends with the benchmark.
struct Ends(Child, PathBuf);

impl Drop for Ends {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_file(&self.1);
    }
}

fn cpu_until_ready(mut command: Command, socket: &Path) -> Result<f64> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let child = Ends(child, socket.to_owned());
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(socket).is_err() {
        if Instant::now() > deadline {
            bail!("no API at {}", socket.display());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // The first field: time on a CPU, in ns.
    let stat = std::fs::read_to_string(format!("/proc/{}/schedstat", child.0.id()))?;
    let ns: f64 = stat.split(' ').next().unwrap_or_default().parse()?;
    Ok(ns / 1e6)
}
