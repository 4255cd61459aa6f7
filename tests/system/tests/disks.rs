//! The disks of guests on their way between nodes.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::{Duration, Instant};

use blanket_system_tests::{Member, Vm, natively, until};
use blanket_testbed::{Client, Host};
use serde_json::Value;

/// A guest is not slower than this.
const LONG: Duration = Duration::from_secs(120);

/// Bytes of the disk.
const DISK: u64 = 96 << 20;

/// A guest on a node, with a disk full of what cannot be packed.
fn starts<'a>(host: &Host, node: &Member<'a>) -> Vm<'a> {
    host.sh(format!("head -c {DISK} /dev/urandom > /var/tmp/own"))
        .text()
        .unwrap();
    node.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --cmdline 'console=hvc0 quiet loglevel=1 panic=-1' --memory 256M --disk /var/tmp/own",
    );
    node.vm("web")
}

/// What is on the guest's disk, as it reads it.
fn content(guest: &Client) -> String {
    let sum = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/xvda";
    guest.sh(sum).timeout(LONG).text().unwrap()
}

/// The guest writes this MiB of its disk anew.
fn writes(guest: &Client, at: u32) {
    let write = "dd if=/dev/urandom of=/dev/xvda bs=1M count=1 conv=notrunc,fsync seek=";
    guest.sh(format!("{write}{at}")).text().unwrap();
}

/// Begins a migration from `a` to `b` that takes its time, and does something to it when so much
/// of the disk is there.
fn broken(host: &Host, a: &Member, mib: u64, what: &str) {
    let log = "/run/broken.log";
    let go = format!(
        "{} migrate web b --bandwidth 16M > {log} 2>&1 & echo $! > /run/broken.pid; \
         wait $! || echo status $? >> {log}",
        a.command()
    );
    host.sh(go).spawn("/run/broken.out").unwrap();
    until("some of the disk there", || {
        let took = host.sh("du -m /run/h2/disks/web/0.img | cut -f 1").text();
        took.is_ok_and(|took| took.trim().parse::<u64>().is_ok_and(|took| took >= mib))
    });
    host.sh(what).text().unwrap();
    let said = || host.sh(format!("cat {log}")).text().unwrap();
    until("it over", || said().contains("status "));
    assert!(said().contains("was not migrated"), "{}", said());
    // Nobody has the VM there.
    until("its monitor gone", || {
        let left = host.sh("ls /run/h2/vms 2>/dev/null");
        left.text().unwrap_or_default().trim().is_empty()
    });
}

/// Bytes of disks that were sent, of a report.
fn sent(report: &Value) -> u64 {
    let rounds = report["rounds"].as_array().unwrap().iter();
    rounds.map(|round| round["disk"].as_u64().unwrap()).sum()
}

#[test]
fn a_migration_that_was_broken_off_sends_what_is_missing_the_next_time() {
    natively(
        || Member::nodes("resumes").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            // Its daemon is what carries it.
            broken(host, &a, 40, "kill -KILL $(cat /run/h2.pid)");
            host.sh("rm -f /run/h2/blanketd.sock").text().unwrap();
            b.start();
            writes(&guest, 3);
            broken(host, &a, 64, "kill -INT $(cat /run/broken.pid)");
            writes(&guest, 5);
            writes(&guest, 95);
            let was = content(&guest);
            let report = a.json("migrate web b --json --verify --downtime 1000");
            println!("{report}");
            assert_eq!(report["phase"], "moved", "{report}");
            let same = report["disks_same"].as_u64().unwrap();
            assert!(same >= 60 << 20, "{report}");
            assert!(sent(&report) <= DISK - same + (2 << 20), "{report}");
            drop(guest);
            let guest = b.vm("web").guest().unwrap();
            assert_eq!(content(&guest), was);
            // They are the VM's now.
            let notes = "! ls /run/h2/disks/web/arrival.json 2>/dev/null";
            host.sh(notes).text().unwrap();
            drop(guest);
            b.says("rm --force web");
        },
    );
}

#[test]
fn what_is_kept_of_a_disk_is_discarded_when_that_is_asked_for() {
    natively(
        || Member::nodes("discards").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            broken(host, &a, 20, "kill -INT $(cat /run/broken.pid)");
            host.sh("test -e /run/h2/disks/web/arrival.json")
                .text()
                .unwrap();
            a.says("migrate web b --discard");
            let left = host.sh("ls -A /run/h2/disks").text().unwrap();
            assert_eq!(left, "");
            let was = content(&guest);
            let report = a.json("migrate web b --json --downtime 1000");
            assert_eq!(report["disks_same"], 0, "{report}");
            drop(guest);
            let there = b.vm("web");
            assert_eq!(content(&there.guest().unwrap()), was);
            b.says("rm --force web");
        },
    );
}

