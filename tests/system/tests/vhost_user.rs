//! Guests whose network interfaces a vhost-user backend serves: DPDK's testpmd, which passes
//! frames from one of its two ports to the other and back, or two ports of the overlay's, which a
//! cable joins.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::process::Command;
use std::time::Duration;

use blanket_system_tests::{Vm, native, natively, on_node, provider, until};
use blanket_testbed::{Client, ensure_packages};
use serde_json::Value;

/// Natively, guests and a backend that polls share few processors.
const LONG: Duration = Duration::from_secs(150);

/// Starts testpmd with pairs of ports from `/run/vu0` and `/run/vu1` on, to which any user may
/// connect. It ends with its input.
fn start_testpmd(node: &Client, pairs: usize, options: &str) {
    let ports: String = (0..2 * pairs)
        .map(|n| format!(" --vdev net_vhost{n},iface=/run/vu{n},queues=1{options}"))
        .collect();
    node.sh(format!(
        "umask 0; mkfifo -m 600 /run/testpmd.stdin; \
         (sleep 100000 > /run/testpmd.stdin & echo $! > /run/testpmd.sleep; \
         exec dpdk-testpmd --no-huge --no-shconf --no-telemetry --no-pci -m 256 -l 0,1{ports} \
         -- --forward-mode=io --auto-start --total-num-mbufs=16384 < /run/testpmd.stdin)"
    ))
    .spawn("/run/testpmd.log")
    .unwrap();
    let ready = "until [ -S /run/vu0 ] && [ -S /run/vu1 ]; do sleep 1; pidof dpdk-testpmd; \
                 done; sleep 1; pidof dpdk-testpmd";
    let up = node.sh(ready).timeout(LONG).run();
    let log = node.sh("cat /run/testpmd.log").run().unwrap();
    assert!(up.is_ok_and(|up| up.status.success()), "{log}");
}

fn stop_testpmd(node: &Client) {
    node.sh("kill -9 $(pidof dpdk-testpmd) $(cat /run/testpmd.sleep); \
         while pidof dpdk-testpmd; do sleep 0.1; done; rm /run/vu? /run/testpmd.*")
        .text()
        .unwrap();
}

/// What the monitor counts of the interface.
fn counter(vm: &Vm, name: &str) -> u64 {
    let info = vm.info().unwrap();
    let count = info["metrics"]["devices"]["net0"][name].as_u64();
    count.unwrap_or_else(|| panic!("no {name}: {info}"))
}

/// Pings from one guest to the other, of every size. What comes before testpmd passes frames on
/// is lost.
fn pings(node: &Client, guest: &Client) {
    let first = guest.sh("until ping -c 1 -W 1 10.9.0.2; do sleep 0.2; done");
    let passed = first.timeout(Duration::from_secs(60)).run();
    if !passed.is_ok_and(|output| output.status.success()) {
        panic!("{}", node.sh("cat /run/testpmd.log").run().unwrap());
    }
    for size in [0, 56, 1400, 8000] {
        let ping = guest.sh(format!("ping -c 3 -W 10 -s {size} 10.9.0.2"));
        ping.timeout(LONG).text().unwrap();
    }
}

/// Random data goes both ways over TCP and is compared.
fn data_arrives(first: &Client, second: &Client, mib: u32) {
    let sum = "sha256sum - | cut -c 1-64";
    for (from, to, address) in [(first, second, "10.9.0.1"), (second, first, "10.9.0.2")] {
        let made = from.sh(format!(
            "mkdir -p /run/www && dd if=/dev/urandom of=/run/www/data bs=1M count={mib} \
             2>/dev/null && {{ pidof httpd || httpd -p {address}:80 -h /run/www; }} >/dev/null && cat /run/www/data | {sum}"
        ));
        let made = made.timeout(LONG).text().unwrap();
        let got = to.sh(format!(
            "wget -q -O /run/got http://{address}/data && cat /run/got | {sum}"
        ));
        assert_eq!(got.timeout(LONG).text().unwrap(), made, "from {address}");
    }
}

