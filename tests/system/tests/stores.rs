//! Volumes under guests: striped ones, full ones, and ones that vanish.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::time::{Duration, Instant};

use blanket_system_tests::{Vm, native, natively, on_node, provider};
use blanket_testbed::{Client, Disk, Provider};
use serde_json::Value;

/// Writes to a disk of the guest, past its caches, and reads it back.
const WRITE_AND_READ: &str = "dd if=/dev/urandom of=/run/data bs=1M count=24 2>/dev/null; \
    dd if=/run/data of=$DISK bs=1M oflag=direct conv=fsync 2>/dev/null; \
    dd if=$DISK bs=1M count=24 iflag=direct 2>/dev/null | cmp - /run/data; sha256sum </run/data";

fn on(disk: &str, script: &str) -> String {
    format!("set -e; DISK={disk}; {script}")
}

/// What `blanket info --json` says about the first disk.
fn disk(vm: &Vm) -> Value {
    vm.info().unwrap()["vm"]["devices"][0].clone()
}

/// Waits until the VM is in this state.
fn becomes(vm: &Vm, state: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let info = vm.info().unwrap();
        if info["state"] == state {
            return info;
        }
        assert!(Instant::now() < deadline, "not {state}: {info}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_striped_disk_has_what_a_guest_has_written_also_after_a_restart() {
    natively(
        || native("striped").unwrap(),
        |host| {
            let made = "cd /tmp; truncate -s 40M one; truncate -s 33M two; truncate -s 50M three; \
                        blanket store stripe --chunk 64K one two three";
            let said = host.sh(made).text().unwrap();
            assert!(said.contains("96 MiB on 3 volumes"), "{said}");
            let again = host
                .sh("cd /tmp; blanket store stripe one two")
                .run()
                .unwrap();
            let told = String::from_utf8_lossy(&again.stderr).into_owned();
            assert!(
                !again.status.success() && told.contains("--force"),
                "{told}"
            );
            let flags = |path: &str, stripe: &str| {
                format!(
                    "--memory 256M --cpus 2 --on-reboot exit --disk path=/tmp/{path},stripe={stripe}"
                )
            };
            let vm = Vm::pv(host, "first", "", &flags("one", "/tmp/two:/tmp/three")).unwrap();
            let guest = vm.guest().unwrap();
            let size = guest.sh("cat /sys/block/xvda/size").text().unwrap();
            assert_eq!(size.trim(), (96 * 2048).to_string());
            let sum = guest.sh(on("/dev/xvda", WRITE_AND_READ)).text().unwrap();
            drop(guest);
            assert_eq!(disk(&vm)["trouble"], Value::Null);
            vm.blanket("stop", "--timeout 60").unwrap();
            vm.ended().unwrap();
            // All of them were used, and about as much.
            let used = host
                .sh("du -m /tmp/one /tmp/two /tmp/three")
                .text()
                .unwrap();
            for line in used.lines() {
                let mib: u32 = line.split('\t').next().unwrap().parse().unwrap();
                assert!((8..=11).contains(&mib), "{used}");
            }
            let lone = host
                .sh("blanket run lone --machine pv --kernel /payload/guest/vmlinuz --disk /tmp/two")
                .run()
                .unwrap();
            let told = String::from_utf8_lossy(&lone.stderr).into_owned();
            assert!(told.contains("striped set"), "{told}");
            // Named in another order, as after a reboot of the node.
            let vm = Vm::pv(host, "second", "", &flags("three", "/tmp/one:/tmp/two")).unwrap();
            let read = "dd if=$DISK bs=1M count=24 iflag=direct 2>/dev/null | sha256sum";
            let guest = vm.guest().unwrap();
            assert_eq!(guest.sh(on("/dev/xvda", read)).text().unwrap(), sum);
        },
    );
}

/// Fills the file system below a guest's disk while it writes; it waits, says so, and goes on when
/// there is room.
fn full_and_not_full_again(host: &Client, vm: &Vm, name: &str) {
    let guest = vm.guest().unwrap();
    let sum = guest.sh(on(name, WRITE_AND_READ)).text().unwrap();
    host.sh("dd if=/dev/zero of=/mnt/small/ballast bs=1M 2>/dev/null || true")
        .text()
        .unwrap();
    let write = "(dd if=/run/data of=$DISK bs=1M seek=40 oflag=direct conv=fsync 2>/run/told; \
                 echo $? >/run/status) >/dev/null 2>&1 &";
    guest.sh(on(name, write)).text().unwrap();
    let info = becomes(vm, "paused");
    let trouble = info["vm"]["devices"][0]["trouble"].as_str().unwrap();
    assert!(
        trouble.contains("no room") && trouble.contains("resume"),
        "{info}"
    );
    assert!(
        info["metrics"]["devices"]["blk0"]["held"].as_u64() > Some(0),
        "{info}"
    );
    let shown = vm.blanket("info", "").unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("no room on the node"), "{shown}");
    // What waits cannot be saved.
    let saved = vm.blanket("snapshot", "/tmp/full.snap").unwrap();
    assert!(!saved.status.success(), "{saved}");
    // Still none: it waits again.
    assert!(vm.blanket("resume", "").unwrap().status.success());
    becomes(vm, "paused");
    host.sh("rm /mnt/small/ballast").text().unwrap();
    assert!(vm.blanket("resume", "").unwrap().status.success());
    let done = "until [ -e /run/status ]; do sleep 0.1; done; cat /run/status; \
                for skip in 0 40; do dd if=$DISK bs=1M skip=$skip count=24 iflag=direct 2>/dev/null \
                | sha256sum; done";
    let said = guest.sh(on(name, done)).text().unwrap();
    assert_eq!(said, format!("0\n{sum}{sum}"));
    let info = vm.info().unwrap();
    assert_eq!(info["metrics"]["devices"]["blk0"]["errors"], 0, "{info}");
    assert_eq!(disk(vm)["trouble"], Value::Null);
}

