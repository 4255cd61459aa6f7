//! Running guests move from monitor to monitor.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

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
                let new = if n % 2 == 0 { "there" } else { "here" };
                // A lost write of anybody's shows at once.
                let (moved, report) = vm.migrate(new, "--verify --downtime 500").unwrap();
                is_sound(&report);
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
                assert!(said.contains("on its way"), "{refused}: {said}");
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

fn nodes() -> HostBuilder {
    Member::nodes("moves").unwrap()
}

/// A guest on a node, with a disk of its own and one that it reads.
fn starts<'a>(host: &Host, node: &Member<'a>) -> Vm<'a> {
    host.sh("truncate -s 64M /var/tmp/own && seq 200000 > /var/tmp/read && truncate -s 4M /var/tmp/read")
        .text()
        .unwrap();
    node.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --cmdline 'console=hvc0 quiet loglevel=1 panic=-1 blanket.ip=10.7.0.50/24' \
         --cpus 2 --memory 384M --disk /var/tmp/own --disk path=/var/tmp/read,readonly=on \
         --net tap,bridge=guests",
    );
    node.vm("web")
}

/// What there is of VMs on a node, its disks among it.
fn left_of_vms(host: &Host, node: &Member) -> String {
    let home = node.home();
    // What is kept for the next time is no VM's.
    let list = "{ for disks in disks/*; do grep -qs '\"arriving\":false' $disks/arrival.json || \
                ls $disks; done; ls receiving vms run; } 2>/dev/null | grep -v : | grep .";
    host.sh(format!("cd {home}; {list} || true"))
        .text()
        .unwrap()
}

#[test]
fn a_guest_with_its_disks_moves_to_another_node_and_back() {
    natively(nodes, |host| {
        let [a, b] = Member::two(host);
        let vm = starts(host, &a);
        let mut guest = vm.guest().unwrap();
        let sum = "sha256sum < /dev/xvdb; cat /proc/sys/kernel/random/boot_id";
        let was = guest.sh(sum).text().unwrap();
        begins_load(&guest, "/dev/xvda");
        goes_on(&guest);
        host.sh("exec ping -i 0.02 10.7.0.50")
            .spawn("/run/ping.log")
            .unwrap();
        for (from, to, flags, name) in [
            (&a, &b, "--mode post-copy", "b"),
            (&b, &a, "--mode post-copy --plain", "a"),
            (&a, &b, "--mode pre-copy --verify --downtime 1000", "b"),
            (&b, &a, "--mode pre-copy --verify --downtime 1000", "a"),
        ] {
            let report = from.json(&format!("migrate web {name} --json {flags}"));
            println!("{report}");
            is_sound(&report);
            if flags.contains("post-copy") {
                has_followed(&report);
            }
            assert_eq!(
                (&report["node"], &report["name"]),
                (&name.into(), &"web".into())
            );
            assert_eq!(report["disks"], 64 << 20, "{report}");
            drop(guest);
            guest = to.vm("web").guest().unwrap();
            goes_on(&guest);
            assert_eq!(guest.sh(sum).text().unwrap(), was);
            assert_eq!(left_of_vms(host, from), "", "{report}");
        }
        // Those that were made by hand are still there, and not used any more.
        host.sh("test -e /var/tmp/own && rm /var/tmp/own /var/tmp/read")
            .text()
            .unwrap();
        goes_on(&guest);
        let pings = "kill -INT $(pidof ping); sleep 0.5; tail -n 3 /run/ping.log";
        let pings = host.sh(pings).text().unwrap();
        println!("{pings}");
        // Bridges may lose some while they learn where it is.
        let count = |word: &str| {
            let mut words = pings
                .split(&[' ', ',', '\n'][..])
                .filter(|word| !word.is_empty());
            let mut last = "";
            let found = words.find(|next| {
                let is = *next == word;
                if !is {
                    last = next;
                }
                is
            });
            assert!(found.is_some(), "{pings}");
            last.parse::<u64>().ok()
        };
        let (sent, received) = (count("packets").unwrap(), count("received").unwrap());
        assert!(sent - received < 150, "{pings}");
        // It starts again from its kernel, which came along.
        ends_load(&guest);
        drop(guest);
        a.says("reset web");
        assert_ne!(a.vm("web").guest().unwrap().sh(sum).text().unwrap(), was);
        a.says("rm --force web");
    });
}

