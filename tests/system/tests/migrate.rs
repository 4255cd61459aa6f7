//! Running guests move from monitor to monitor.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "migrate/between_nodes.rs"]
mod between_nodes;
#[path = "migrate/paused.rs"]
mod paused;

use std::time::{Duration, Instant};

use blanket_system_tests::{
    Clouds, Member, Vm, blanket, native, natively, on_node, program, provider,
};
use blanket_testbed::{Client, GUEST_PAGE, Host, HostBuilder};
use serde_json::{Value, json};

/// A guest is not slower than this.
const LONG: Duration = Duration::from_secs(200);

/// How often the guest moves.
const MOVES: u32 = 8;

/// Keeps memory, the disk at `disk`, registers and clocks at work, and compares what it wrote.
fn begins_load(guest: &Client, disk: &str) {
    let write = format!(
        "n=0; while [ ! -e /run/stop ]; do n=$((n + 1)); at=$((n % 8)); \
         seq $n $((n + 200000)) | head -c 1048576 > /run/x; \
         dd if=/run/x of={disk} bs=1M seek=$at conv=fsync,notrunc || exit 1; \
         echo 3 > /proc/sys/vm/drop_caches; \
         dd if={disk} bs=1M skip=$at count=1 | cmp - /run/x || exit 1; \
         echo $n > /run/round && mv /run/round /run/rounds; done; touch /run/stopped-disk"
    );
    let memory = "seq 1 2000000 > /run/m; want=$(sha256sum < /run/m); \
                  while [ ! -e /run/stop ]; do cp /run/m /run/copy; \
                  [ \"$(sha256sum < /run/copy)\" = \"$want\" ] || exit 1; rm /run/copy; done; \
                  touch /run/stopped-memory";
    let clock = "until [ -e /run/stop ]; do guest-check clock 1 || exit 1; done; \
                 touch /run/stopped-clock";
    let registers = "until [ -e /run/stop ]; do guest-check hold 2 || exit 1; done; \
                     touch /run/stopped-registers";
    for (command, log) in [
        (write.as_str(), "/run/disk.log"),
        (memory, "/run/memory.log"),
        (clock, "/run/clock.log"),
        (registers, "/run/registers.log"),
    ] {
        guest.sh(command).spawn(log).unwrap();
    }
}

/// The load does another round.
fn goes_on(guest: &Client) {
    let rounds = || -> u32 {
        let rounds = guest.sh("cat /run/rounds 2>/dev/null || echo 0");
        rounds.text().unwrap().trim().parse().unwrap()
    };
    let (goal, deadline) = (rounds() + 1, Instant::now() + LONG);
    while rounds() < goal {
        let log = || guest.sh("tail /run/*.log").text().unwrap();
        assert!(Instant::now() < deadline, "{}", log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Nothing was lost or changed, and the kernel has nothing to complain about.
fn ends_load(guest: &Client) {
    let end = "touch /run/stop; for i in $(seq 600); do \
               [ $(ls /run/stopped-* 2>/dev/null | wc -l) = 4 ] && exit 0; sleep 0.1; done; \
               ls /run; tail /run/*.log; exit 1";
    let ended = guest.sh(end).timeout(LONG).run().unwrap();
    assert!(ended.status.success(), "{ended}");
    let log = guest.sh("dmesg").text().unwrap();
    for complaint in ["BUG:", "Oops", "WARNING: CPU", "Call Trace", "soft lockup"] {
        assert!(!log.contains(complaint), "{complaint} in\n{log}");
    }
}

/// What every report says.
fn is_sound(report: &Value) {
    assert_eq!(report["phase"], "moved", "{report}");
    let us = |what: &str| report[what].as_u64().unwrap();
    assert!(
        0 < us("downtime_us") && us("downtime_us") <= us("total_us"),
        "{report}"
    );
    let steps = report["pause"].as_array().unwrap().iter();
    let steps: u64 = steps.map(|step| step["us"].as_u64().unwrap()).sum();
    assert!(steps <= us("downtime_us"), "{report}");
}

/// `ring` if KVM has them here.
fn by_rings(host: &Client) -> &'static str {
    let found = host.sh("blanket doctor --json").text().unwrap();
    let found: Value = serde_json::from_str(&found).unwrap();
    let mut checks = found["checks"].as_array().unwrap().iter();
    let pages = checks.find(|check| check["name"] == "dirty pages").unwrap();
    match pages["facts"]["dirty"].as_str() {
        Some("ring") => "ring",
        _ => "log",
    }
}

fn pv<'a>(node: &'a Client, name: &str) -> Vm<'a> {
    node.sh("truncate -s 64M /var/tmp/disk").text().unwrap();
    let flags = "--cpus 2 --memory 384M --disk /var/tmp/disk --net tap,host_ip=10.9.0.1/24";
    Vm::pv(node, name, "blanket.ip=10.9.0.2/24", flags).unwrap()
}

