//! Live migration of guests in `pv` machines, natively: how long they stand
//! still, beside QEMU, and how fast memory and disks move, beside what the same
//! link carries.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blanket_system_tests::{Member, Vm, native_with};
use blanket_testbed::{Client, GuestImages, Host};
use serde_json::{Value, json};

use super::load;
use super::row::{Row, median};
use crate::build;
use crate::progress::Progress;
use crate::setup;
use crate::workspace::Workspace;

/// Runs of everything but where it says otherwise.
const RUNS: usize = 5;
/// Runs of the guest that writes to its memory.
const BUSY_RUNS: usize = 10;
/// MiB of random bytes in memory that are to move: so many that what each migration
/// takes, whatever moves, does not count for much.
const FILLED: u64 = 3072;
/// The same on a disk.
const DISK: u64 = 1024;
/// What a guest may stand still while it writes at half the link's rate.
const TARGET_MS: u64 = 100;

const MIB: f64 = (1 << 20) as f64;

/// Measures all of it.
///
/// # Errors
/// There are no native guests on this machine, or a migration fails.
pub(super) fn run(workspace: &Workspace, progress: &Progress) -> Result<Vec<Row>> {
    if let Some(obstacle) = Host::obstacle() {
        bail!("no native guests: {obstacle}");
    }
    setup::run(progress)?;
    let step = progress.step("build Blanket for release");
    build::programs(workspace, &step, build::RELEASE)?;
    step.done("");
    let programs = workspace.programs(build::RELEASE);
    let mut rows = idle(&programs, progress)?;
    rows.extend(large(&programs, progress)?);
    rows.extend(busy(&programs, progress)?);
    rows.extend(between_nodes(&programs, progress)?);
    Ok(rows)
}

fn number(report: &Value, field: &str) -> Result<f64> {
    let number = report[field].as_f64();
    number.with_context(|| format!("no {field}: {report}"))
}

/// Milliseconds that the guest stood still.
fn downtime(report: &Value) -> Result<f64> {
    Ok(number(report, "downtime_us")? / 1e3)
}

/// Moves a VM back and forth within the node; each report.
fn back_and_forth(host: &Client, flags: &str, runs: usize) -> Result<Vec<Value>> {
    let mut vm = Vm::started(host, "here");
    let mut reports = Vec::new();
    for run in 0..runs {
        let new = if run % 2 == 0 { "there" } else { "here" };
        let (moved, report) = vm.migrate(new, flags)?;
        vm = moved;
        reports.push(report);
    }
    // Where it was, for the next ones.
    if runs % 2 == 1 {
        vm.migrate("here", "")?;
    }
    Ok(reports)
}

/// An idle guest of 1 GiB, beside QEMU with the same one.
fn idle(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("an idle guest");
    let host = native_with("bench", programs)?.open()?;
    let vm = Vm::pv(&host, "here", "", "--memory 1G")?;
    drop(vm.guest()?);
    let reports = back_and_forth(&host, "", RUNS + 1)?;
    let times = |of: fn(&Value) -> Result<f64>| -> Result<Vec<f64>> {
        // The first one warms up.
        reports.iter().skip(1).map(of).collect()
    };
    let (pause, total) = (
        times(downtime)?,
        times(|report| Ok(number(report, "total_us")? / 1e3))?,
    );
    host.sh("blanket rm --force here").text()?;
    step.done(&format!("{:.1} ms", median(&pause).unwrap_or_default()));
    let step = progress.step("the same in QEMU");
    let images = GuestImages::get()?;
    let folder = tempfile::tempdir()?;
    let mut theirs = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (pause, total) = qemu(folder.path(), &images)?;
        theirs.0.push(pause);
        theirs.1.push(total);
    }
    step.done(&format!("{:.1} ms", median(&theirs.0).unwrap_or_default()));
    let rows = [
        Row::new("idle guest of 1 GiB: it stands still", "ms", &pause)
            .map(|row| row.against("QEMU TCG", &theirs.0)),
        Row::new("idle guest of 1 GiB: the whole migration", "ms", &total)
            .map(|row| row.against("QEMU TCG", &theirs.1)),
    ];
    Ok(rows.into_iter().flatten().collect())
}

/// A QEMU that ends with this.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Its monitor.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut this = Self(BufReader::new(stream));
        this.hear()?;
        this.ask("qmp_capabilities", &json!({}))?;
        Ok(this)
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{request}")?;
        loop {
            let mut heard = self.hear()?;
            ensure!(heard["error"].is_null(), "{command}: {heard}");
            // Others are events.
            if !heard["return"].is_null() {
                return Ok(heard["return"].take());
            }
        }
    }
}

