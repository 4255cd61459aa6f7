//! Guests whose disks are kept on another node, too.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

use blanket_system_tests::{Member, Vm, natively, until};
use blanket_testbed::{Client, Host};
use serde_json::Value;

/// A guest is not slower than this.
const LONG: Duration = Duration::from_secs(120);

/// Bytes of the first disk.
const DISK: u64 = 64 << 20;

/// A guest on a node, with two disks; there is something on the first one.
fn starts<'a>(host: &Host, node: &Member<'a>) -> Vm<'a> {
    host.sh(format!(
        "head -c {DISK} /dev/urandom > /var/tmp/first; truncate -s 16M /var/tmp/second"
    ))
    .text()
    .unwrap();
    node.says(
        "run web --machine pv --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.cpio \
         --cmdline 'console=hvc0 quiet loglevel=1 panic=-1' --memory 256M \
         --disk /var/tmp/first --disk /var/tmp/second",
    );
    node.vm("web")
}

/// The guest writes numbered blocks for ever: each is on its first disk before it is on the
/// second one, and there before the next one is begun. In the middle of the first disk something
/// is written again and again.
fn writes(guest: &Client, from: u32) {
    let write = format!(
        "n={from}; while :; do n=$((n + 1)); seq $n $((n + 2000)) | head -c 4096 > /run/block; \
         for disk in /dev/xvda /dev/xvdb; do \
         dd if=/run/block of=$disk bs=4096 seek=$n conv=fsync,notrunc 2> /dev/null || exit 1; done; \
         dd if=/run/block of=/dev/xvda bs=4096 seek=8192 conv=notrunc 2> /dev/null; \
         echo $n > /run/written.new; mv /run/written.new /run/written; done"
    );
    guest.sh(write).spawn("/run/writer.log").unwrap();
}

/// The last block of which the guest knows that it is on its disks.
fn written(guest: &Client) -> u32 {
    let written = guest.sh("cat /run/written 2>/dev/null || echo 0");
    written.text().unwrap().trim().parse().unwrap()
}

/// How many blocks there are without a gap on the two disks.
fn blocks(guest: &Client) -> [u32; 2] {
    ["/dev/xvda", "/dev/xvdb"].map(|disk| {
        let count = format!(
            "n=0; while :; do n=$((n + 1)); seq $n $((n + 2000)) | head -c 4096 > /run/want; \
             dd if={disk} bs=4096 skip=$n count=1 2> /dev/null | cmp -s - /run/want || break; \
             done; echo $((n - 1))"
        );
        let count = guest.sh(count).timeout(LONG).text().unwrap();
        count.trim().parse().unwrap()
    })
}

/// The points of which `blanket replicate` has told.
fn points(host: &Host) -> Vec<Value> {
    let lines = host.sh("cat /run/points.log").text().unwrap();
    let whole = lines
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    whole
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Begins to replicate to `b`; there is a point.
fn replicates(host: &Host, a: &Member) {
    let run = format!(
        "{} replicate web b --interval 1 --json > /run/points.log 2> /run/points.err \
         || echo status $? >> /run/points.err",
        a.command()
    );
    host.sh(run).spawn("/run/points.out").unwrap();
    until("a point there", || !points(host).is_empty());
}

/// There are points that were begun later than now.
fn more_points(host: &Host) {
    let goal = points(host).len() + 2;
    until("another point there", || points(host).len() >= goal);
}

#[test]
fn a_guest_whose_node_fails_goes_on_from_its_last_point_elsewhere_and_comes_back() {
    natively(
        || Member::nodes("replica").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            writes(&guest, 0);
            replicates(host, &a);
            more_points(host);
            for (command, why) in [
                ("migrate web b", "end blanket replicate first"),
                ("pause web", "end blanket replicate first"),
            ] {
                let said = a.refuses(command);
                assert!(said.contains(why), "{said}");
            }
            let said = b.refuses("promote web");
            assert!(said.contains("'web' runs on a"), "{said}");
            let list = b.json("replicas --json");
            assert_eq!(list[0]["from"], "a", "{list}");
            assert!(list[0]["age_ms"].as_u64().unwrap() < 20_000, "{list}");

            // It goes on after a break, and what is there is not sent again.
            b.kill();
            b.start();
            let before = points(host).len();
            until("it at work again", || points(host).len() > before + 1);
            let last = points(host).pop().unwrap();
            println!("{last}");
            assert!(last["disks_same"].as_u64().unwrap() > DISK / 2, "{last}");

            let safe = written(&guest);
            more_points(host);
            assert!(safe > 0);
            drop(guest);
            let pid = vm.info().unwrap()["pid"].as_u64().unwrap();
            host.sh(format!("kill -KILL {pid}")).text().unwrap();
            until("it told", || {
                host.sh("cat /run/points.err")
                    .text()
                    .unwrap()
                    .contains("status 1")
            });
            println!("{}", b.says("promote web"));
            let guest = b.vm("web").guest().unwrap();
            let [first, second] = blocks(&guest);
            println!("{safe} were safe, {first} and {second} are there");
            assert!(first >= safe && (first == second || first == second + 1));
            assert_eq!(b.json("replicas --json").as_array().unwrap().len(), 0);
            let said = b.refuses("promote web");
            assert!(said.contains("no replica"), "{said}");

            // And back, beginning with what was left there.
            // The last block may be on one of them only.
            writes(&guest, second);
            until("something written", || written(&guest) > first + 20);
            let safe = written(&guest);
            let report = b.json("replicate web a --once --json");
            println!("{report}");
            assert!(
                report["disks_same"].as_u64().unwrap() > DISK / 2,
                "{report}"
            );
            assert!(
                report["disks_sent"].as_u64().unwrap() < DISK / 2,
                "{report}"
            );
            drop(guest);
            b.says("rm --force web");
            let said = a.refuses("promote web");
            assert!(said.contains("blanket rm web"), "{said}");
            a.says("rm web");
            println!("{}", a.says("promote web"));
            let guest = a.vm("web").guest().unwrap();
            let [first, second] = blocks(&guest);
            println!("{safe} were safe, {first} and {second} are there");
            assert!(first >= safe && (first == second || first == second + 1));
            drop(guest);
            a.says("rm --force web");
        },
    );
}

#[test]
fn a_primary_that_could_not_be_reached_finds_its_replica_promoted() {
    natively(
        || Member::nodes("partition").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = starts(host, &a);
            let guest = vm.guest().unwrap();
            writes(&guest, 0);
            replicates(host, &a);
            let safe = written(&guest);
            more_points(host);
            host.sh("ip link set v1 down").text().unwrap();
            let promoted = b.run("promote web");
            let said = String::from_utf8_lossy(&promoted.stderr).into_owned();
            assert!(promoted.status.success(), "{promoted}");
            assert!(said.contains("a does not answer"), "{said}");
            let there = b.vm("web").guest().unwrap();
            let [first, second] = blocks(&there);
            assert!(first >= safe && (first == second || first == second + 1));
            host.sh("ip link set v1 up").text().unwrap();
            let said = || host.sh("cat /run/points.err").text().unwrap();
            until("it told", || said().contains("status 1"));
            assert!(said().contains("runs there itself"), "{}", said());
            // What has come late has changed nothing.
            assert!(blocks(&there)[0] >= first);
            assert_eq!(b.json("replicas --json").as_array().unwrap().len(), 0);
            drop((guest, there));
            b.says("rm --force web");
            a.says("rm --force web");
        },
    );
}
