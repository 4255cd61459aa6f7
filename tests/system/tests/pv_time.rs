//! What a guest in the `pv` machine is given of this machine's processors and memory, and what it
//! knows of that: steal time, and `blanket set`.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

use blanket_system_tests::{Vm, native, natively};
use blanket_testbed::{Client, Host};

/// Linux counts hundredths of a second.
const TICKS_PER_SECOND: u64 = 100;

/// The guest's own account: busy, idle and stolen ticks.
#[derive(Clone, Copy, Debug)]
struct Stat {
    busy: u64,
    idle: u64,
    stolen: u64,
}

impl Stat {
    fn read(guest: &Client) -> Self {
        let text = guest.sh("head -1 /proc/stat").text().unwrap();
        let all: Vec<u64> = text
            .split_ascii_whitespace()
            .skip(1)
            .map(|word| word.parse().unwrap())
            .collect();
        Self {
            busy: all[0] + all[1] + all[2],
            idle: all[3] + all[4],
            stolen: all[7],
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            busy: self.busy - before.busy,
            idle: self.idle - before.idle,
            stolen: self.stolen - before.stolen,
        }
    }
}

/// The thread of the VM's only vCPU, in this machine's `/proc`.
fn vcpu(host: &Host, vm: &Vm) -> String {
    let pid = vm.info().unwrap()["pid"].as_u64().unwrap();
    let find =
        format!("for t in /proc/{pid}/task/*; do grep -q vcpu0 $t/comm && echo $t; done; true");
    host.sh(find).text().unwrap().trim().to_owned()
}

/// For how long a thread has waited for a processor, in nanoseconds.
fn waited(host: &Host, thread: &str) -> u64 {
    let text = host.sh(format!("cat {thread}/schedstat")).text().unwrap();
    let second = text.split_ascii_whitespace().nth(1);
    second.unwrap().parse().unwrap()
}

/// Keeps the first processor busy for some seconds.
fn compete(host: &Host, seconds: u32) {
    let busy = "sh -c 'while :; do :; done'";
    host.sh(format!("taskset 1 timeout {seconds} {busy} || true"))
        .spawn("/run/compete.log")
        .unwrap();
}

#[test]
fn a_guest_sees_the_time_that_others_have_had_its_processor_and_no_other_as_stolen() {
    natively(
        || native("steal").unwrap(),
        |host| {
            let vm = Vm::pv(host, "steal", "", "--memory 256M --on-reboot exit").unwrap();
            let guest = vm.guest().unwrap();
            let thread = vcpu(host, &vm);
            let tid = thread.rsplit('/').next().unwrap();
            host.sh(format!("taskset -p 1 {tid}")).text().unwrap();
            is_stolen_from(host, &guest, &thread);
            sleeps(host, &guest);
            is_paused(&vm, &guest);
            // Nothing is left out, and nothing is there twice.
            let vcpu = vm.info().unwrap()["metrics"]["vcpus"][0].clone();
            let times = ["running_ns", "stolen_ns", "blocked_ns", "offline_ns"];
            let sum: u64 = times.iter().map(|name| vcpu[name].as_u64().unwrap()).sum();
            let uptime = guest.sh("cut -d ' ' -f 1 /proc/uptime").text().unwrap();
            let uptime = uptime.trim().parse::<f64>().unwrap() * 1e9;
            let ratio = sum as f64 / uptime;
            assert!((0.8..1.2).contains(&ratio), "{ratio} {vcpu}");
        },
    );
}

/// Two want one processor: what the guest sees as stolen is what its thread waited.
fn is_stolen_from(host: &Host, guest: &Client, thread: &str) {
    compete(host, 6);
    let (before, waits) = (Stat::read(guest), waited(host, thread));
    guest
        .sh("timeout 4 sh -c 'while :; do :; done' || true")
        .text()
        .unwrap();
    let waits = (waited(host, thread) - waits) * TICKS_PER_SECOND / 1_000_000_000;
    let had = Stat::read(guest).since(before);
    assert!(waits > TICKS_PER_SECOND, "the competitor did not compete");
    let ratio = had.stolen as f64 / waits as f64;
    assert!((0.85..1.15).contains(&ratio), "{had:?}, waited {waits}");
    assert!(had.busy > had.idle, "{had:?}");
    host.sh("sleep 3").text().unwrap();
}

