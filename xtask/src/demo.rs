//! `cargo xtask demo`: the main job from end to end, on real input.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use blanket_system_tests::{Clouds, Vm, native_with, provider_with};
use blanket_testbed::{Client, GUEST_PAGE, GuestImages, Host};

use crate::build;
use crate::progress::{Progress, Step};
use crate::setup;
use crate::workspace::Workspace;

/// What the guest is told, and where it is reached.
const GUEST_ADDRESS: &str = "10.9.0.2";
const CMDLINE: &str = "root=LABEL=guest blanket.ip=10.9.0.2/24 systemd.show_status=0";
const FLAGS: &str = "--memory 512M --cpus 2 --disk /payload/guest/disk.raw \
                     --net tap,host_ip=10.9.0.1/24";

/// Runs a stock Debian in Blanket on an emulated provider's machine, and, where
/// this machine's own KVM can be used, the same disk on this machine itself; and
/// moves it from one provider to another while a client talks to it.
///
/// # Errors
/// A step fails; the message says which and why.
pub fn run(workspace: &Workspace, progress: &Progress) -> Result<ExitCode> {
    println!(
        "Blanket's main job: on a cloud machine, which is emulated here, `blanket` runs a stock\n\
         Debian with disk and network; then the same on this machine itself, if it has KVM; then\n\
         it moves from one cloud to another, live, on a network that spans both. The first time, packages are fetched and\n\
         images built."
    );
    setup::run(progress)?;
    let step = progress.step("build Blanket");
    build::programs(workspace, &step, build::TESTING)?;
    step.done("");
    let step = progress.step("images of the cloud machine and its guest, from Debian's packages");
    let images = GuestImages::get()?;
    step.done("");
    let programs = workspace.programs(build::TESTING);
    on_a_node(&programs, progress)?;
    let natively = match Host::obstacle() {
        None => {
            on_this_machine(&programs, &images, progress)?;
            "The same disk booted on this machine itself, in a pv machine.\n"
        }
        Some(obstacle) => {
            progress.step("the same on this machine").skipped(&obstacle);
            ""
        }
    };
    between_clouds(&programs, progress)?;
    println!(
        "\nShown: a stock Debian kernel and system booted under Blanket, in a machine that Blanket\n\
         rents; its web server answered, its disk kept what was written, and it shut down cleanly.\n\
         {natively}It moved from one cloud to another, disk and all, while a client read its pages,\n\
         pinged it a hundred times a second and had a TCP stream to it, which has lived on.\n\
         `cargo xtask test` passes the tests; docs/cli.md has the commands."
    );
    Ok(ExitCode::SUCCESS)
}

/// In hardware virtualization, which the provider's machine has.
fn on_a_node(programs: &Path, progress: &Progress) -> Result<()> {
    let step = progress.step("a provider's machine boots");
    let node = provider_with("cloud", programs)?.boot()?;
    step.done(&doctor(&node, "KVM")?);
    let step = progress.step("blanket run web: a stock Debian guest");
    let vm = Vm::linux(&node, "web", CMDLINE, FLAGS)?;
    scenario(progress, step, &node, &vm)?;
    let step = progress.step("the provider's machine ends");
    node.shutdown()?;
    step.done("");
    Ok(())
}

/// Without hardware virtualization, natively.
fn on_this_machine(programs: &Path, images: &GuestImages, progress: &Progress) -> Result<()> {
    let host = native_with("here", programs)?
        .inject(&images.disk, "/payload/guest/disk.raw")
        .open()?;
    let step = progress.step("this machine");
    step.done(&doctor(&host, "auto is")?);
    let step = progress.step("blanket run web --machine pv: the same disk and kernel");
    let vm = Vm::pv(&host, "web", CMDLINE, FLAGS)?;
    scenario(progress, step, &host, &vm)
}