#[test]
fn a_guest_under_load_moves_back_and_forth_and_loses_nothing() {
    moves_back_and_forth(MOVES);
}

#[test]
#[ignore = "it takes long"]
fn a_guest_under_load_moves_a_hundred_times_and_loses_nothing() {
    moves_back_and_forth(100);
}

fn moves_back_and_forth(moves: u32) {
    natively(
        || native("migrate").unwrap(),
        |host| {
            let rings = by_rings(host);
            let mut vm = pv(host, "here");
            let mut guest = vm.guest().unwrap();
            let id = guest
                .sh("cat /proc/sys/kernel/random/boot_id")
                .text()
                .unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            host.sh("exec ping -i 0.02 10.9.0.2")
                .spawn("/run/ping.log")
                .unwrap();
            for n in 0..moves {
                // Each learns in another way what its guest writes.
                let (new, way) = match n % 2 {
                    0 => ("there", "log"),
                    _ => ("here", rings),
                };
                // A lost write of anybody's shows at once.
                let flags = format!("--verify --downtime 500 --dirty {way}");
                let (moved, report) = vm.migrate(new, &flags).unwrap();
                is_sound(&report);
                assert_eq!(report["dirty_by"], if n % 2 == 0 { rings } else { "log" });
                println!("{report}");
                drop(guest);
                vm = moved;
                guest = vm.guest().unwrap();
                assert_eq!(vm.info().unwrap()["state"], "running");
                if n % 5 == 0 {
                    goes_on(&guest);
                }
            }
            goes_on(&guest);
            let pings = "kill -INT $(pidof ping); sleep 0.5; tail -n 3 /run/ping.log";
            let pings = host.sh(pings).text().unwrap();
            // But for the one that was on its way when ping ended.
            let numbers = "sed -n 's/.*icmp_seq=\\([0-9]*\\) .*/\\1/p' /run/ping.log | sort -nu";
            let numbers = host.sh(numbers).text().unwrap();
            let answered: Vec<u32> = numbers.lines().map(|n| n.parse().unwrap()).collect();
            let first = answered.first().copied().unwrap();
            assert!(
                answered
                    .iter()
                    .copied()
                    .eq(first..first + answered.len() as u32),
                "{pings}"
            );
            assert!(answered.len() > 50 && first == 1, "{pings}");
            let again = guest
                .sh("cat /proc/sys/kernel/random/boot_id")
                .text()
                .unwrap();
            assert_eq!(again, id);
            ends_load(&guest);
            drop(guest);
            vm.blanket("rm", "--force").unwrap();
            assert_eq!(host.sh("blanket ps -a --json").text().unwrap().trim(), "[]");
        },
    );
}

#[test]
fn a_migration_that_fails_or_is_cancelled_leaves_the_guest_where_it_is() {
    natively(
        || native("stays").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            stays(host, &vm, &guest, "--memory 256M", "other memory");
            stays(host, &vm, &guest, "--cpus 1", "other vCPUs");
            // Too slow to ever be done.
            let slow = "--mode pre-copy --bandwidth 8M --downtime 1 --compress off";
            let cancel = format!(
                "blanket migrate here --as there --console socket=/run/there.console {slow} & \
                 sleep 1.5; kill -INT $!; ! wait $!"
            );
            host.sh(cancel).text().unwrap();
            goes_on(&guest);
            assert_eq!(vms(host), 1);
            ends_load(&guest);
            drop(guest);
            vm.blanket("rm", "--force").unwrap();
        },
    );
}

fn vms(host: &Client) -> usize {
    let list = host.sh("blanket ps -a --json").text().unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    list.as_array().unwrap().len()
}

