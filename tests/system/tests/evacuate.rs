//! Guests are saved when the provider takes their node away, and go on elsewhere; and what they
//! know of the time in which they did not run.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::{Duration, Instant};

use blanket_system_tests::{Vm, native, natively, on_node, provider};
use blanket_testbed::{Behavior, Client, Event, NodeBuilder, Provider};

/// Linux counts hundredths of a second.
const TICKS_PER_SECOND: u64 = 100;

/// How long the testbed's machine has until it is taken away.
const NOTICE: i64 = 150;

fn node() -> NodeBuilder {
    provider("spot")
        .unwrap()
        .cpus(1)
        .provider(Provider::Ec2Nitro)
}

/// Waits until the log of the watcher has a text.
fn logs(node: &Client, text: &str) {
    let wait = format!("until grep -q '{text}' /run/watch.log; do sleep 0.2; done");
    let waited = node.sh(wait).timeout(Duration::from_secs(150)).text();
    let log = || node.sh("cat /run/watch.log").text().unwrap();
    assert!(waited.is_ok(), "no '{text}' in\n{}", log());
}

/// Starts the watcher; returns its pid.
fn watch(node: &Client) -> u32 {
    node.sh("rm -f /run/watch.log").text().unwrap();
    // The agent's own shell gives way to it.
    let pid = node
        .sh("exec blanket evacuate --watch --to /volume")
        .spawn("/run/watch.log")
        .unwrap();
    logs(node, "watching for notices of ec2");
    pid
}

/// The watcher ends cleanly when it is asked to.
fn ends(node: &Client, pid: u32) {
    let end = format!(
        "kill -TERM {pid}; for i in $(seq 300); do [ -e /proc/{pid}/exe ] || exit 0; sleep 0.1; \
         done; exit 1"
    );
    node.sh(end)
        .timeout(Duration::from_secs(60))
        .text()
        .unwrap();
}

fn seconds(of: &Client, script: &str) -> i64 {
    of.sh(script).text().unwrap().trim().parse().unwrap()
}

/// What a guest remembers: its boot and the content of its memory.
fn remembers(guest: &Client) -> String {
    let what = "cat /proc/sys/kernel/random/boot_id; sha256sum /run/x";
    guest.sh(what).text().unwrap()
}

#[test]
fn a_guest_is_saved_before_its_spot_machine_is_taken_away_and_goes_on_with_its_memory() {
    on_node(node, |node| {
        let vm = Vm::linux(node, "web", "", "--machine hvm --memory 192M").unwrap();
        let guest = vm.guest().unwrap();
        let fill = "head -c 20000000 /dev/urandom > /run/x";
        guest.sh(fill).text().unwrap();
        let known = remembers(&guest);
        let pid = watch(node);
        let service = node.metadata().unwrap();
        for behavior in [Behavior::Hangs, Behavior::Garbage] {
            service.behave(behavior);
            logs(node, "Amazon EC2.s notices: ");
            node.sh(": > /run/watch.log").text().unwrap();
            service.behave(Behavior::Answers);
            logs(node, "the provider answers again");
        }
        // The node's clock, which need not be this machine's.
        let end = seconds(node, "date +%s") + NOTICE;
        let at = node.sh(format!("date -u -d @{end} +%Y-%m-%dT%H:%M:%SZ"));
        service.announce_at(Event::Preemption, at.text().unwrap().trim());
        logs(node, "web: saved to /volume");
        drop(guest);
        let written = seconds(node, "stat -c %Y /volume/web.json");
        assert!(written < end, "{written}, too late for {end}");
        assert_eq!(node.sh("blanket ps --json").text().unwrap().trim(), "[]");
        ends(node, pid);
        let mode = node
            .sh("stat -c %a /volume /volume/web.snapshot")
            .text()
            .unwrap();
        assert_eq!(mode, "700\n600\n", "who reads it reads the guest's secrets");

        let back = node
            .sh("blanket restore --evacuated /volume")
            .text()
            .unwrap();
        assert_eq!(back, "web\n");
        assert_eq!(node.sh("ls /volume").text().unwrap(), "");
        let guest = vm.guest().unwrap();
        assert_eq!(remembers(&guest), known);
        // The same notice is told still: whoever has brought the guest back wants it to run.
        let pid = watch(node);
        logs(node, "notice: terminate not before");
        std::thread::sleep(Duration::from_secs(8));
        assert_eq!(remembers(&guest), known);
        ends(node, pid);
    });
}