/// Backend killed and started again: the guests live, and traffic comes back.
fn traffic_comes_back(node: &Client, vms: [&Vm; 2], first: &Client, options: &str) {
    stop_testpmd(node);
    until("end of the connections", || {
        vms.iter()
            .all(|vm| counter(vm, "vhost_user_connected") == 0)
    });
    let lost = first.sh("ping -c 1 -W 1 10.9.0.2").run().unwrap();
    assert!(!lost.status.success(), "without a backend: {lost}");
    start_testpmd(node, 1, options);
    until("connections", || {
        vms.iter()
            .all(|vm| counter(vm, "vhost_user_connected") == 1)
    });
    assert_eq!(counter(vms[0], "vhost_user_connections"), 2);
    pings(node, first);
}

#[test]
fn two_pv_guests_talk_through_testpmd_also_after_its_end_and_their_pauses() {
    ensure_packages(&["dpdk-dev"]).unwrap();
    natively(
        || {
            let workloads = blanket_testbed::workloads().unwrap();
            native("vhost-pv")
                .unwrap()
                .inject(workloads, "/payload/workloads.ext4")
        },
        |host| {
            // Without segmentation offload, as it is by default, and with.
            for (i, options) in ["", ",tso=1,legacy-ol-flags=1"].into_iter().enumerate() {
                start_testpmd(host, 1, options);
                let run = |n: usize| {
                    Vm::pv(
                        host,
                        &format!("pv{i}{n}"),
                        &format!("blanket.ip=10.9.0.{}/24", n + 1),
                        &format!(
                            "--net vhost-user=/run/vu{n} --memory 256M --on-reboot exit \
                             --disk path=/payload/workloads.ext4,readonly=on"
                        ),
                    )
                    .unwrap()
                };
                let (one, two) = (run(0), run(1));
                let (first, second) = (one.guest().unwrap(), two.guest().unwrap());
                let info = one.blanket("info", "").unwrap();
                let info = String::from_utf8_lossy(&info.stdout).into_owned();
                assert!(info.contains("vhost-user /run/vu0"), "{info}");
                pings(host, &first);
                data_arrives(&first, &second, 32);
                iperf3(&first, &second);
                if i > 0 {
                    // What follows does not depend on the offload.
                    for vm in [&one, &two] {
                        assert!(vm.blanket("rm", "--force").unwrap().status.success());
                    }
                    return stop_testpmd(host);
                }
                traffic_comes_back(host, [&one, &two], &first, options);
                for vm in [&one, &two] {
                    assert!(vm.blanket("pause", "").unwrap().status.success());
                    assert!(vm.blanket("resume", "").unwrap().status.success());
                }
                pings(host, &first);
                data_arrives(&first, &second, 4);
                assert_eq!(counter(&one, "rx_errors") + counter(&two, "rx_errors"), 0);
                assert_eq!(counter(&one, "tx_errors") + counter(&two, "tx_errors"), 0);
                // Saved and restored, the guest goes on with the backend that is there.
                drop((first, second));
                let name = format!("pv{i}0");
                host.sh(format!(
                    "blanket snapshot {name} /run/snap --stop && blanket rm {name} && \
                     blanket restore /run/snap && rm /run/snap"
                ))
                .text()
                .unwrap();
                pings(host, &one.guest().unwrap());
                for vm in [&one, &two] {
                    assert!(vm.blanket("rm", "--force").unwrap().status.success());
                }
                stop_testpmd(host);
            }
        },
    );
}

/// Joins `/run/vu0` and `/run/vu1` by ports of the overlay's.
fn start_cable(host: &Client) {
    host.sh("umask 0; echo $$ > /run/cable.pid; exec /usr/bin/cable /run/vu0 /run/vu1")
        .spawn("/run/cable.log")
        .unwrap();
    host.sh("until [ -S /run/vu0 ] && [ -S /run/vu1 ]; do sleep 0.1; done")
        .timeout(LONG)
        .text()
        .unwrap();
}