/// The migration fails for this reason, and the guest runs where it did.
fn stays(host: &Host, vm: &Vm, guest: &Client, flags: &str, why: &str) {
    let error = match vm.migrate("there", flags) {
        Ok(_) => panic!("migrated with {flags}"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains(why), "{error}");
    goes_on(guest);
    assert_eq!(vms(host), 1);
}

/// Begins a migration from `here` to `there` that is too slow to be done, and kills the monitor
/// `victim` when some of the memory has been copied: what `blanket` says, and its status.
fn killed_while_copied(host: &Host, victim: &str) -> String {
    let log = format!("/run/{victim}-killed.log");
    host.sh(
        "blanket migrate here --as there --console socket=/run/there.console \
         --mode pre-copy --bandwidth 8M --downtime 1 --compress off || echo status $?",
    )
    .spawn(&log)
    .unwrap();
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + LONG;
        while !done() {
            let said = || host.sh(format!("cat {log}")).text().unwrap();
            assert!(Instant::now() < deadline, "{what} is not:\n{}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let pid = |name| Vm::started(host, name).info().ok()?["pid"].as_u64();
    // All that a monitor has of its own is less.
    let copied = |pid| {
        let memory = format!("awk '/RssAnon/ {{ print $2 }}' /proc/{pid}/status");
        let memory = host.sh(memory).text().unwrap_or_default();
        memory.trim().parse::<u64>().is_ok_and(|kib| kib > 32 << 10)
    };
    until("memory copied", &|| pid("there").is_some_and(copied));
    let kill = format!("kill -KILL {}", pid(victim).unwrap());
    host.sh(kill).text().unwrap();
    let said = || host.sh(format!("cat {log}")).text().unwrap();
    until("it over", &|| said().contains("status "));
    said()
}

#[test]
fn a_guest_outlives_the_monitor_it_is_copied_to_but_not_the_one_it_is_copied_from() {
    natively(
        || native("killed").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            let said = killed_while_copied(host, "there");
            for part in ["'here' was not migrated", "it is where it was", "status 1"] {
                assert!(said.contains(part), "{part} is not in:\n{said}");
            }
            goes_on(&guest);
            assert_eq!(vm.info().unwrap()["state"], "running");
            assert_eq!(vms(host), 1);

            let said = killed_while_copied(host, "here");
            for part in ["before the new one had all of it", "status 1"] {
                assert!(said.contains(part), "{part} is not in:\n{said}");
            }
            drop(guest);
            let left = host.sh("blanket ps -a --json; pidof blanket-vmm; ls /run/blanket");
            let left = left.text().unwrap_or_else(|error| error.to_string());
            assert_eq!(vms(host), 1, "{left}");
            assert!(host.sh("pidof blanket-vmm").text().is_err(), "{left}");
            vm.blanket("rm", "").unwrap();
            // Nobody has its disk and its tap.
            let again = pv(host, "again");
            begins_load(&again.guest().unwrap(), "/dev/xvda");
            goes_on(&again.guest().unwrap());
            again.blanket("rm", "--force").unwrap();
        },
    );
}

/// Writes all of its memory all the time, faster than anybody could send it.
fn writes_memory(guest: &Client) {
    let write = "dd if=/dev/urandom of=/run/seed bs=1M count=8; \
                 while [ ! -e /run/stop ]; do for i in $(seq 10); do \
                 cat /run/seed > /run/fill$i; cmp /run/seed /run/fill$i || exit 1; done; done; \
                 touch /run/stopped-writer";
    guest.sh(write).spawn("/run/writer.log").unwrap();
}

/// Memory has followed the guest, as a report says.
fn has_followed(report: &Value) {
    is_sound(report);
    let following = &report["following"];
    let count = |what: &str| following[what].as_u64().unwrap();
    assert!(count("missing") > 0 && count("left") == 0, "{report}");
    assert!(
        count("us") > report["downtime_us"].as_u64().unwrap(),
        "{report}"
    );
}

#[test]
fn a_guest_that_writes_too_fast_moves_before_its_memory() {
    natively(
        || native("follows").unwrap(),
        |host| {
            let mut vm = pv(host, "here");
            let mut guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            writes_memory(&guest);
            for (new, mode) in [
                ("there", "hybrid"),
                ("here", "post-copy"),
                ("there", "hybrid"),
            ] {
                let flags = format!("--mode {mode} --bandwidth 32M --downtime 1");
                let (moved, report) = vm.migrate(new, &flags).unwrap();
                println!("{report}");
                has_followed(&report);
                assert!(
                    report["following"]["faults"].as_u64().unwrap() > 0,
                    "{report}"
                );
                drop(guest);
                vm = moved;
                guest = vm.guest().unwrap();
                goes_on(&guest);
            }
            ends_writing(&guest);
            drop(guest);
            vm.blanket("rm", "--force").unwrap();
            assert_eq!(host.sh("blanket ps -a --json").text().unwrap().trim(), "[]");
        },
    );
}

/// Writes the same 16 MiB again and again, faster than they are sent, and compares them.
fn writes_the_same(guest: &Client) {
    let write = "dd if=/dev/urandom of=/run/seed bs=1M count=16; n=0; \
                 while [ ! -e /run/stop ]; do dd if=/run/seed of=/run/fill bs=1M conv=notrunc; \
                 cmp /run/seed /run/fill || exit 1; n=$((n + 1)); \
                 echo $n > /run/round && mv /run/round /run/rounds; done; \
                 touch /run/stopped-writer";
    guest.sh(write).spawn("/run/writer.log").unwrap();
    goes_on(guest);
}

fn ends_writing_the_same(guest: &Client) {
    let end = "touch /run/stop; for i in $(seq 600); do [ -e /run/stopped-writer ] && \
               exit 0; sleep 0.1; done; cat /run/writer.log; exit 1";
    let ended = guest.sh(end).timeout(LONG).run().unwrap();
    assert!(ended.status.success(), "{ended}");
}

#[test]
fn a_guest_that_writes_too_fast_moves_when_little_is_sent_of_what_it_writes() {
    natively(
        || native("less").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            writes_the_same(&guest);
            let slow = "--mode pre-copy --bandwidth 32M --downtime 200 --verify";
            let off = format!("{slow} --compress off");
            stays(host, &vm, &guest, &off, "faster than it can be sent");
            let (moved, report) = vm.migrate("there", slow).unwrap();
            println!("{report}");
            is_sound(&report);
            let packed = |what: &str| report["packed"][what].as_u64().unwrap();
            for (before, after) in [("compressed", "compressed_to"), ("changed", "changed_to")] {
                let (before, after) = (packed(before), packed(after));
                assert!(before > 1 << 20 && after < before / 2, "{report}");
            }
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            // Its memory is compressed when it follows, too.
            let flags = "--mode post-copy --bandwidth 32M --compress lz4";
            let (moved, report) = moved.migrate("here", flags).unwrap();
            println!("{report}");
            has_followed(&report);
            assert!(
                report["packed"]["compressed"].as_u64().unwrap() > 0,
                "{report}"
            );
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            ends_writing_the_same(&guest);
            drop(guest);
            moved.blanket("rm", "--force").unwrap();
        },
    );
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_until_it_moves_and_not_after() {
    natively(
        || native("slowed").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            writes_the_same(&guest);
            let rounds = |guest: &Client| -> f64 {
                let rounds = "cat /run/rounds; sleep 2; cat /run/rounds";
                let rounds = guest.sh(rounds).text().unwrap();
                let mut rounds = rounds.lines().map(|n| n.trim().parse::<f64>().unwrap());
                let from = rounds.next().unwrap();
                rounds.next().unwrap() - from
            };
            let before = rounds(&guest);
            let slow = "--mode pre-copy --bandwidth 32M --downtime 200 --verify --compress off";
            stays(host, &vm, &guest, slow, "--auto-converge");
            // Cancelled when it is slowed down already: it is as fast as before.
            let cancel = "blanket migrate here --as there --console socket=/run/there.console \
                          --mode pre-copy --bandwidth 16M --downtime 1 --compress off --auto-converge & \
                          sleep 10; kill -INT $!; ! wait $!";
            host.sh(cancel).text().unwrap();
            let cancelled = rounds(&guest);
            assert!(
                cancelled > before / 3.0,
                "{before} before, {cancelled} after"
            );
            let flags = format!("{slow} --auto-converge");
            let (moved, report) = vm.migrate("there", &flags).unwrap();
            println!("{report}");
            is_sound(&report);
            assert!(report["throttle"].as_u64().unwrap() >= 20, "{report}");
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            let after = rounds(&guest);
            println!("{before} rounds before, {cancelled} when cancelled, {after} after");
            assert!(after > before / 3.0, "{before} before, {after} after");
            ends_writing_the_same(&guest);
            drop(guest);
            moved.blanket("rm", "--force").unwrap();
        },
    );
}

/// As [`ends_load`] with [`writes_memory`].
fn ends_writing(guest: &Client) {
    let end = "for i in $(seq 600); do [ -e /run/stopped-writer ] && \
               rm /run/stopped-writer && exit 0; sleep 0.1; done; cat /run/writer.log; exit 1";
    guest.sh("touch /run/stop").text().unwrap();
    let ended = guest.sh(end).timeout(LONG).run().unwrap();
    assert!(ended.status.success(), "{ended}");
    ends_load(guest);
}

#[test]
fn a_guest_whose_old_monitor_is_killed_before_its_memory_has_followed_is_reported() {
    natively(
        || native("lost").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            let pid = vm.info().unwrap()["pid"].as_u64().unwrap();
            let log = "/run/lost.log";
            host.sh(
                "blanket migrate here --as there --console socket=/run/there.console \
                 --mode post-copy --bandwidth 2M || echo status $?",
            )
            .spawn(log)
            .unwrap();
            let until = |what: &str, done: &dyn Fn() -> bool| {
                let deadline = Instant::now() + LONG;
                while !done() {
                    let said = || host.sh(format!("cat {log}")).text().unwrap();
                    assert!(Instant::now() < deadline, "{what} is not:\n{}", said());
                    std::thread::sleep(Duration::from_millis(50));
                }
            };
            let there = Vm::started(host, "there");
            until("it there", &|| {
                there.info().is_ok_and(|info| info["state"] == "running")
            });
            // Neither end can be had while its memory is on its way.
            for refused in [
                "blanket pause there",
                "blanket snapshot there /run/snapshot",
                "blanket migrate there --as elsewhere",
                "blanket stop here",
            ] {
                let said = host.sh(refused).run().unwrap().to_string();
                let way = ["on its way", "on their way"];
                assert!(way.iter().any(|it| said.contains(it)), "{refused}: {said}");
            }
            host.sh(format!("kill -TERM {pid}; sleep 1; kill -0 {pid}"))
                .text()
                .unwrap();
            host.sh(format!("kill -KILL {pid}")).text().unwrap();
            let said = || host.sh(format!("cat {log}")).text().unwrap();
            until("it over", &|| said().contains("status "));
            let said = said();
            for part in ["its memory is lost", "start it there anew", "status 1"] {
                assert!(said.contains(part), "{part} is not in:\n{said}");
            }
            let list = host.sh("blanket ps -a --json").text().unwrap();
            println!("{said}\n{list}");
            for part in [
                "the guest's memory is lost",
                "bytes of it had not come",
                "0x",
            ] {
                assert!(list.contains(part), "{part} is not in:\n{list}");
            }
            drop(guest);
            host.sh("blanket rm here && blanket rm there")
                .text()
                .unwrap();
            // Nobody has its disk and its tap.
            let again = pv(host, "again");
            begins_load(&again.guest().unwrap(), "/dev/xvda");
            goes_on(&again.guest().unwrap());
            again.blanket("rm", "--force").unwrap();
        },
    );
}

