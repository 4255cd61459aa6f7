//! Stock Debian guests in the `hvm` machine, on a provider's node.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::Duration;

use blanket_system_tests::{Vm, iperf3, on_node, payload, provider};
use blanket_testbed::{Client, Node};

/// A shell command that prints the checksum of its input.
const SHA: &str = "sha256sum - | cut -c 1-64";

/// An ELF image like the node's vmlinux, but without notes: no PVH entry.
fn strip_notes(node: &Node) {
    let elf = node
        .command("head")
        .args(["-c", "4096", "/payload/guest/vmlinux"])
        .run()
        .unwrap()
        .stdout;
    let count = u16::from_le_bytes([elf[56], elf[57]]);
    let note = (0..usize::from(count))
        .map(|i| 64 + 56 * i)
        .find(|at| elf[*at] == 4)
        .unwrap();
    node.sh(format!(
        "cp /payload/guest/vmlinux /payload/guest/plain && printf '\\0' | \
         dd of=/payload/guest/plain bs=1 seek={note} conv=notrunc"
    ))
    .text()
    .unwrap();
}

#[test]
fn every_kernel_form_boots_with_one_two_and_four_vcpus() {
    on_node(
        || provider("forms").unwrap(),
        |node| {
            strip_notes(node);
            for (kernel, cpus) in [("vmlinux", 1), ("vmlinuz", 2), ("plain", 4)] {
                let vm = Vm::run(
                    node,
                    kernel,
                    &format!(
                        "--kernel /payload/guest/{kernel} --initrd /payload/guest/initrd.cpio \
                 --cmdline 'console=ttyS0 quiet' --cpus {cpus} --memory 256M"
                    ),
                )
                .unwrap();
                let guest = vm.guest().unwrap();
                assert_eq!(guest.command("nproc").text().unwrap(), format!("{cpus}\n"));
                // Every vCPU takes timer interrupts, and the clock is KVM's.
                let timers = guest.sh("grep LOC: /proc/interrupts").text().unwrap();
                let counts = timers.split_ascii_whitespace().skip(1).take(cpus);
                assert!(counts.map(|n| n.parse::<u32>().unwrap()).all(|n| n > 0));
                let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
                assert_eq!(
                    guest.command("cat").arg(clock).text().unwrap(),
                    "kvm-clock\n"
                );
                drop(guest);
                assert!(vm.blanket("stop", "--force").unwrap().status.success());
            }
        },
    );
}