#[test]
fn what_is_sent_to_a_guest_that_moves_to_another_node_arrives_once_and_in_order() {
    natively(nodes, |host| {
        let [a, b] = Member::two(host);
        let mut guest = starts(host, &a).guest().unwrap();
        guest
            .sh("guest-check datagrams 7 > /run/found; echo over >> /run/found")
            .spawn("/run/datagrams.log")
            .unwrap();
        // Numbers in datagrams, a millisecond or two apart.
        host.sh("until ping -c 1 -W 1 10.7.0.50; do :; done; \
                 exec bash -c 'exec 3>/dev/udp/10.7.0.50/7; n=0; while [ ! -e /run/stop ]; do \
                 n=$((n + 1)); echo $n >&3; sleep 0.001; done; echo $n > /run/sent'")
            .spawn("/run/send.log")
            .unwrap();
        let mut forwarded = 0;
        for mode in ["pre-copy", "hybrid --plain", "hybrid"] {
            for (from, to, name) in [(&a, &b, "b"), (&b, &a, "a")] {
                let report = from.json(&format!("migrate web {name} --json --mode {mode}"));
                forwarded += report["forwarded"].as_u64().unwrap();
                drop(guest);
                guest = to.vm("web").guest().unwrap();
            }
        }
        let sent = "touch /run/stop; until [ -s /run/sent ]; do sleep 0.1; done; cat /run/sent";
        let sent: u64 = host.sh(sent).text().unwrap().trim().parse().unwrap();
        let found = "until grep -q over /run/found; do sleep 0.1; done; head -n 1 /run/found";
        let found = guest.sh(found).timeout(LONG).text().unwrap();
        let found: Value = serde_json::from_str(&found).unwrap();
        assert_eq!(found, json!({ "came": sent, "wrong": [] }));
        // The pauses were long enough for some to come to the old place.
        assert!(sent > 100 && forwarded > 0, "{sent} {forwarded}");
        drop(guest);
        a.says("rm --force web");
    });
}

#[test]
fn a_guest_that_cannot_reach_the_other_node_stays_and_leaves_nothing_there() {
    natively(nodes, |host| {
        let [a, b] = Member::two(host);
        let vm = starts(host, &a);
        let guest = vm.guest().unwrap();
        begins_load(&guest, "/dev/xvda");
        let refused = |flags: &str, why: &str| {
            let said = a.refuses(&format!("migrate web {flags}"));
            assert!(said.contains(why), "{flags}: {said}");
            goes_on(&guest);
            assert_eq!(left_of_vms(host, &b), "", "{flags}");
        };
        refused("c", "there is no node c");
        refused("a", "a is this node");
        refused("b --memory 256M", "other memory");
        refused("b --net tap,bridge=none", "none");
        b.says("run web --machine pv --kernel /payload/guest/vmlinuz --memory 64M");
        let taken = a.refuses("migrate web b");
        assert!(
            taken.contains("in use there") && taken.contains("--as"),
            "{taken}"
        );
        b.says("rm --force web");

        // Too slow to ever be done: cut at different times.
        let slow = "migrate web b --mode pre-copy --bandwidth 24M --downtime 1 --compress off";
        let during = |seconds: &str, what: &str| {
            let log = "/run/slow.log";
            let whole = format!(
                "{} {slow} > {log} 2>&1 & pid=$!; sleep {seconds}; {what}; \
                 wait $pid || echo status $? >> {log}",
                a.command()
            );
            host.sh(whole).timeout(LONG).text().unwrap();
            goes_on(&guest);
            host.sh(format!("cat {log}")).text().unwrap()
        };
        let gone = || {
            let deadline = Instant::now() + LONG;
            while !left_of_vms(host, &b).is_empty() {
                assert!(Instant::now() < deadline, "{}", left_of_vms(host, &b));
                std::thread::sleep(Duration::from_millis(200));
            }
            assert!(host.sh("pgrep -f 'blanke[t] .*receive'").text().is_err());
        };
        for seconds in ["1", "3", "6"] {
            let said = during(seconds, "kill -INT $pid");
            assert!(
                said.contains("cancelled") && said.contains("status 1"),
                "{said}"
            );
            gone();
        }
        let said = during(
            "4",
            r#"kill -KILL $(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' /run/h2/vms/web/record.json)"#,
        );
        assert!(
            said.contains("was not migrated") && said.contains("status 1"),
            "{said}"
        );
        gone();
        let said = during(
            "4",
            "kill -KILL $(cat /run/h2.pid); rm -f /run/h2/blanketd.sock",
        );
        assert!(
            said.contains("was not migrated") && said.contains("status 1"),
            "{said}"
        );
        b.start();
        gone();
        let said = during("4", "ip link set v2 down; sleep 40; ip link set v2 up");
        assert!(
            said.contains("was not migrated") && said.contains("status 1"),
            "{said}"
        );
        gone();

        // And then it goes.
        let report = a.json("migrate web b --json --downtime 1000 --delete-disks");
        is_sound(&report);
        host.sh("! test -e /var/tmp/own").text().unwrap();
        drop(guest);
        let guest = b.vm("web").guest().unwrap();
        goes_on(&guest);
        ends_load(&guest);
        b.says("rm --force web");
    });
}