#[test]
fn a_guest_moves_between_nodes_that_have_the_same_storage_and_its_disk_stays_where_it_is() {
    natively(
        || Member::nodes("shared").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            host.sh("mkdir /var/tmp/shared").text().unwrap();
            let disk = "/var/tmp/shared/own";
            host.sh(format!("head -c 16M /dev/urandom > {disk}"))
                .text()
                .unwrap();
            let run = |node: &Member, name: &str| {
                node.run(&format!(
                    "run {name} --machine pv --kernel /payload/guest/vmlinuz \
                     --initrd /payload/guest/initrd.cpio \
                     --cmdline 'console=hvc0 quiet loglevel=1 panic=-1' --memory 256M \
                     --disk {disk}"
                ))
            };
            let started = run(&a, "web");
            assert!(started.status.success(), "{started}");
            let mut guest = a.vm("web").guest().unwrap();
            let said = a.refuses("migrate web b --shared-disks");
            assert!(said.contains("blanketd --shared DIR"), "{said}");
            let shares = |node: &Member| {
                node.kill();
                node.start_with("--shared /var/tmp/shared");
            };
            shares(&b);
            // The lock is where the guest is, also when it stays.
            let is_locked = |node: &Member| {
                let refused = run(node, "thief");
                let said = String::from_utf8_lossy(&refused.stderr).into_owned();
                assert!(
                    !refused.status.success() && said.contains("in use"),
                    "{refused}"
                );
            };
            let cancelled = format!(
                "{} migrate web b --shared-disks --bandwidth 4M & sleep 2; kill -INT $!; ! wait $!",
                a.command()
            );
            host.sh(cancelled).timeout(LONG).text().unwrap();
            writes(&guest, 1);
            is_locked(&b);
            shares(&a);
            for (from, to, name) in [(&a, &b, "b"), (&b, &a, "a")] {
                writes(&guest, 3);
                guest
                    .sh("dd if=/dev/urandom of=/dev/xvda bs=1M count=2 seek=9 conv=notrunc; sync")
                    .text()
                    .unwrap();
                let was = content(&guest);
                let flags = "--shared-disks --json --downtime 1000";
                let report = from.json(&format!("migrate web {name} {flags}"));
                println!("{report}");
                assert_eq!(
                    (&report["disks"], sent(&report)),
                    (&0.into(), 0),
                    "{report}"
                );
                drop(guest);
                guest = to.vm("web").guest().unwrap();
                assert_eq!(content(&guest), was);
                writes(&guest, 7);
                is_locked(from);
                let sums = host.sh(format!("sha256sum < {disk}")).text().unwrap();
                assert_eq!(sums, content(&guest));
                assert_eq!(host.sh("ls -A /var/tmp/shared").text().unwrap(), "own\n");
            }
            drop(guest);
            a.says("rm --force web");
            let started = run(&b, "web");
            assert!(started.status.success(), "{started}");
            b.says("rm --force web");
        },
    );
}

/// Has `a`'s guest leave for `b`, with its disk behind it, and does not wait.
fn leaves_its_disk(host: &Host, a: &Member, flags: &str) {
    let go = format!(
        "{} migrate web b --lazy-disks {flags} --json > /run/left.json 2> /run/left.log || \
         status=$?; echo status ${{status:-0}} >> /run/left.log",
        a.command()
    );
    host.sh(go).spawn("/run/left.out").unwrap();
}

/// What the command that had it leave said in the end.
fn has_left(host: &Host) -> (String, Value) {
    let said = || host.sh("cat /run/left.log").text().unwrap();
    until("all of it there", || said().contains("status "));
    let report = host.sh("cat /run/left.json").text().unwrap();
    (said(), serde_json::from_str(&report).unwrap_or_default())
}

#[test]
fn a_guest_uses_its_disk_while_that_follows_it() {
    natively(
        || Member::nodes("lazy").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            writes(&guest, 3);
            let was = content(&guest);
            drop(guest);
            leaves_its_disk(host, &a, "--bandwidth 8M --verify");
            until("it there", || b.says("ps").contains("running"));
            let guest = b.vm("web").guest().unwrap();
            let said = b.refuses("stop web");
            assert!(said.contains("still on their way"), "{said}");
            assert_eq!(content(&guest), was);
            // Whole blocks, and parts of one.
            writes(&guest, 5);
            writes(&guest, 90);
            let part = "printf other | dd of=/dev/xvda bs=1 seek=70000001 conv=notrunc,fsync";
            guest.sh(part).text().unwrap();
            let is = content(&guest);
            assert_ne!(is, was);
            let (said, report) = has_left(host);
            println!("{report}");
            assert!(said.contains("status 0"), "{said}");
            assert_eq!((&report["phase"], sent(&report)), (&"moved".into(), 0));
            let count = |what: &str| report["following_disks"][what].as_u64().unwrap();
            assert!(count("missing") >= DISK && count("left") == 0, "{report}");
            assert!(count("faults") > 0, "{report}");
            assert!(
                report["downtime_us"].as_u64().unwrap() * 5 < report["total_us"].as_u64().unwrap(),
                "{report}"
            );
            assert_eq!(content(&guest), is);
            let there = host.sh("sha256sum < /run/h2/disks/web/0.img");
            assert_eq!(there.text().unwrap(), is);
            drop(guest);
            // And back, with its memory behind it, too.
            let report = b.json("migrate web a --lazy-disks --mode post-copy --json");
            println!("{report}");
            assert_eq!(report["phase"], "moved", "{report}");
            assert!(report["following"].is_object(), "{report}");
            let guest = a.vm("web").guest().unwrap();
            assert_eq!(content(&guest), is);
            drop(guest);
            a.says("rm --force web");
        },
    );
}