#[test]
fn a_full_store_stops_the_guest_until_there_is_room_and_nothing_is_lost() {
    natively(
        || native("full").unwrap(),
        |host| {
            host.sh(
                "mkdir -p /mnt/small; mount -t tmpfs -o size=72M none /mnt/small; \
                 chmod 777 /mnt/small",
            )
            .text()
            .unwrap();
            for engine in ["auto", "sync"] {
                host.sh("truncate -s 128M /mnt/small/disk").text().unwrap();
                let flags = format!(
                    "--memory 256M --on-reboot exit --disk path=/mnt/small/disk,engine={engine}"
                );
                let vm = Vm::pv(host, engine, "", &flags).unwrap();
                full_and_not_full_again(host, &vm, "/dev/xvda");
                vm.blanket("rm", "--force").unwrap();
                host.sh("rm /mnt/small/disk").text().unwrap();
            }
            host.sh("umount /mnt/small").text().unwrap();
        },
    );
}

#[test]
fn a_volume_that_vanishes_gives_the_guest_errors_and_is_named() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(64 << 20).unwrap();
    on_node(
        || {
            let node = provider("vanishing").unwrap().provider(Provider::BareMetal);
            node.disk(Disk::persistent(image.path()))
        },
        |node| {
            // With a queue that can be polled, as an administrator would set it up.
            node.sh("modprobe -r nvme; modprobe nvme poll_queues=1; \
                 until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; \
                 grep -q 1 /sys/block/nvme0n1/queue/io_poll")
                .text()
                .unwrap();
            // A volume of the node's: free, local, and measured.
            let told = node
                .sh("blanket store --volume nvme0n1 --json")
                .text()
                .unwrap();
            let told: Value = serde_json::from_str(&told).unwrap();
            let engines = told[0]["test"]["report"]["engines"].as_array().unwrap();
            for engine in engines {
                let reads = engine["figures"]["random_kiops"].as_f64();
                assert!(reads > Some(0.0), "{told}");
            }
            let flags = "--memory 256M --on-reboot exit --disk path=/dev/nvme0n1,engine=polled";
            let vm = Vm::pv(node, "losing", "", flags).unwrap();
            assert_eq!(disk(&vm)["engine"], "polled");
            let guest = vm.guest().unwrap();
            let sum = guest.sh(on("/dev/xvda", WRITE_AND_READ)).text().unwrap();
            node.sh("echo 1 >/sys/block/nvme0n1/device/device/remove")
                .text()
                .unwrap();
            let write =
                "dd if=/dev/zero of=$DISK bs=4k count=1 oflag=direct conv=fsync 2>&1 || true";
            let said = guest.sh(on("/dev/xvda", write)).text().unwrap();
            assert!(said.contains("Input/output error"), "{said}");
            // The guest lives, and so does its monitor, which knows why.
            assert_eq!(guest.sh("echo $((6 * 7))").text().unwrap(), "42\n");
            let info = vm.info().unwrap();
            assert_eq!(info["state"], "running", "{info}");
            assert!(
                info["metrics"]["devices"]["blk0"]["errors"].as_u64() > Some(0),
                "{info}"
            );
            let trouble = disk(&vm)["trouble"].as_str().unwrap().to_owned();
            assert!(
                trouble.contains("is gone") && trouble.contains("attach"),
                "{trouble}"
            );
            drop(guest);
            vm.blanket("rm", "--force").unwrap();
            // It comes back with what was flushed.
            node.sh("echo 1 >/sys/bus/pci/rescan; until [ -b /dev/nvme0n1 ]; do sleep 0.1; done")
                .text()
                .unwrap();
            let read = "dd if=/dev/nvme0n1 bs=1M count=24 2>/dev/null | sha256sum";
            assert_eq!(node.sh(read).text().unwrap(), sum);
        },
    );
}
