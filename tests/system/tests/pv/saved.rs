//! Guests that are saved to a file and go on in other processes, and guests that suspend
//! themselves.

use std::time::{Duration, Instant};

use blanket_system_tests::{Vm, natively, on_node, provider};
use blanket_testbed::{Client, Host};

use super::{LONG, assert_kernel_is_content, assert_stops, loaded, with_workloads};

/// Holds values in registers of every kind, vectors among them, until `/run/stop` is there.
fn watches_registers(guest: &Client) {
    for processor in [0, 1] {
        let watch = format!(
            "until [ -e /run/stop ]; do taskset $((1 << {processor})) guest-check hold 3 || \
             touch /run/wrong-registers; done; touch /run/watched-{processor}"
        );
        guest.sh(watch).spawn("/run/registers.log").unwrap();
    }
}

/// No register had another's value.
fn registers_were_right(guest: &Client) {
    let check = "touch /run/stop; \
                 for i in $(seq 300); do [ -e /run/watched-0 -a -e /run/watched-1 ] && break; \
                 sleep 0.1; done; cat /run/registers.log; \
                 [ -e /run/watched-0 -a -e /run/watched-1 -a ! -e /run/wrong-registers ]";
    let checked = guest.sh(check).timeout(LONG).run().unwrap();
    assert!(checked.status.success(), "{checked}");
    let log = String::from_utf8_lossy(&checked.stdout);
    assert!(log.contains("\"bad\":0"), "{log}");
}

/// A load that writes to its disk and compares, checks registers and reads its clocks;
/// [`ends_load`] ends it.
fn begins_load(guest: &Client) {
    guest
        .sh(
            "n=0; while [ ! -e /run/stop ]; do n=$((n + 1)); at=$((n % 8)); \
             seq $n $((n + 200000)) | head -c 1048576 > /run/x; \
             dd if=/run/x of=/dev/xvdb bs=1M seek=$at conv=fsync,notrunc || exit 1; \
             echo 3 > /proc/sys/vm/drop_caches; \
             dd if=/dev/xvdb bs=1M skip=$at count=1 | cmp - /run/x || exit 1; \
             echo $n > /run/round && mv /run/round /run/rounds; done; touch /run/stopped",
        )
        .spawn("/run/load.log")
        .unwrap();
    guest
        .sh("until [ -e /run/stop ]; do guest-check clock 1 || touch /run/wrong-clock; done")
        .spawn("/run/clock.log")
        .unwrap();
    watches_registers(guest);
}

fn rounds(guest: &Client) -> u32 {
    let rounds = guest.sh("cat /run/rounds 2>/dev/null || echo 0");
    rounds.text().unwrap().trim().parse().unwrap()
}