#[test]
fn a_guest_that_ends_before_its_disk_has_followed_it_has_all_of_it_in_the_end() {
    natively(
        || Member::nodes("ends").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            drop(guest);
            leaves_its_disk(host, &a, "--bandwidth 8M");
            until("it there", || b.says("ps").contains("running"));
            let guest = b.vm("web").guest().unwrap();
            let clears = "dd if=/dev/zero of=/dev/xvda bs=1M count=1 seek=50 conv=notrunc,fsync";
            guest.sh(clears).text().unwrap();
            guest.sh("poweroff -f").spawn("/dev/null").unwrap();
            let (said, _) = has_left(host);
            assert!(said.contains("runs no more"), "{said}");
            drop(guest);
            until("its end", || b.says("ps -a").contains("web"));
            let dd = "dd if=/dev/zero of=/var/tmp/own bs=1M count=1 seek=50 conv=notrunc; \
                      cmp /var/tmp/own /run/h2/disks/web/0.img";
            host.sh(dd).text().unwrap();
            b.says("rm web");
        },
    );
}

#[test]
fn what_a_base_has_in_common_with_a_disk_is_not_sent_whatever_else_is_in_it() {
    natively(
        || Member::nodes("based").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let mut guest = vm.guest().unwrap();
            let said = a.refuses("migrate web b --base golden");
            assert!(said.contains("no base 'golden'"), "{said}");
            // The image that its disk began as; one that was damaged, and cut.
            let golden = "mkdir -p /run/h1/bases /run/h2/bases && cp /var/tmp/own /run/h2/bases/golden && \
                          head -c 50M /var/tmp/own > /run/h1/bases/golden && \
                          dd if=/dev/urandom of=/run/h1/bases/golden bs=1M seek=9 count=2 conv=notrunc";
            host.sh(golden).text().unwrap();
            writes(&guest, 3);
            writes(&guest, 95);
            let mut was = content(&guest);
            for (from, to, name, flags, least) in
                [(&a, &b, "b", "", 90), (&b, &a, "a", "--lazy-disks", 45)]
            {
                drop(guest);
                let flags = format!("--base golden --json --downtime 1000 {flags}");
                let report = from.json(&format!("migrate web {name} {flags}"));
                println!("{report}");
                let same = report["disks_same"].as_u64().unwrap();
                assert!(same >= least << 20 && same < DISK, "{report}");
                assert!(sent(&report) <= DISK - same + (2 << 20), "{report}");
                guest = to.vm("web").guest().unwrap();
                assert_eq!(content(&guest), was);
                writes(&guest, 7);
                was = content(&guest);
            }
            drop(guest);
            a.says("rm --force web");
        },
    );
}

#[test]
fn a_monitor_that_is_killed_before_its_guest_has_all_of_its_disk_is_soon_missed() {
    natively(
        || Member::nodes("missed").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            drop(vm.guest().unwrap());
            leaves_its_disk(host, &a, "--mode post-copy --bandwidth 4M");
            let monitor = || b.json("ps --json")[0]["pid"].as_u64();
            until("it there", || b.says("ps").contains("running"));
            // Whoever brings it there has seen it run.
            std::thread::sleep(Duration::from_secs(2));
            let pid = monitor().unwrap();
            host.sh(format!("kill -9 {pid}")).text().unwrap();
            let killed = Instant::now();
            let (said, _) = has_left(host);
            assert!(killed.elapsed() < Duration::from_secs(45), "{said}");
            for part in [
                "its new monitor has ended while",
                "blanket rm web",
                "status 1",
            ] {
                assert!(said.contains(part), "{part} is not in:\n{said}");
            }
            // What it left is there, at both ends, and nobody has its disk.
            assert!(b.says("ps -a").contains("web"));
            assert!(!a.says("ps").contains("running"));
            b.says("rm web");
            a.says("rm web");
            drop(starts(host, &a).guest().unwrap());
            a.says("rm --force web");
        },
    );
}