/// Milliseconds of standstill and in all of QEMU's migration of an idle guest.
fn qemu(folder: &Path, images: &GuestImages) -> Result<(f64, f64)> {
    let start = |name: &str, more: &[&str]| -> Result<(Qemu, Qmp)> {
        let monitor = folder.join(name);
        let _ = std::fs::remove_file(&monitor);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1"])
            .args([
                "-m",
                "1024",
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(&images.vmlinuz)
            .arg("-initrd")
            .arg(&images.initrd)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let qemu = Qemu(qemu.spawn().context("cannot start QEMU")?);
        Ok((qemu, Qmp::connect(&monitor)?))
    };
    let way = format!("unix:{}", folder.join("way").display());
    let (mut source, mut monitor) = start("source", &[])?;
    let output = source.0.stdout.take().context("no output")?;
    let mut lines = BufReader::new(output).lines();
    lines
        .find(|line| line.as_ref().is_ok_and(|line| line.contains("guest: init")))
        .context("QEMU's guest does not boot")??;
    let (_destination, _its_monitor) = start("destination", &["-incoming", &way])?;
    std::thread::sleep(Duration::from_secs(1));
    let none = json!({ "max-bandwidth": 0, "downtime-limit": 50 });
    monitor.ask("migrate-set-parameters", &none)?;
    monitor.ask("migrate", &json!({ "uri": way }))?;
    loop {
        let status = monitor.ask("query-migrate", &json!({}))?;
        match status["status"].as_str() {
            Some("completed") => {
                return Ok((number(&status, "downtime")?, number(&status, "total-time")?));
            }
            Some("failed" | "cancelled") => bail!("QEMU's migration: {status}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Has a guest fill so many MiB with random bytes, in memory.
fn fill(guest: &Client, mib: u64) -> Result<()> {
    let fill = format!(
        "mkdir -p /fill && mount -t tmpfs -o size=90% fill /fill && \
         dd if=/dev/urandom of=/fill/x bs=1M count={mib} 2>/dev/null"
    );
    guest.sh(fill).timeout(load::LIMIT).text()?;
    Ok(())
}

/// Guests that use as much of more memory.
fn large(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("guests of 1 and of 8 GiB that use 300 MiB");
    let host = native_with("bench", programs)?.open()?;
    let mut totals = Vec::new();
    for memory in ["1G", "8G"] {
        let vm = Vm::pv(&host, "here", "", &format!("--memory {memory}"))?;
        fill(&vm.guest()?, 220)?;
        let reports = back_and_forth(&host, "", RUNS)?;
        let total = |report: &Value| Ok(number(report, "total_us")? / 1e3);
        totals.push(reports.iter().map(total).collect::<Result<Vec<_>>>()?);
        host.sh("blanket rm --force here").text()?;
    }
    step.done("");
    let row = Row::new("idle guest of 8 GiB that uses 300 MiB", "ms", &totals[1]);
    Ok(row
        .map(|row| row.against("1 GiB", &totals[0]))
        .into_iter()
        .collect())
}

/// A guest that writes to its memory at half the rate that the link has.
fn busy(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("a guest that writes at half the link's rate");
    let host = native_with("bench", programs)?.open()?;
    let vm = Vm::pv(&host, "here", "", "--memory 512M --cpus 2")?;
    let guest = vm.guest()?;
    fill(&guest, 160)?;
    // 10 MiB ten times a second, all over.
    let write = "i=0; while :; do dd if=/fill/x of=/fill/y bs=1M count=10 seek=$((i % 16 * 10)) \
                 conv=notrunc 2>/dev/null; i=$((i + 1)); sleep 0.1; done";
    guest.sh(write).spawn("/run/write.log")?;
    std::thread::sleep(Duration::from_secs(3));
    drop(guest);
    let flags = format!("--bandwidth 200M --downtime {TARGET_MS}");
    let reports = back_and_forth(&host, &flags, BUSY_RUNS)?;
    let pauses: Vec<f64> = reports.iter().map(downtime).collect::<Result<_>>()?;
    let rate = |report: &Value| Ok(number(report, "dirty_rate")? / MIB);
    let rates: Vec<f64> = reports.iter().map(rate).collect::<Result<_>>()?;
    let within = pauses.iter().filter(|ms| **ms <= TARGET_MS as f64).count();
    host.sh("blanket rm --force here").text()?;
    step.done(&format!("{within} of {BUSY_RUNS} within {TARGET_MS} ms"));
    let share = within as f64 / BUSY_RUNS as f64;
    let target = [TARGET_MS as f64; BUSY_RUNS];
    let rows = [
        Row::new(
            "guest that writes, 200 MiB/s link: it writes",
            "MiB/s",
            &rates,
        ),
        Row::new("guest that writes: it stands still", "ms", &pauses)
            .map(|row| row.against("its target", &target)),
        Row::new(
            "guest that writes: share within the target",
            "",
            &[share; BUSY_RUNS],
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}

/// Peers of what goes from node to node.
const LINK: &str = "iperf3, 2 streams, not encrypted";
const COPY: &str = "iperf3 from file to file";

/// How fast a file becomes one on the other node, in Gb/s.
fn file(host: &Client) -> Result<f64> {
    host.sh("rm -f /srv/copy; ip netns exec n2 iperf3 -s -1 -D -p 5202 -F /srv/copy")
        .text()?;
    load::iperf(
        host,
        "ip netns exec n1 iperf3",
        "10.7.0.2",
        "-p 5202 -F /srv/file",
    )
}

/// Memory and a disk from node to node, over a veth pair each and a bridge.
fn between_nodes(programs: &Path, progress: &Progress) -> Result<Vec<Row>> {
    let step = progress.step("two nodes of a cluster");
    let host = native_with("bench", programs)?
        .inject(programs.join("blanketd"), "/usr/bin/blanketd")
        .open()?;
    host.sh(Member::NETWORK).text()?;
    let nodes = [(1, "h1"), (2, "h2")].map(|(n, home)| Member::new(&host, n, home));
    nodes.iter().for_each(Member::start);
    let [a, b] = &nodes;
    a.says("ca init --name a");
    b.says(&format!("{} --name b", a.lets_join()));
    host.sh("ip netns exec n2 iperf3 -s -D").text()?;
    let link = || load::iperf(&host, "ip netns exec n1 iperf3", "10.7.0.2", "-P 2");
    step.done("");
    let step = progress.step(&format!("a guest with {FILLED} MiB of random bytes moves"));
    a.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --cmdline 'console=hvc0 quiet loglevel=1 panic=-1' --memory 4G",
    );
    fill(&a.vm("web").guest()?, FILLED)?;
    let (mut raw, mut plain, mut tls) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let moved = |from: &Member, to: &str, flags: &str| -> Result<f64> {
            let report = from.json(&format!("migrate web {to} --json {flags}"));
            Ok(number(&report, "bytes")? * 8.0 / number(&report, "total_us")? / 1e3)
        };
        let (here, there) = (moved(a, "b", "--plain")?, moved(b, "a", "")?);
        // The first one warms up. One follows the other at once: memory that
        // nobody has used for a while comes slowly where this machine is a guest.
        if run > 0 {
            plain.push(here);
            tls.push(there);
        }
    }
    for _ in 0..RUNS {
        raw.push(link()?);
    }
    a.says("rm --force web");
    step.done("");
    let step = progress.step(&format!("a guest with a disk of {DISK} MiB moves"));
    // Both on the file system itself that this machine has.
    let disk = format!(
        "mkdir -p /srv/disks /var/lib/blanket/disks && \
         mount --bind /srv/disks /var/lib/blanket/disks && \
         dd if=/dev/urandom of=/srv/disk bs=1M count={DISK} 2>/dev/null && cp /srv/disk /srv/file"
    );
    host.sh(disk).timeout(load::LIMIT).text()?;
    let (mut disks, mut files) = (Vec::new(), Vec::new());
    a.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --cmdline 'console=hvc0 quiet loglevel=1 panic=-1' --memory 128M --disk /srv/disk",
    );
    drop(a.vm("web").guest()?);
    for run in 0..=RUNS {
        let (from, to) = if run % 2 == 0 { (a, "b") } else { (b, "a") };
        let report = from.json(&format!("migrate web {to} --json --plain"));
        let rounds = report["rounds"].as_array().context("no rounds")?;
        let of_disk = rounds.iter().filter(|round| round["pages"] == 0);
        let (mut bytes, mut us) = (0.0, 0.0);
        for round in of_disk {
            bytes += number(round, "bytes")?;
            us += number(round, "us")?;
        }
        let file = file(&host)?;
        if run > 0 {
            disks.push(bytes * 8.0 / us / 1e3);
            files.push(file);
        }
    }
    let last = if RUNS.is_multiple_of(2) { b } else { a };
    last.says("rm --force web");
    host.sh("pkill -x iperf3").text()?;
    step.done("");
    let row = |title, ours: &[f64], peer, its: &[f64]| {
        let row = Row::new(title, "Gb/s", ours);
        row.map(|row| row.against(peer, its))
    };
    let rows = [
        row(
            "memory from node to node, not encrypted",
            &plain,
            LINK,
            &raw,
        ),
        row("memory from node to node, TLS", &tls, LINK, &raw),
        row(
            "a disk from node to node, not encrypted",
            &disks,
            COPY,
            &files,
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}
