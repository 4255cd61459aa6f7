//! The disks of guests on their way between nodes.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

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