/// From one provider to another, whose machine is another one in every respect.
fn between_clouds(programs: &Path, progress: &Progress) -> Result<()> {
    let step = progress.step("machines of two providers boot and become one cluster");
    let clouds = Clouds::boot(programs)?;
    step.done("virtio and SCSI in the one, Intel's card and NVMe in the other");
    let step = progress.step("blanket net create blue: a network across both, encrypted between");
    clouds.make_network()?;
    step.done("their switches have joined by themselves");
    let step = progress.step("blanket run web --net network=blue: a stock Debian on the first one");
    let vm = clouds.start_on_network()?;
    let guest = vm.guest()?;
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let id = guest.sh(boot_id).text()?;
    guest.sh("iperf3 -s -1 -D").text()?;
    drop(guest);
    step.done("");
    let step = progress.step("a client reads its pages, has a TCP stream to it, and pings it");
    let page = format!("curl -sS --fail -m 60 http://{}/", Clouds::ON_NETWORK);
    let client = &clouds.here;
    client
        .sh(format!(
            "until {page}; do sleep 1; done > /dev/null 2>&1; touch /run/reads; \
             while [ ! -e /run/stop ]; do {page} > /run/page && echo got || echo failed; done"
        ))
        .spawn("/run/pages.log")?;
    let reads = "until [ -e /run/reads ]; do sleep 0.1; done";
    client
        .sh(reads)
        .timeout(blanket_system_tests::GUEST_LIMIT)
        .text()?;
    client
        .sh(format!(
            "exec iperf3 -J -c {} -b 1M -l 16K -t 3600",
            Clouds::ON_NETWORK
        ))
        .spawn("/run/stream.log")?;
    clouds.begin_pings()?;
    step.done("a ping each ten milliseconds");
    let step = progress.step("blanket migrate web there: memory, disk and network go along");
    let (moved, report) = clouds.migrate("--downtime 2000 --plain")?;
    let guest = moved.guest()?;
    ensure!(
        guest.sh(boot_id).text()? == id,
        "the guest has been restarted"
    );
    step.done(&format!(
        "{:.0} MiB in {:.1} s; it stood still for {:.2} s",
        number(&report, "bytes")? / f64::from(1 << 20),
        number(&report, "total_us")? / 1e6,
        number(&report, "downtime_us")? / 1e6
    ));
    for part in report["pause"].as_array().context("no steps")? {
        let name = part["step"].as_str().unwrap_or_default();
        println!("  {:>9.1} ms  {name}", number(part, "us")? / 1e3);
    }
    let step = progress.step("what the client saw");
    let log = client
        .sh("sleep 3; touch /run/stop; cat /run/pages.log")
        .text()?;
    let pings = clouds.end_pings()?;
    let carried = stream(client)?;
    let pages = log.lines().filter(|line| *line == "got").count();
    ensure!(
        pages > 0 && !log.contains("failed"),
        "the client's log: {log}"
    );
    step.done(&format!("{pages} pages, none of them in vain"));
    // The last one may still be on its way.
    let lost = pings.lost.saturating_sub(1);
    println!(
        "  {} pings, {lost} lost, {} doubled; the longest gap was {:.0} ms",
        pings.sent, pings.doubled, pings.gap_ms
    );
    println!("  one TCP stream all the while, {carried:.1} MB");
    ensure!(
        lost == 0 && pings.doubled == 0,
        "pings were lost or doubled"
    );
    Ok(())
}

/// Ends the TCP stream, which has to live until then: the megabytes that it has carried.
fn stream(client: &Client) -> Result<f64> {
    let end = "kill -INT $(pidof iperf3); while pidof iperf3 > /dev/null; do sleep 0.5; done; \
               cat /run/stream.log";
    let said = client
        .sh(end)
        .timeout(blanket_system_tests::GUEST_LIMIT)
        .text()?;
    let report: serde_json::Value = serde_json::from_str(&said).context("no report of iperf3")?;
    let error = report["error"].as_str().unwrap_or_default();
    ensure!(
        error.starts_with("interrupt"),
        "the TCP stream has ended: {error}"
    );
    let seconds = report["intervals"].as_array().context("no intervals")?;
    let carried = |second: &serde_json::Value| second["sum"]["bytes"].as_f64();
    let last = seconds.iter().rev().nth(1).and_then(carried);
    ensure!(
        last > Some(0.0),
        "nothing comes through the TCP stream any more"
    );
    Ok(seconds.iter().filter_map(carried).sum::<f64>() / 1e6)
}