/// Writes files for ever, each of which is on the disk before the next one is begun; and compares
/// them.
const WRITER: &str = "cd /var/tmp; n=0; while [ ! -e stop ]; do n=$((n + 1)); f=x$((n % 4)); \
                      seq $n $((n + 30000)) > $f; sync $f; sha256sum $f >> sums; sync sums; \
                      echo 3 > /proc/sys/vm/drop_caches; \
                      tail -n 1 sums | sha256sum -c > /dev/null || exit 1; \
                      echo $n > rounds.new; mv rounds.new rounds; done; touch stopped";

#[test]
fn a_stock_debian_moves_from_one_cloud_to_another_while_clients_talk_to_it() {
    let clouds = Clouds::boot(&program("").unwrap()).unwrap();
    let (a, b) = (&clouds.here, &clouds.there);
    let vm = clouds.start().unwrap();
    let guest = vm.guest().unwrap();
    let id = "cat /proc/sys/kernel/random/boot_id";
    let was = guest.sh(id).text().unwrap();
    guest.sh(WRITER).spawn("/run/writer.log").unwrap();
    let rounds = |guest: &Client| -> u32 {
        let rounds = guest.sh("cat /var/tmp/rounds || echo 0").text().unwrap();
        rounds.trim().parse().unwrap()
    };
    let writes_on = |guest: &Client| {
        let (goal, deadline) = (rounds(guest) + 2, Instant::now() + LONG);
        while rounds(guest) < goal {
            let log = || guest.sh("cat /run/writer.log").text().unwrap();
            assert!(Instant::now() < deadline, "{}", log());
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    writes_on(&guest);
    // A stream, and a page from the web server again and again.
    guest.sh("iperf3 -s -1 -D").text().unwrap();
    a.sh("exec iperf3 -J -c 10.1.0.50 -b 4M -l 16K -t 3600")
        .spawn("/run/stream.log")
        .unwrap();
    a.sh(
        "while [ ! -e /run/stop ]; do curl -sS --fail -m 60 http://10.1.0.50/ > /run/page || \
          echo failed; echo got; done",
    )
    .spawn("/run/pages.log")
    .unwrap();
    // Unencrypted: the emulated processors encrypt 2 MB/s.
    let (moved, report) = clouds.migrate("--verify --downtime 5000 --plain").unwrap();
    println!("{report}");
    is_sound(&report);
    drop(guest);
    let guest = moved.guest().unwrap();
    assert_eq!(guest.sh(id).text().unwrap(), was);
    writes_on(&guest);
    std::thread::sleep(Duration::from_secs(3));
    let ended = "touch /run/stop; kill -INT $(pidof iperf3); \
                 while pidof iperf3; do sleep 0.5; done > /dev/null; cat /run/stream.log";
    let stream = a.sh(ended).timeout(LONG).text().unwrap();
    let stream: Value = serde_json::from_str(&stream).unwrap();
    // It has lived until it was told to end, and went on.
    let error = stream["error"].as_str().unwrap();
    assert!(error.starts_with("interrupt"), "{error}");
    let seconds = stream["intervals"].as_array().unwrap();
    let carried = |second: &Value| second["sum"]["bytes"].as_u64().unwrap() > 0;
    assert!(
        seconds.iter().rev().skip(1).take(2).all(carried),
        "{stream}"
    );
    let pages = a.sh("cat /run/pages.log").text().unwrap();
    assert!(
        pages.contains("got") && !pages.contains("failed"),
        "{pages}"
    );
    assert_eq!(a.sh("cat /run/page").text().unwrap(), GUEST_PAGE);
    guest
        .sh(
            "cd /var/tmp; touch stop; until [ -e stopped ]; do sleep 0.1; done; \
             tail -n 4 sums | sha256sum -c > /dev/null",
        )
        .timeout(LONG)
        .text()
        .unwrap();
    assert_eq!(blanket(a, "ps -a --json").unwrap().trim(), "[]");
    blanket(b, "rm --force web").unwrap();
    // What it wrote is on that cloud's volume.
    let check = "mkdir /run/m && mount -o loop /var/lib/blanket/disks/web/0.img /run/m && \
                 cd /run/m/var/tmp && tail -n 4 sums | sha256sum -c > /dev/null";
    b.sh(check).timeout(LONG).text().unwrap();
}
