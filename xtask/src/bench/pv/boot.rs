//! Exec of the monitor until the first line of the guest's init, beside QEMU's
//! emulation of the same kernel and initramfs.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blanket_testbed::BootImages;

use super::RUNS;
use crate::bench::row::Row;
use crate::progress::Progress;

/// What the initramfs writes to its console first.
const INIT: &str = "guest: init";
const LIMIT: Duration = Duration::from_secs(60);

/// A process that ends with the benchmark.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One boot.
struct Boot {
    /// From exec to the guest's init, in ms.
    init: f64,
    /// Steps of the monitor: (name, ms since its start).
    phases: Vec<(String, f64)>,
}

pub(super) fn rows(programs: &Path, images: &BootImages, progress: &Progress) -> Result<Vec<Row>> {
    let folder = std::env::temp_dir().join(format!("blanket-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let result = measured(programs, images, &folder, progress);
    std::fs::remove_dir_all(&folder)?;
    result
}

fn measured(
    programs: &Path,
    images: &BootImages,
    folder: &Path,
    progress: &Progress,
) -> Result<Vec<Row>> {
    let socket = folder.join("api");
    let (mut ours, mut theirs): (Vec<Boot>, Vec<f64>) = Default::default();
    for round in 0..=RUNS {
        let step = progress.step(&format!("boots, round {round} of {RUNS}"));
        let mut blanket = Command::new(programs.join("blanket-vmm"));
        blanket
            .args(["--machine", "pv", "--memory", "512M", "--console", "stdio"])
            .args([
                "--serial",
                "off",
                "--cmdline",
                "console=hvc0 quiet panic=-1",
            ])
            .arg("--api-socket")
            .arg(&socket)
            .arg("--kernel")
            .arg(&images.vmlinuz)
            .arg("--initrd")
            .arg(&images.initrd);
        let boot = boot(blanket, Some(&socket)).context("the pv machine")?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1"])
            .args(["-m", "512", "-nodefaults", "-no-reboot", "-display", "none"])
            .args([
                "-serial",
                "stdio",
                "-append",
                "console=ttyS0 quiet panic=-1",
            ])
            .arg("-kernel")
            .arg(&images.vmlinuz)
            .arg("-initrd")
            .arg(&images.initrd);
        let peer = self::boot(qemu, None).context("QEMU")?;
        step.done(&format!("{:.0} ms, QEMU {:.0} ms", boot.init, peer.init));
        // The first round warms the caches.
        if round > 0 {
            ours.push(boot);
            theirs.push(peer.init);
        }
    }
    let times: Vec<f64> = ours.iter().map(|boot| boot.init).collect();
    let total = Row::new("exec to init, 1 vCPU, 512 MiB", "ms", &times);
    let mut rows: Vec<Row> = total
        .map(|row| row.against("QEMU TCG", &theirs))
        .into_iter()
        .collect();
    rows.extend(phases(&ours));
    Ok(rows)
}

/// Each step's own time, and the rest is the guest's kernel.
fn phases(boots: &[Boot]) -> Vec<Row> {
    let Some(first) = boots.first() else {
        return Vec::new();
    };
    let at = |boot: &Boot, i: usize| boot.phases.get(i).map_or(0.0, |(_, at)| *at);
    let mut rows = Vec::new();
    for (i, (name, _)) in first.phases.iter().enumerate() {
        let own = |boot: &Boot| at(boot, i) - if i > 0 { at(boot, i - 1) } else { 0.0 };
        let times: Vec<f64> = boots.iter().map(own).collect();
        rows.extend(Row::new(&format!("phase: {name}"), "ms", &times));
    }
    let rest = |boot: &Boot| boot.init - boot.phases.last().map_or(0.0, |(_, at)| *at);
    let times: Vec<f64> = boots.iter().map(rest).collect();
    rows.extend(Row::new("phase: exec and the guest's kernel", "ms", &times));
    rows
}

fn boot(mut command: Command, socket: Option<&Path>) -> Result<Boot> {
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let mut child = Ends(child);
    let output = child.0.stdout.take().context("no output")?;
    let (seen, init) = channel();
    let reader = thread::spawn(move || {
        let mut said = String::new();
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.contains(INIT) {
                // Nobody waits any more if it came too late.
                let _ = seen.send(start.elapsed());
                return said;
            }
            said.push_str(&line);
            said.push('\n');
        }
        said
    });
    match init.recv_timeout(LIMIT) {
        Ok(elapsed) => Ok(Boot {
            init: elapsed.as_secs_f64() * 1000.0,
            phases: socket.map_or(Ok(Vec::new()), timeline)?,
        }),
        Err(RecvTimeoutError::Timeout) => bail!("no init within {LIMIT:?}"),
        Err(RecvTimeoutError::Disconnected) => {
            bail!("it ended: {}", reader.join().unwrap_or_default())
        }
    }
}

/// The monitor's own timeline.
fn timeline(socket: &Path) -> Result<Vec<(String, f64)>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(b"GET /vm HTTP/1.1\r\nhost: vm\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let at = text.find('{').context("the API has no answer")?;
    let info: serde_json::Value = serde_json::from_str(&text[at..])?;
    let phases = info["boot"].as_array().context("no timeline")?;
    Ok(phases
        .iter()
        .map(|phase| {
            let at = phase["at_us"].as_f64().unwrap_or_default() / 1000.0;
            (phase["phase"].as_str().unwrap_or_default().to_owned(), at)
        })
        .collect())
}