/// The program with the cable, which no node has.
fn cable() -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "-p", "blanket-overlay", "--example", "cable"]);
    build.args(["--message-format", "json"]);
    let output = build.current_dir(folder).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let built = lines.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is = message["target"]["name"] == "cable";
        is.then(|| message["executable"].as_str().map(str::to_owned))?
    });
    built.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn pv_guests_live_through_the_end_of_the_overlays_ports_under_load() {
    natively(
        || {
            let workloads = blanket_testbed::workloads().unwrap();
            native("ports-pv")
                .unwrap()
                .inject(workloads, "/payload/workloads.ext4")
                .inject(cable(), "/usr/bin/cable")
        },
        |host| {
            start_cable(host);
            let run = |n: usize| {
                let flags = format!(
                    "--net vhost-user=/run/vu{n} --memory 256M --on-reboot exit \
                     --disk path=/payload/workloads.ext4,readonly=on"
                );
                let address = format!("blanket.ip=10.9.0.{}/24", n + 1);
                Vm::pv(host, &format!("cable{n}"), &address, &flags).unwrap()
            };
            let (one, two) = (run(0), run(1));
            let (first, second) = (one.guest().unwrap(), two.guest().unwrap());
            pings(host, &first);
            data_arrives(&first, &second, 16);
            iperf3(&first, &second);
            // One stream of TCP and one of pings go on through five ends.
            let load = "chroot /mnt iperf3 -J -t 20 -c 10.9.0.2 > /run/iperf3.json";
            first.sh(load).spawn("/run/iperf3.log").unwrap();
            let load = "exec ping -i 0.01 -w 20 10.9.0.1 > /run/ping.txt";
            second.sh(load).spawn("/run/ping.log").unwrap();
            for count in 1..=5 {
                std::thread::sleep(Duration::from_secs(2));
                host.sh("kill -9 $(cat /run/cable.pid)").text().unwrap();
                start_cable(host);
                until("connections", || {
                    [&one, &two].iter().all(|vm| {
                        counter(vm, "vhost_user_connections") == count + 1
                            && counter(vm, "vhost_user_connected") == 1
                    })
                });
            }
            let report = first.sh("while pidof iperf3; do sleep 0.5; done; cat /run/iperf3.json");
            let report = report.timeout(LONG).text().unwrap();
            let report: Value = serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
            let received = report["end"]["sum_received"]["bytes"].as_u64();
            assert!(received.is_some_and(|n| n > 8 << 20), "{report}");
            let summary =
                second.sh("while pidof ping; do sleep 0.5; done; tail -n 3 /run/ping.txt");
            println!(
                "through five ends: {}",
                summary.timeout(LONG).text().unwrap()
            );
            pings(host, &first);
            data_arrives(&first, &second, 4);
            host.sh("kill $(cat /run/cable.pid)").text().unwrap();
        },
    );
}

/// iperf3 between the guests, from the disk with programs.
fn iperf3(first: &Client, second: &Client) {
    for guest in [first, second] {
        guest
            .sh(
                "modprobe ext4; mount -o ro /dev/xvda /mnt; mount --bind /dev /mnt/dev; \
                 mount -t proc proc /mnt/proc; mount -t tmpfs tmpfs /mnt/tmp",
            )
            .text()
            .unwrap();
    }
    second.sh("chroot /mnt iperf3 -s -D").text().unwrap();
    let report = first.sh("sleep 1; chroot /mnt iperf3 -J -t 5 -c 10.9.0.2");
    let report = report.timeout(LONG).run().unwrap();
    let parsed: Value = serde_json::from_slice(&report.stdout).unwrap_or_default();
    let received = parsed["end"]["sum_received"]["bytes"].as_u64();
    assert!(received.is_some_and(|n| n > 8 << 20), "{report}");
    println!("iperf3 between the guests: {received:?} bytes in 5 s");
}