/// The guest does more rounds.
fn load_goes_on(guest: &Client) {
    let goal = rounds(guest) + 2;
    let deadline = Instant::now() + Duration::from_secs(60);
    while rounds(guest) < goal {
        let log = || guest.sh("cat /run/load.log").text().unwrap();
        assert!(Instant::now() < deadline, "{}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Nothing that was written was lost or changed, and no clock went back.
fn ends_load(guest: &Client) {
    let end = "touch /run/stop; for i in $(seq 300); do [ -e /run/stopped ] && break; sleep 0.1; \
               done; [ -e /run/stopped ] || { cat /run/load.log; exit 1; }; \
               [ ! -e /run/wrong-clock ] || { cat /run/clock.log; exit 1; }";
    let ended = guest.sh(end).timeout(LONG).run().unwrap();
    assert!(ended.status.success(), "{ended}");
    registers_were_right(guest);
    assert_kernel_is_content(guest);
}

#[test]
fn a_guest_under_load_is_saved_and_goes_on_in_new_processes() {
    natively(
        || with_workloads("saved"),
        |host| {
            let flags = "--cpus 2 --memory 512M";
            let (vm, guest) = loaded(host, "saved", flags);
            let boot_id = "cat /proc/sys/kernel/random/boot_id";
            let id = guest.sh(boot_id).text().unwrap();
            begins_load(&guest);
            let mut guest = guest;
            for flags in ["--stop", "--suspend --stop", "--stop", "--suspend --stop"] {
                load_goes_on(&guest);
                let saved = vm.blanket("snapshot", &format!("/run/snapshot {flags}"));
                let saved = saved.unwrap();
                assert!(saved.status.success(), "{saved}");
                drop(guest);
                assert!(vm.ended().unwrap().contains("powered off"));
                vm.blanket("rm", "").unwrap();
                let restored = host.sh("blanket restore /run/snapshot").run().unwrap();
                assert!(restored.status.success(), "{restored}");
                guest = vm.guest().unwrap();
                host.sh("ping -c 1 -W 10 10.9.0.2").text().unwrap();
            }
            load_goes_on(&guest);
            assert_eq!(guest.sh(boot_id).text().unwrap(), id);
            assert_eq!(guest.command("nproc").text().unwrap(), "2\n");
            // One that is suspended where it is goes on as it was.
            for _ in 0..3 {
                let suspended = vm.blanket("suspend", "").unwrap();
                assert!(suspended.status.success(), "{suspended}");
                assert_eq!(vm.info().unwrap()["state"], "suspended");
                assert!(vm.blanket("resume", "").unwrap().status.success());
                load_goes_on(&guest);
            }
            ends_load(&guest);
            assert!(vm.blanket("sysrq", "h").unwrap().status.success());
            let help = "until dmesg | grep -q 'sysrq: HELP'; do sleep 0.1; done";
            guest.sh(help).text().unwrap();
            let refused = vm.blanket("sysrq", "/").unwrap();
            assert!(!refused.status.success(), "{refused}");
            saves_while_it_goes_on(host, &vm, &guest);
            drop(guest);
            assert_stops(&vm);
            vm.blanket("rm", "").unwrap();
            refuses(host);
        },
    );
}

/// A snapshot of a VM that then writes to its disk.
fn saves_while_it_goes_on(host: &Host, vm: &Vm, guest: &Client) {
    let saved = vm.blanket("snapshot", "/run/later").unwrap();
    assert!(saved.status.success(), "{saved}");
    let info = vm.info().unwrap();
    assert_eq!(info["state"], "running");
    let size = host.sh("stat -c %b /run/later").text().unwrap();
    let size = size.trim().parse::<u64>().unwrap() * 512;
    let resident = &info["metrics"]["memory"]["guest_resident"];
    let resident = resident.as_u64().unwrap();
    assert!(
        (16 << 20..resident + (1 << 20)).contains(&size),
        "{size} bytes for {resident}"
    );
    let write = "dd if=/dev/zero of=/dev/xvdb bs=4k count=1 conv=fsync,notrunc";
    guest.sh(write).text().unwrap();
}

/// Snapshots that do not fit are refused with a reason, and leave nothing behind.
fn refuses(host: &Host) {
    let refused = |options: &str, why: &str| {
        let restore = format!("blanket restore {options} --name other");
        let output = host.sh(restore).run().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(why), "{error}");
    };
    refused("/run/later", "has changed since");
    let changed = "/run/later --changed-disks";
    refused(&format!("{changed} --memory 256M"), "other memory");
    refused(&format!("{changed} --cpus 1"), "other vCPUs");
    let cut = "head -c 1000000 /run/later > /run/cut";
    host.sh(cut).text().unwrap();
    refused("/run/cut --changed-disks", "cut off");
    refused("/payload/guest/vmlinuz", "no snapshot");
    let listed = host.sh("blanket ps -a --json").text().unwrap();
    assert_eq!(listed.trim(), "[]");
}

#[test]
fn guests_of_both_machines_are_saved_and_go_on_under_hardware_virtualization() {
    on_node(
        || provider("saved").unwrap(),
        |node| {
            let flags = "--cpus 2 --memory 256M --on-reboot exit --disk /run/disk \
                         --net tap,host_ip=10.9.0.1/24";
            node.sh("truncate -s 16M /run/disk").text().unwrap();
            let address = "blanket.ip=10.9.0.2/24";
            let vm = Vm::linux(node, "hvm", address, flags).unwrap();
            goes_on(node, &vm, "/dev/vda", &["--stop", "--stop"]);
            let refused = vm.blanket("suspend", "").unwrap();
            let error = String::from_utf8_lossy(&refused.stderr);
            assert!(error.contains("pause it instead"), "{error}");
            vm.blanket("rm", "--force").unwrap();
            let vm = Vm::pv(node, "pv", address, flags).unwrap();
            goes_on(node, &vm, "/dev/xvda", &["--stop", "--suspend --stop"]);
        },
    );
}

/// The guest is saved and goes on: with what it had in memory and registers, its disk and its
/// network, on both its processors, and at the right speed of its clock.
fn goes_on(node: &Client, vm: &Vm, disk: &str, ways: &[&str]) {
    let mut guest = vm.guest().unwrap();
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let id = guest.sh(boot_id).text().unwrap();
    guest
        .sh("head -c 300000 /dev/urandom > /run/x")
        .text()
        .unwrap();
    watches_registers(&guest);
    for flags in ways {
        let flags = format!("/run/snapshot {flags} --timeout 120");
        let saved = vm.blanket("snapshot", &flags).unwrap();
        assert!(saved.status.success(), "{saved}");
        drop(guest);
        assert!(vm.ended().unwrap().contains("powered off"));
        vm.blanket("rm", "").unwrap();
        let restored = node.sh("blanket restore /run/snapshot").run().unwrap();
        assert!(restored.status.success(), "{restored}");
        guest = vm.guest().unwrap();
        assert_eq!(guest.sh(boot_id).text().unwrap(), id);
        let works = format!(
            "sleep 0.5; dd if=/run/x of={disk} conv=fsync,notrunc && \
             echo 3 > /proc/sys/vm/drop_caches && head -c 300000 {disk} | cmp - /run/x && \
             taskset 1 guest-check clock 1 && taskset 2 guest-check clock 1"
        );
        guest.sh(works).timeout(LONG).text().unwrap();
        node.sh("ping -c 1 -W 20 10.9.0.2").text().unwrap();
        assert_kernel_is_content(&guest);
    }
    registers_were_right(&guest);
}