fn number(report: &serde_json::Value, field: &str) -> Result<f64> {
    let number = report[field].as_f64();
    number.with_context(|| format!("no {field} in {report}"))
}

/// From a VM that has just been started to its end.
fn scenario(progress: &Progress, starts: Step, node: &Client, vm: &Vm) -> Result<()> {
    let guest = vm.guest()?;
    let release = guest
        .sh(". /etc/os-release; echo $PRETTY_NAME, Linux $(uname -r)")
        .text()?;
    starts.done(release.trim());
    web(progress, node)?;
    disk(progress, &guest)?;
    show(node, vm)?;
    drop(guest);
    let step = progress.step("blanket stop web: the guest is asked to shut down");
    let stopped = vm.blanket("stop", "--timeout 180")?;
    ensure!(
        stopped.status.success(),
        "the guest does not stop: {stopped:?}"
    );
    let ended = vm.ended()?;
    ensure!(ended.contains("powered off"), "it ended otherwise: {ended}");
    step.done("it powered itself off");
    Ok(())
}

/// What the doctor says, in a line that contains `word`.
fn doctor(node: &Client, word: &str) -> Result<String> {
    let report = node.sh("blanket doctor").text()?;
    let line = report.lines().find(|line| line.contains(word));
    Ok(line.unwrap_or_default().trim().to_owned())
}

fn web(progress: &Progress, node: &Client) -> Result<()> {
    let step = progress.step("a page from the web server in the guest, over the tap");
    let page = node
        .sh(format!(
            "curl -sS --fail --retry 60 --retry-connrefused --retry-delay 1 http://{GUEST_ADDRESS}/"
        ))
        .timeout(blanket_system_tests::GUEST_LIMIT)
        .text()?;
    ensure!(
        page == GUEST_PAGE,
        "the guest's server has another page: {page}"
    );
    step.done(&format!("\"{}\"", page.trim()));
    Ok(())
}

fn disk(progress: &Progress, guest: &Client) -> Result<()> {
    let step = progress.step("16 MiB to the guest's disk and back");
    let text = guest
        .sh(
            "dd if=/dev/urandom of=/var/tmp/data bs=1M count=16 conv=fsync 2>/dev/null; \
             sha256sum < /var/tmp/data; echo 3 > /proc/sys/vm/drop_caches; \
             sha256sum < /var/tmp/data",
        )
        .text()?;
    let sums: Vec<_> = text.lines().collect();
    ensure!(
        sums.len() == 2 && sums[0] == sums[1],
        "the disk gives back something else: {text}"
    );
    step.done(&format!(
        "sha256 {}...",
        sums[0].get(..16).unwrap_or_default()
    ));
    Ok(())
}

/// The list of VMs and how this one came up.
fn show(node: &Client, vm: &Vm) -> Result<()> {
    println!("\n$ blanket ps\n{}", node.sh("blanket ps").text()?);
    let info = vm.info()?;
    println!("boot timeline of web, in ms since the monitor's start:");
    let boot = info["vm"]["boot"].as_array().context("no timeline")?;
    for phase in boot {
        let at = phase["at_us"].as_f64().unwrap_or_default() / 1000.0;
        println!(
            "  {at:>9.1}  {}",
            phase["phase"].as_str().unwrap_or_default()
        );
    }
    let log = vm.blanket("logs", "")?.stdout;
    let log = String::from_utf8_lossy(&log);
    if let Some(line) = log.lines().find(|line| line.contains("guest: init")) {
        println!("  {:>9}  {}", "", line.trim());
    }
    println!();
    Ok(())
}