#[test]
fn a_guest_that_cannot_be_saved_is_named_and_the_others_are_saved() {
    natively(
        || native("evacuate").unwrap(),
        |host| {
            let flags = "--memory 192M --on-reboot exit";
            let vms = ["one", "two"].map(|name| Vm::pv(host, name, "", flags).unwrap());
            let guests = vms.each_ref().map(|vm| vm.guest().unwrap());
            for guest in &guests {
                let fill = "head -c 3000000 /dev/urandom > /run/x";
                guest.sh(fill).text().unwrap();
            }
            let known = guests.each_ref().map(remembers);
            // There is room for one of them.
            let size = "blanket pause two && blanket snapshot two /tmp/two >/dev/null && blanket resume two && \
                        echo $(($(stat -c %b /tmp/two) * 512)) && rm /tmp/two";
            let room = seconds(host, size) * 3 / 2;
            let mount = format!("mkdir /volume && mount -t tmpfs -o size={room} none /volume");
            host.sh(mount).text().unwrap();
            let saved = host.sh("blanket evacuate --to /volume").run().unwrap();
            let told = String::from_utf8_lossy(&saved.stderr);
            assert!(!saved.status.success(), "{told}");
            assert!(told.contains("one: saved to /volume"), "{told}");
            assert!(
                told.contains("two: not saved: ") && told.contains("No space"),
                "{told}"
            );
            assert_eq!(
                host.sh("ls /volume").text().unwrap(),
                "one.json\none.snapshot\n"
            );
            // The other one runs on, and is saved once there is room; at once there is no time.
            assert_eq!(remembers(&guests[1]), known[1]);
            host.sh("mount -o remount,size=2G /volume").text().unwrap();
            let saved = host.sh("blanket pause two && blanket evacuate --to /volume");
            let saved = saved.run().unwrap();
            assert!(saved.status.success(), "{saved}");
            drop(guests);
            let back = host
                .sh("blanket restore --evacuated /volume")
                .text()
                .unwrap();
            assert_eq!(back, "one\ntwo\n");
            // It was paused, and is.
            assert_eq!(vms[1].info().unwrap()["state"], "paused");
            assert!(vms[1].blanket("resume", "").unwrap().status.success());
            let guests = vms.each_ref().map(|vm| vm.guest().unwrap());
            assert_eq!(guests.each_ref().map(remembers), known);
            assert_eq!(host.sh("ls /volume").text().unwrap(), "");
            without_time_they_shut_down(host, &vms);
        },
    );
}

fn without_time_they_shut_down(host: &Client, vms: &[Vm]) {
    let late = host.sh("blanket evacuate --to /volume --within 0").run();
    let told = String::from_utf8_lossy(&late.as_ref().unwrap().stderr);
    assert!(!late.as_ref().unwrap().status.success(), "{told}");
    assert!(told.contains("the time was over"), "{told}");
    for vm in vms {
        let ended = vm.ended().unwrap();
        assert!(ended.contains("powered off"), "{ended}");
    }
    assert_eq!(host.sh("ls /volume").text().unwrap(), "");
}

/// The guest's clocks, in seconds: CLOCK_MONOTONIC and the time of day.
fn clocks(guest: &Client) -> (f64, f64) {
    let script = "sed -n 's/^now at \\([0-9]*\\) nsecs$/\\1/p' /proc/timer_list; date +%s";
    let text = guest.sh(script).text().unwrap();
    let mut words = text
        .split_ascii_whitespace()
        .map(|word| word.parse::<f64>().unwrap());
    (words.next().unwrap() / 1e9, words.next().unwrap())
}