#[test]
fn memory_beyond_4_gib_and_huge_pages_reach_the_guest() {
    on_node(
        || provider("memory").unwrap().memory_mib(6144),
        |node| {
            let total = |vm: &Vm| {
                let text = vm.guest().unwrap().sh("grep MemTotal /proc/meminfo").text();
                let text = text.unwrap();
                let kib: u64 = text
                    .split_ascii_whitespace()
                    .nth(1)
                    .unwrap()
                    .parse()
                    .unwrap();
                kib >> 10
            };
            let vm = Vm::linux(node, "large", "", "--memory 4608M --shared-memory").unwrap();
            let mib = total(&vm);
            assert!((4200..=4608).contains(&mib), "{mib} MiB");
            vm.blanket("rm", "--force").unwrap();
            node.sh("echo 160 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
                .text()
                .unwrap();
            let vm = Vm::linux(node, "huge", "", "--memory 256M --hugepages 2m").unwrap();
            assert!(total(&vm) > 180);
            // What the guest has not touched yet is reserved.
            let count = |name: &str| -> u64 {
                let line = node
                    .sh(format!("grep {name} /proc/meminfo"))
                    .text()
                    .unwrap();
                line.split_ascii_whitespace()
                    .nth(1)
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            let free = count("HugePages_Free") - count("HugePages_Rsvd");
            assert_eq!(free, 160 - 128, "huge pages that nobody has");
        },
    );
}

#[test]
fn the_guests_network_carries_bulk_traffic_both_ways() {
    on_node(
        || provider("network").unwrap(),
        |node| {
            let vm = Vm::linux(
                node,
                "net",
                "blanket.ip=10.9.0.2/24",
                "--cpus 2 --net tap,tap=tap9,host_ip=10.9.0.1/24,mac=52:54:00:09:00:02,mtu=1500",
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            let link = guest.sh("cat /sys/class/net/eth0/address").text().unwrap();
            assert_eq!(link, "52:54:00:09:00:02\n");
            node.sh("ping -c 5 -i 0.2 -W 5 10.9.0.2").text().unwrap();
            // 16 MiB each way by TCP with offloads, compared by checksum.
            node.sh(
                "mkdir /run/www && dd if=/dev/urandom of=/run/www/data bs=1M count=16 && \
         httpd -p 10.9.0.1:80 -h /run/www",
            )
            .text()
            .unwrap();
            let sum = node
                .sh(format!("cat /run/www/data | {SHA}"))
                .text()
                .unwrap();
            let there =
                format!("wget -q -O /run/data http://10.9.0.1/data && cat /run/data | {SHA}");
            assert_eq!(guest.sh(there).text().unwrap(), sum, "node to guest");
            guest.sh("httpd -p 80 -h /run").text().unwrap();
            let back = format!(
                "curl -sf --retry 20 --retry-connrefused --retry-delay 1 http://10.9.0.2/data | {SHA}"
            );
            assert_eq!(node.sh(back).text().unwrap(), sum, "guest to node");
            // Frames stay whole, larger than the MTU.
            let info = vm.info().unwrap();
            let counter = |name: &str| {
                info["metrics"]["devices"]["net0"][name]
                    .as_u64()
                    .unwrap_or_else(|| panic!("{info}"))
            };
            assert!(counter("tx_bytes") > 16 << 20 && counter("rx_bytes") > 16 << 20);
            assert!(counter("tx_bytes") / counter("tx_packets") > 1500);
            assert_eq!(counter("rx_errors") + counter("tx_errors"), 0);
            // Both queue pairs are in use.
            let irqs = guest.sh("grep -c 'virtio.*input' /proc/interrupts").text();
            assert!(irqs.unwrap().trim().parse::<u32>().unwrap() >= 2);
        },
    );
}

/// Two reads of a guest's hardware random number generator differ.
fn entropy_comes_from_the_node(vm: &Vm, guest: &Client) {
    guest.sh("modprobe virtio_rng").text().unwrap();
    let read = "dd if=/dev/hwrng bs=512 count=4 2>/dev/null | sha256sum";
    assert_ne!(
        guest.sh(read).text().unwrap(),
        guest.sh(read).text().unwrap()
    );
    let bytes = vm.info().unwrap()["metrics"]["devices"]["rng0"]["bytes"].clone();
    assert!(bytes.as_u64().unwrap() >= 4096, "{bytes}");
}

#[test]
fn disks_of_every_kind_hold_what_the_guest_writes_and_entropy_comes_from_the_node() {
    on_node(
        || provider("disks").unwrap(),
        |node| {
            node.sh("cd /run && truncate -s 64M raw && truncate -s 64M sync && \
         dd if=/dev/urandom of=base bs=1M count=32 && truncate -s 8M ro && \
         mkdir small && mount -t tmpfs -o size=4m none small && truncate -s 32M small/img")
                .text()
                .unwrap();
            let images = tempfile::tempdir().unwrap();
            let overlay = images.path().join("overlay");
            let made = std::process::Command::new("qemu-img")
                .args([
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-b",
                    "/run/base",
                    "-F",
                    "raw",
                    "-u",
                ])
                .arg(&overlay)
                .arg("32M")
                .status()
                .unwrap();
            assert!(made.success());
            node.put(&overlay, "/run/overlay").unwrap();
            let vm = Vm::linux(
                node,
                "disks",
                "",
                "--cpus 2 --disk path=/run/raw,serial=raw-0 --disk path=/run/sync,engine=sync \
         --disk path=/run/overlay,backing=on --disk path=/run/ro,readonly=on \
         --disk /run/small/img",
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            assert_eq!(
                guest.sh("cat /sys/block/vda/serial").text().unwrap(),
                "raw-0"
            );
            let base = node.sh(format!("cat /run/base | {SHA}")).text().unwrap();
            assert_eq!(
                guest.sh(format!("cat /dev/vdc | {SHA}")).text().unwrap(),
                base
            );
            for (disk, image) in [("vda", "raw"), ("vdb", "sync"), ("vdc", "overlay")] {
                let script = format!(
                    "dd if=/dev/urandom of=/run/x bs=64k count=128 && \
             dd if=/run/x of=/dev/{disk} bs=4k seek=256 conv=fsync && \
             echo 3 > /proc/sys/vm/drop_caches && \
             dd if=/dev/{disk} bs=4k skip=256 count=2048 | cmp - /run/x && cat /run/x | {SHA}"
                );
                let sum = guest.sh(script).text().unwrap();
                if image != "overlay" {
                    let there = node
                        .sh(format!(
                            "dd if=/run/{image} bs=4k skip=256 count=2048 | {SHA}"
                        ))
                        .text()
                        .unwrap();
                    assert_eq!(there, sum, "{image}");
                }
            }
            assert!(
                !guest
                    .sh("echo x > /dev/vdd")
                    .run()
                    .unwrap()
                    .status
                    .success()
            );
            assert_eq!(
                node.sh(format!("cat /run/base | {SHA}")).text().unwrap(),
                base,
                "the backing file is never written"
            );
            // Discarded blocks go back to the node.
            let blocks = "stat -c %b /run/raw";
            let before: u64 = node.sh(blocks).text().unwrap().trim().parse().unwrap();
            let discarded = guest.sh("blkdiscard /dev/vda").text();
            assert!(
                discarded.is_ok(),
                "{discarded:?}: {:?}",
                node.sh("blanket ps -a; blanket logs --monitor disks")
                    .text()
            );
            let after: u64 = node.sh(blocks).text().unwrap().trim().parse().unwrap();
            assert!(after < before / 2, "{before} -> {after} blocks");
            entropy_comes_from_the_node(&vm, &guest);
            a_full_disk_of_the_node_is_waited_for(node, &vm, &guest);
            vm.blanket("stop", "--force").unwrap();
            node.get("/run/overlay", &overlay).unwrap();
            let check = std::process::Command::new("qemu-img")
                .args(["info", "--output=json", "-f", "qcow2"])
                .arg(&overlay)
                .output()
                .unwrap();
            let info: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
            assert!(info["actual-size"].as_u64().unwrap() > 8 << 20, "{info}");
        },
    );
}

/// /dev/vde lies on 4 MiB of the node: the guest waits until there are more.
fn a_full_disk_of_the_node_is_waited_for(node: &Node, vm: &Vm, guest: &Client) {
    let write = "dd if=/dev/urandom of=/dev/vde bs=1M count=16 conv=fsync; echo $? >/run/status";
    guest.sh(write).spawn("/run/written").unwrap();
    let mut info = vm.info().unwrap();
    for _ in 0..300 {
        if info["vm"]["state"] == "paused" {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        info = vm.info().unwrap();
    }
    assert_eq!(info["vm"]["state"], "paused", "{info}");
    assert!(info.to_string().contains("no room"), "{info}");
    node.sh("mount -o remount,size=32m /run/small")
        .text()
        .unwrap();
    assert!(vm.blanket("resume", "").unwrap().status.success());
    let status = "until [ -e /run/status ]; do sleep 0.1; done; cat /run/status";
    assert_eq!(guest.sh(status).text().unwrap(), "0\n");
    // The guest goes on, with its other disks too.
    guest
        .sh("dd if=/run/x of=/dev/vda bs=4k count=16 conv=fsync")
        .text()
        .unwrap();
    // Nor does a new VM start half: its home is full.
    let run = "mkdir -p /run/full && mount -t tmpfs -o size=16k none /run/full && \
               { dd if=/dev/zero of=/run/full/x bs=4k count=8 || true; }; \
               blanket --home /run/full run late --kernel /payload/guest/vmlinux";
    let output = node.sh(run).run().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && error.contains("No space left"),
        "{error}"
    );
    let left = node.sh("blanket --home /run/full ps -a --json").text();
    assert_eq!(left.unwrap().trim(), "[]");
}

/// iperf3 between the node and a guest at 10.9.0.2, and pings of the guest.
fn iperf3_runs_both_ways(node: &Node, guest: &Client) {
    guest.sh("ping -c 3 -i 0.2 10.9.0.1").text().unwrap();
    for options in ["-t 3", "-t 3 -R"] {
        let received = iperf3(guest, node, "10.9.0.2", options).unwrap();
        assert!(received > 4 << 20, "{options}: {received}");
    }
}

#[test]
fn a_stock_debian_keeps_its_disk_over_a_reboot_and_powers_off_on_the_button() {
    on_node(
        || provider("debian").unwrap(),
        |node| {
            let vm = Vm::linux(
                node,
                "debian",
                "root=LABEL=guest blanket.ip=10.9.0.2/24",
                "--memory 512M --disk /payload/guest/disk.raw --net tap,host_ip=10.9.0.1/24",
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            let boot_id = "cat /proc/sys/kernel/random/boot_id";
            let first = guest.sh(boot_id).text().unwrap();
            guest
                .sh("echo kept > /var/tmp/note && sync")
                .text()
                .unwrap();
            guest.sh("systemctl reboot").spawn("/dev/null").unwrap();
            drop(guest);
            // The monitor stays the same; the guest comes up anew.
            let deadline = std::time::Instant::now() + Duration::from_secs(80);
            let guest = loop {
                let guest = vm.guest().unwrap();
                match guest.sh(boot_id).timeout(Duration::from_secs(5)).text() {
                    Ok(id) if id != first => break guest,
                    _ => assert!(
                        std::time::Instant::now() < deadline,
                        "no reboot: {}",
                        vm.blanket("logs", "").unwrap()
                    ),
                }
                std::thread::sleep(Duration::from_secs(1));
            };
            assert_eq!(guest.sh("cat /var/tmp/note").text().unwrap(), "kept\n");
            let page = "curl -s --retry 30 --retry-connrefused --retry-delay 1 http://10.9.0.2/";
            assert_eq!(
                node.sh(page).text().unwrap(),
                blanket_testbed::GUEST_PAGE,
                "the network works after it"
            );
            iperf3_runs_both_ways(node, &guest);
            drop(guest);
            let stopped = vm.blanket("stop", "--timeout 60").unwrap();
            assert!(stopped.status.success());
            let ended = vm.ended().unwrap();
            assert!(ended.contains("powered off"), "{ended}");
            let log = vm.blanket("logs", "").unwrap().stdout;
            let log = String::from_utf8_lossy(&log);
            assert!(log.contains("Power down"), "by the guest itself: {log}");
        },
    );
}

#[test]
fn two_vms_share_a_bridge_and_neither_a_writable_disk() {
    on_node(
        || provider("two").unwrap(),
        |node| {
            node.sh(
                "ip link add br0 type bridge && ip link set br0 up && truncate -s 16M /run/disk",
            )
            .text()
            .unwrap();
            let flags = "--memory 256M --net tap,bridge=br0";
            let one = Vm::linux(
                node,
                "one",
                "blanket.ip=10.9.0.1/24",
                &format!("{flags} --disk /run/disk"),
            )
            .unwrap();
            let two = Vm::linux(node, "two", "blanket.ip=10.9.0.2/24", flags).unwrap();
            let listed = node.sh("blanket ps --json").text().unwrap();
            let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
            assert_eq!(listed.as_array().unwrap().len(), 2);
            one.guest().unwrap();
            let guest = two.guest().unwrap();
            guest.sh("ping -c 3 -W 10 10.9.0.1").text().unwrap();
            let refused = node
                .sh("blanket run three --kernel /payload/guest/vmlinux --disk /run/disk")
                .run()
                .unwrap();
            let error = String::from_utf8_lossy(&refused.stderr);
            assert!(
                !refused.status.success() && error.contains("in use"),
                "{error}"
            );
            let taken = node
                .sh("blanket run two --kernel /payload/guest/vmlinux")
                .run()
                .unwrap();
            let error = String::from_utf8_lossy(&taken.stderr);
            assert!(
                !taken.status.success() && error.contains("blanket rm two"),
                "{error}"
            );
        },
    );
}

/// What a guest's processes wait for, and the interrupts that it has had.
fn inside(guest: &Client) -> String {
    let look = "ls -l /run; cat /run/*.log /proc/interrupts; for process in /proc/[0-9]*; do \
                [ -z \"$(cat $process/cmdline)\" ] || echo $process $(tr '\\0' ' ' <$process/cmdline) \
                $(head -n 4 $process/stack); done";
    let looked = guest.sh(look).timeout(Duration::from_secs(30)).run();
    looked.map_or_else(|error| error.to_string(), |looked| looked.to_string())
}

#[test]
fn a_guest_under_load_is_paused_and_resumed_without_harm() {
    on_node(
        || provider("pause").unwrap(),
        |node| {
            node.sh("truncate -s 64M /run/disk").text().unwrap();
            let vm = Vm::linux(
                node,
                "load",
                "blanket.ip=10.9.0.2/24",
                "--cpus 2 --disk /run/disk --net tap,host_ip=10.9.0.1/24",
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            // Disk and network are busy: a pattern is written over and over, pings run.
            guest
                .sh("dd if=/dev/urandom of=/run/x bs=1M count=8; n=0; \
             while [ ! -e /run/stop ]; do dd if=/run/x of=/dev/vda bs=4k conv=fsync || exit 1; \
             n=$((n + 1)); echo $n > /run/rounds; done; touch /run/stopped")
                .spawn("/run/load.log")
                .unwrap();
            node.sh("ping -i 0.05 10.9.0.2")
                .spawn("/run/ping.log")
                .unwrap();
            let exits = || {
                let info = vm.info().unwrap();
                let vcpus = info["metrics"]["vcpus"].as_array().unwrap().clone();
                let sum = |vcpu: &serde_json::Value| {
                    vcpu["exits_io"].as_u64().unwrap() + vcpu["exits_mmio"].as_u64().unwrap()
                };
                let writes = info["metrics"]["devices"]["blk0"]["writes"]
                    .as_u64()
                    .unwrap();
                (vcpus.iter().map(sum).sum::<u64>(), writes)
            };
            for _ in 0..15 {
                assert!(vm.blanket("pause", "").unwrap().status.success());
                let before = exits();
                std::thread::sleep(Duration::from_millis(100));
                assert_eq!(exits(), before, "a paused guest does nothing");
                assert!(vm.blanket("resume", "").unwrap().status.success());
                std::thread::sleep(Duration::from_millis(100));
            }
            let state = vm.blanket("resume", "").unwrap();
            assert!(!state.status.success(), "it is running already");
            guest
                .sh(
                    "touch /run/stop; until [ -e /run/stopped ]; do sleep 0.1; done; \
             echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M count=8 | cmp - /run/x",
                )
                .text()
                .unwrap_or_else(|error| panic!("{error}\n{}", inside(&guest)));
            let rounds = guest.sh("cat /run/rounds").text().unwrap();
            assert!(rounds.trim().parse::<u32>().unwrap() > 0);
            node.sh("ping -c 3 -W 5 10.9.0.2").text().unwrap();
            // A reset brings the guest back from its kernel.
            assert!(vm.blanket("reset", "").unwrap().status.success());
            drop(guest);
            let guest = vm.guest().unwrap();
            assert!(!guest.sh("[ -e /run/stop ]").run().unwrap().status.success());
        },
    );
}

#[test]
fn a_malicious_guest_harms_nobody_but_itself() {
    on_node(
        || {
            provider("evil")
                .unwrap()
                .inject(payload("evil").unwrap(), "/evil")
        },
        |node| {
            node.sh("truncate -s 16M /run/disk").text().unwrap();
            let flags =
                "--kernel /evil --memory 64M --disk /run/disk --net tap,queues=2 --io-threads 2";
            let vm = Vm::run(node, "evil", flags).unwrap();
            let ended = vm.ended().unwrap();
            assert!(ended.contains("powered off"), "{ended}");
            let log = vm.blanket("logs", "").unwrap().stdout;
            let log = String::from_utf8_lossy(&log);
            assert!(log.contains("evil: survived"), "{log}");
            let lines = vm.blanket("logs", "--monitor | wc -l").unwrap().stdout;
            let lines: u32 = String::from_utf8_lossy(&lines).trim().parse().unwrap();
            assert!(lines < 500, "{lines} lines in the monitor's log");
        },
    );
}
