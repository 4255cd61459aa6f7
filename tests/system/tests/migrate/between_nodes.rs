//! From one node of a cluster to another.

use super::*;

fn nodes() -> HostBuilder {
    Member::nodes("moves").unwrap()
}

/// A guest on a node, with a disk of its own and one that it reads.
pub(super) fn starts<'a>(host: &Host, node: &Member<'a>) -> Vm<'a> {
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
            // From monitor to monitor.
            let way = if flags.contains("--plain") {
                "direct"
            } else {
                "sealed"
            };
            assert_eq!(report["way"], way, "{report}");
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
            .sh("guest-check datagrams 7 > /run/found || true; echo over >> /run/found")
            .spawn("/run/datagrams.log")
            .unwrap();
        // It listens.
        let listens = "until grep -q :0007 /proc/net/udp; do sleep 0.1; done";
        guest.sh(listens).text().unwrap();
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