/// A pause of `PAUSE` is no time for the guest, however it is made.
fn knows_no_pause(guest: &Client, pause: impl FnOnce()) {
    let (before, start) = (clocks(guest).0, Instant::now());
    pause();
    let passed = clocks(guest).0 - before;
    let outside = start.elapsed().as_secs_f64();
    assert!(passed >= 0.0, "the clock went back by {passed} s");
    assert!(
        passed < outside - 0.8 * PAUSE.as_secs_f64(),
        "{passed} s of {outside} s"
    );
}

const PAUSE: Duration = Duration::from_secs(10);

/// A guest that is paused, and one that is saved and goes on, have a steady clock.
fn has_a_steady_clock(node: &Client, vm: &Vm, guest: Client, save: &str) {
    knows_no_pause(&guest, || {
        assert!(vm.blanket("pause", "").unwrap().status.success());
        std::thread::sleep(PAUSE);
        assert!(vm.blanket("resume", "").unwrap().status.success());
    });
    let before = clocks(&guest).0;
    let late = lateness(node, &guest);
    drop(guest);
    let start = Instant::now();
    let saved = vm.blanket("snapshot", &format!("/run/snapshot --stop {save}"));
    assert!(saved.as_ref().unwrap().status.success(), "{saved:?}");
    vm.ended().unwrap();
    std::thread::sleep(PAUSE);
    let back = "blanket rm clock && blanket restore /run/snapshot";
    node.sh(back).text().unwrap();
    let guest = vm.guest().unwrap();
    let passed = clocks(&guest).0 - before;
    let outside = start.elapsed().as_secs_f64();
    assert!(
        (0.0..outside - 0.8 * PAUSE.as_secs_f64()).contains(&passed),
        "{passed} s of {outside} s"
    );
    // A guest that suspends itself has lost nothing of its time of day, another one all of it.
    let lost = (lateness(node, &guest) - late).abs();
    let much = PAUSE.as_secs_f64() / 2.0;
    assert_eq!(lost < much, save.contains("--suspend"), "{lost} s");
}

/// By how many seconds the guest's time of day is behind the node's.
fn lateness(node: &Client, guest: &Client) -> f64 {
    let day = clocks(guest).1;
    seconds(node, "date +%s") as f64 - day
}

#[test]
fn a_guest_of_the_pv_machine_has_a_steady_clock_and_the_right_time_of_day_natively() {
    natively(
        || native("clock").unwrap(),
        |host| {
            let vm = Vm::pv(host, "clock", "", "--memory 192M --on-reboot exit").unwrap();
            let guest = vm.guest().unwrap();
            has_a_steady_clock(host, &vm, guest, "--suspend");
        },
    );
}

/// Busy and stolen ticks of the guest's first processor.
fn ticks(guest: &Client) -> (u64, u64) {
    let text = guest.sh("head -1 /proc/stat").text().unwrap();
    let all = text.split_ascii_whitespace().skip(1);
    let all: Vec<u64> = all.map(|word| word.parse().unwrap()).collect();
    (all[0] + all[1] + all[2], all[7])
}

#[test]
fn a_guest_of_the_hvm_machine_has_a_steady_clock_and_sees_what_is_stolen_from_it() {
    on_node(node, |node| {
        let vm = Vm::linux(node, "clock", "", "--machine hvm --memory 192M").unwrap();
        let guest = vm.guest().unwrap();
        // Another one wants the node's only processor.
        node.sh("timeout 10 sh -c 'while :; do :; done' || true")
            .spawn("/run/compete.log")
            .unwrap();
        let before = ticks(&guest);
        guest
            .sh("timeout 5 sh -c 'while :; do :; done' || true")
            .text()
            .unwrap();
        let now = ticks(&guest);
        let (busy, stolen) = (now.0 - before.0, now.1 - before.1);
        assert!(stolen > TICKS_PER_SECOND, "{stolen} stolen, {busy} busy");
        node.sh("sleep 10").text().unwrap();
        has_a_steady_clock(node, &vm, guest, "");
    });
}