/// testpmd with all that it loads. Copies would be other libraries than those that the plugins
/// are linked with: so only plugins that no other is linked with.
fn testpmd_files() -> Vec<String> {
    ensure_packages(&["dpdk-dev"]).unwrap();
    let script = "plugins=$(echo /usr/lib/x86_64-linux-gnu/dpdk/pmds-*); \
                  set -- /usr/bin/dpdk-testpmd; \
                  for name in net_vhost mempool_ring; do \
                  set -- \"$@\" $plugins/librte_$name.so; done; \
                  printf '%s\\n' \"$@\"; \
                  ldd \"$@\" | sed -n 's/.*=> \\(\\/[^ ]*\\) .*/\\1/p' | sort -u";
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    list.lines().map(str::to_owned).collect()
}

#[test]
fn two_hvm_guests_talk_through_testpmd_by_their_own_queues() {
    let files = testpmd_files();
    let describe = || {
        let node = provider("vhost-hvm").unwrap().cpus(2).memory_mib(3072);
        files.iter().fold(node, |node, file| {
            let path = match file.strip_prefix("/lib/") {
                Some(rest) => format!("/usr/lib/{rest}"),
                None => file.clone(),
            };
            node.inject(file, path)
        })
    };
    on_node(describe, |node| {
        // DPDK loads nothing from where everybody can write.
        node.sh("mkdir -p /var/run/dpdk && chmod 755 /")
            .text()
            .unwrap();
        start_testpmd(node, 2, "");
        let run = |n: usize| {
            Vm::linux(
                node,
                &format!("hvm{n}"),
                &format!("blanket.ip=10.9.0.{}/24", n + 1),
                &format!("--net vhost-user=/run/vu{n} --memory 192M"),
            )
            .unwrap()
        };
        let (one, two) = (run(0), run(1));
        let (first, second) = (one.guest().unwrap(), two.guest().unwrap());
        let carrier = || first.sh("cat /sys/class/net/eth0/carrier").text().unwrap();
        until("carrier", || carrier() == "1\n");
        pings(node, &first);
        data_arrives(&first, &second, 2);
        stop_testpmd(node);
        until("carrier off", || carrier() == "0\n");
        start_testpmd(node, 2, "");
        until("carrier on", || carrier() == "1\n");
        pings(node, &first);
        for vm in [&one, &two] {
            assert!(vm.blanket("pause", "").unwrap().status.success());
            assert!(vm.blanket("resume", "").unwrap().status.success());
        }
        pings(node, &first);
        data_arrives(&first, &second, 1);
        drop((first, second));
        they_move(node, &[one, two]);
    });
}

/// Both guests move to fresh monitors, with other ports of the backend, which writes their memory
/// meanwhile. They talk as long as both have one of the same pair.
fn they_move<'a>(node: &'a Client, vms: &[Vm<'a>; 2]) {
    let [first, second] = vms.each_ref().map(|vm| vm.guest().unwrap());
    second
        .sh("exec ping -i 0.02 -s 1400 10.9.0.1")
        .spawn("/run/ping.log")
        .unwrap();
    first.sh("sleep 1").text().unwrap();
    drop((first, second));
    let mut moved = Vec::new();
    for (n, vm) in vms.iter().enumerate() {
        let flags = format!(
            "--net vhost-user=/run/vu{} --mode pre-copy --verify --downtime 5000",
            n + 2
        );
        let (vm, report) = vm.migrate(&format!("moved{n}"), &flags).unwrap();
        // The first one was written to by the backend alone, for the most part.
        assert!(report["rounds"][0]["dirty"].as_u64() > Some(0), "{report}");
        moved.push(vm);
    }
    let [first, second] = [&moved[0], &moved[1]].map(|vm| vm.guest().unwrap());
    pings(node, &first);
    data_arrives(&first, &second, 1);
}