/// One wants it, and the guest does not.
fn sleeps(host: &Host, guest: &Client) {
    compete(host, 5);
    let before = Stat::read(guest);
    guest.sh("sleep 3").text().unwrap();
    let had = Stat::read(guest).since(before);
    assert!(had.idle > 10 * had.stolen, "{had:?}");
    host.sh("sleep 2").text().unwrap();
}

/// A guest that wants to run and is paused loses no time: it knows of none.
fn is_paused(vm: &Vm, guest: &Client) {
    guest
        .sh("timeout 4 sh -c 'while :; do :; done' || true")
        .spawn("/run/busy.log")
        .unwrap();
    let before = Stat::read(guest);
    assert!(vm.blanket("pause", "").unwrap().status.success());
    std::thread::sleep(Duration::from_secs(3));
    assert!(vm.blanket("resume", "").unwrap().status.success());
    let had = Stat::read(guest).since(before);
    assert!(had.stolen < TICKS_PER_SECOND, "{had:?}");
    assert!(had.busy + had.idle < 2 * TICKS_PER_SECOND, "{had:?}");
}

#[test]
fn a_guest_takes_and_gives_back_memory_and_processors_as_it_is_set() {
    natively(
        || native("set").unwrap(),
        |host| {
            let vm = Vm::pv(host, "set", "", "--memory 512M --cpus 2 --on-reboot exit").unwrap();
            let guest = vm.guest().unwrap();
            let waits = |what: &str| {
                let wait = format!("until {what}; do sleep 0.1; done");
                let waited = guest.sh(wait).timeout(Duration::from_secs(60)).text();
                assert!(waited.is_ok(), "{what}: {waited:?}");
            };
            let set = |flags: &str| {
                let output = vm.blanket("set", flags).unwrap();
                assert!(output.status.success(), "{flags}: {output}");
            };
            memory_follows(&vm, &guest, waits, set);
            processors_follow(&guest, waits, set);
            assert_eq!(vm.info().unwrap()["vm"]["target"]["cpus"], 2);
            for wrong in ["--memory 1G", "--memory 1M", "--cpus 3", "--cpus 0"] {
                let output = vm.blanket("set", wrong).unwrap();
                assert!(!output.status.success(), "{wrong}");
                assert!(!output.stderr.is_empty(), "{wrong}: no reason");
            }
            assert_eq!(vm.info().unwrap()["vm"]["target"]["cpus"], 2, "as it was");
            let log = guest.sh("dmesg").text().unwrap();
            assert!(!log.contains("Call Trace"), "{log}");
        },
    );
}

fn memory_follows(vm: &Vm, guest: &Client, waits: impl Fn(&str), set: impl Fn(&str)) {
    const BALLOON: &str = "/sys/devices/system/xen_memory/xen_memory0";
    // Every page has been touched, so that there is something to give back.
    let fill = "dd if=/dev/zero of=/run/fill bs=1M count=200 2>/dev/null; rm /run/fill";
    guest.sh(fill).text().unwrap();
    let resident = || {
        let info = vm.info().unwrap();
        info["metrics"]["memory"]["guest_resident"]
            .as_u64()
            .unwrap()
    };
    let before = resident();
    set("--memory 256M");
    waits(&format!(
        "[ $(cat {BALLOON}/info/current_kb) -le {} ]",
        256 << 10
    ));
    let after = resident();
    assert!(after + (100 << 20) < before, "{before} -> {after} bytes");
    assert_eq!(vm.info().unwrap()["vm"]["target"]["memory"], "256M");
    set("--memory 512M");
    waits(&format!(
        "[ $(cat {BALLOON}/info/current_kb) -ge {} ]",
        500 << 10
    ));
    guest.sh(fill).text().unwrap();
}

fn processors_follow(guest: &Client, waits: impl Fn(&str), set: impl Fn(&str)) {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    set("--cpus 1");
    waits("[ $(cat /sys/devices/system/cpu/online) = 0 ]");
    assert_eq!(guest.command("nproc").text().unwrap(), "1\n");
    set("--cpus 2");
    // Elsewhere udev does this.
    waits(&format!("echo 1 > {ONLINE}"));
    waits("[ $(cat /sys/devices/system/cpu/online) = 0-1 ]");
    let there = guest.sh("taskset 2 sh -c 'cat /proc/self/stat' | cut -d ' ' -f 39");
    assert_eq!(there.text().unwrap(), "1\n");
}