#[test]
fn an_hvm_guest_moves_on_a_node() {
    on_node(
        || provider("migrate").unwrap(),
        |node| {
            let flags = "--cpus 2 --memory 256M --disk /run/disk --net tap,host_ip=10.9.0.1/24";
            node.sh("truncate -s 16M /run/disk").text().unwrap();
            let mut vm = Vm::linux(node, "here", "blanket.ip=10.9.0.2/24", flags).unwrap();
            let mut guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/vda");
            goes_on(&guest);
            for new in ["there", "here"] {
                let (moved, report) = vm.migrate(new, "--verify --downtime 2000").unwrap();
                is_sound(&report);
                drop(guest);
                vm = moved;
                guest = vm.guest().unwrap();
                goes_on(&guest);
                node.sh("ping -c 1 -W 20 10.9.0.2").text().unwrap();
            }
            ends_load(&guest);
        },
    );
}

#[test]
fn an_hvm_guest_moves_on_a_node_before_its_memory_or_slowed_down() {
    on_node(
        || provider("follows").unwrap(),
        |node| {
            let vm = Vm::linux(node, "here", "", "--memory 256M").unwrap();
            let guest = vm.guest().unwrap();
            writes_the_same(&guest);
            let flags = "--mode post-copy --downtime 2000";
            let (moved, report) = vm.migrate("there", flags).unwrap();
            println!("{report}");
            has_followed(&report);
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            let flags = "--mode pre-copy --auto-converge --bandwidth 4M --downtime 1500 \
                         --compress off --delta-cache 0";
            let (moved, report) = moved.migrate("here", flags).unwrap();
            println!("{report}");
            is_sound(&report);
            assert!(report["throttle"].as_u64().unwrap() > 0, "{report}");
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            ends_writing_the_same(&guest);
        },
    );
}
