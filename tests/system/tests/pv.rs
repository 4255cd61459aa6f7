//! Stock Linux guests in the `pv` machine: natively on this machine's `/dev/kvm`, and on a
//! provider's node.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "pv/saved.rs"]
mod saved;

use std::time::{Duration, Instant};

use blanket_system_tests::{Vm, iperf3, native, natively, on_node, payload, provider};
use blanket_testbed::{
    BootImages, Client, GUEST_PAGE, GuestImages, Host, HostBuilder, KernelFlavor, workloads,
};
use serde_json::Value;

/// A guest is not slower than this natively.
const LONG: Duration = Duration::from_secs(400);

/// The kernel has nothing to complain about.
fn assert_kernel_is_content(guest: &Client) {
    let log = guest.sh("dmesg").text().unwrap();
    for complaint in [
        "BUG:",
        "Oops",
        "WARNING: CPU",
        "Call Trace",
        "soft lockup",
        "detected stall",
    ] {
        assert!(!log.contains(complaint), "{complaint} in\n{log}");
    }
}

/// `guest-check ARGUMENTS` in the guest, which must find nothing wrong.
fn check(guest: &Client, arguments: &str) -> Value {
    let command = guest.sh(format!("guest-check {arguments}"));
    let output = command.timeout(LONG).run().unwrap();
    assert!(output.status.success(), "guest-check {arguments}: {output}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The guest shuts down when it is asked to, through the xenstore.
fn assert_stops(vm: &Vm) {
    let stopped = vm.blanket("stop", "--timeout 60").unwrap();
    assert!(stopped.status.success(), "{stopped}");
    // Otherwise it says that the guest did not.
    assert!(stopped.stderr.is_empty(), "{stopped}");
    let ended = vm.ended().unwrap();
    assert!(ended.contains("powered off"), "{ended}");
}

/// Boots a kernel, looks at processors, timers and clock, and shuts the guest down.
fn boots(node: &Client, kernel: &str, initrd: &str, release: &str, cpus: usize) {
    let name = format!("{kernel}-{cpus}");
    let flags = format!("--cpus {cpus} --memory 512M");
    let vm = Vm::pv_kernel(node, &name, kernel, initrd, "", &flags).unwrap();
    let guest = vm.guest().unwrap();
    assert_eq!(guest.command("nproc").text().unwrap(), format!("{cpus}\n"));
    assert_eq!(guest.sh("uname -r").text().unwrap().trim(), release);
    let xen = guest.sh("cat /sys/hypervisor/type /sys/devices/system/clocksource/*/current*");
    assert_eq!(xen.text().unwrap(), "xen\nxen\n");
    // Every vCPU takes timer interrupts, and the others' calls.
    let timers = guest
        .sh("for i in $(seq 8); do taskset $((1 << i % $(nproc))) true; done; cat /proc/interrupts")
        .text()
        .unwrap();
    for cpu in 0..cpus {
        let line = timers
            .lines()
            .find(|line| line.trim_end().ends_with(&format!("timer{cpu}")));
        let count = line
            .and_then(|line| line.split_ascii_whitespace().nth(cpu + 1))
            .unwrap_or_else(|| panic!("no timer{cpu}: {timers}"));
        assert!(count.parse::<u32>().unwrap() > 0, "{timers}");
    }
    // Linux's early code disables interrupts thousands of times: once is enough.
    let first = vm.info().unwrap()["metrics"]["vcpus"][0].clone();
    let exceptions = first["monitor_exceptions"].as_u64().unwrap();
    assert!((1..3000).contains(&exceptions), "{first}");
    // Hypercalls jump to the shim, but for those of the start: what comes later adds none.
    let metrics = || vm.info().unwrap()["metrics"]["vcpus"].clone();
    let count = |vcpu: &Value, name: &str| vcpu[name].as_u64().unwrap();
    let started = metrics();
    guest
        .sh("for i in $(seq 400); do taskset 1 busybox true; done")
        .text()
        .unwrap();
    let later = metrics();
    let both = started
        .as_array()
        .unwrap()
        .iter()
        .zip(later.as_array().unwrap());
    for (before, after) in both {
        let by_syscall = count(after, "hypercalls_by_syscall");
        assert_eq!(
            by_syscall,
            count(before, "hypercalls_by_syscall"),
            "{later}"
        );
        assert!(count(after, "hypercalls") > 4 * by_syscall, "{later}");
    }
    assert_kernel_is_content(&guest);
    drop(guest);
    assert_stops(&vm);
    node.sh(format!("blanket rm {name}")).text().unwrap();
}

#[test]
fn stock_kernels_boot_natively_with_one_two_and_four_vcpus() {
    let mut kernels = Vec::new();
    for (name, flavor) in [
        ("cloud", KernelFlavor::Cloud),
        ("generic", KernelFlavor::Generic),
        ("backports", KernelFlavor::Backports),
    ] {
        match BootImages::get(flavor) {
            Ok(images) => kernels.push((name, images)),
            // There need not be any.
            Err(error) if flavor == KernelFlavor::Backports => println!("no backports: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
    let describe = || {
        kernels
            .iter()
            .fold(native("kernels").unwrap(), |host, (name, images)| {
                host.inject(&images.vmlinuz, format!("/payload/guest/{name}"))
                    .inject(&images.initrd, format!("/payload/guest/{name}.cpio"))
            })
    };
    natively(describe, |host| {
        for (name, images) in &kernels {
            for cpus in [1, 2, 4] {
                boots(host, name, &format!("{name}.cpio"), &images.release, cpus);
            }
        }
    });
}

/// Registers, processes and isolation. `rounds` of pipelines in each of four processes. What the
/// probe returned, if there was one.
fn guest_is_sound(guest: &Client, processes: u32, rounds: u32, isolated: bool) -> Value {
    let registers = check(guest, &format!("registers 4 {processes}"));
    assert_eq!(registers["processes"], 4 * processes);
    let pipelines = check(guest, &format!("pipeline 4 {rounds}"));
    assert_eq!(pipelines["rounds"], 4 * rounds);
    assert_eq!(pipelines["compressed"], true);
    let mut probe = Value::Null;
    if isolated {
        probe = check(guest, "probe");
        assert!(probe["attempts"].as_u64().unwrap() > 10_000);
        assert_eq!(probe["int80"], true);
        // What can be read is the same from one moment to the next.
        assert_eq!(check(guest, "probe")["readable"], probe["readable"]);
    }
    assert_kernel_is_content(guest);
    probe
}

/// What debuggers, bad returns from signals and bases that the kernel does not know do, they do
/// to their own processes. `breakpoints`: whether KVM has them, where that is known.
fn processes_disturb_nobody(guest: &Client, breakpoints: Option<bool>) {
    let debug = check(guest, "debug");
    if let Some(breakpoints) = breakpoints {
        assert_eq!(debug["breakpoints"], breakpoints);
    }
    check(guest, "returns");
    check(guest, "bases");
    assert_kernel_is_content(guest);
}

#[test]
fn registers_processes_and_isolation_hold_natively() {
    natively(
        || native("sound").unwrap(),
        |host| {
            let flags = "--cpus 2 --memory 1G --on-reboot exit";
            let doctor = host.sh("blanket doctor || true").text().unwrap();
            let hardware = doctor.contains("auto is hvm");
            let vm = Vm::pv(host, "isolated", "", flags).unwrap();
            let guest = vm.guest().unwrap();
            processes_disturb_nobody(&guest, Some(hardware));
            let probe = guest_is_sound(&guest, 100, 150, true);
            drop(guest);
            // QEMU's emulated processor takes any address for FS; this one is real.
            let returned = probe["returned"].as_array().unwrap();
            assert!(!returned.contains(&"wrfsbase".into()), "{returned:?}");
            vm.blanket("rm", "--force").unwrap();
            let trusted = format!("{flags} --trust-guest-user");
            let vm = Vm::pv(host, "trusted", "", &trusted).unwrap();
            let guest = vm.guest().unwrap();
            processes_disturb_nobody(&guest, Some(hardware));
            guest_is_sound(&guest, 100, 100, false);
            drop(guest);
            let listed = host.sh("blanket ps").text().unwrap();
            assert!(listed.contains("pv, trusts its users"), "{listed}");
            vm.blanket("rm", "--force").unwrap();
            let vm = Vm::pv(host, "single", "", &flags.replace("--cpus 2", "--cpus 1")).unwrap();
            guest_is_sound(&vm.guest().unwrap(), 100, 100, true);
        },
    );
}

#[test]
fn registers_processes_and_isolation_hold_under_hardware_virtualization() {
    on_node(
        || provider("pv").unwrap(),
        |node| {
            let vm = Vm::pv(node, "pv", "", "--cpus 2 --memory 512M --on-reboot exit").unwrap();
            let guest = vm.guest().unwrap();
            assert_eq!(
                guest.sh("cat /sys/hypervisor/type").text().unwrap(),
                "xen\n"
            );
            guest_is_sound(&guest, 4, 4, true);
            // QEMU's emulated processor does not load an inner guest's breakpoints at `vmrun`.
            processes_disturb_nobody(&guest, None);
            drop(guest);
            assert_stops(&vm);
        },
    );
}

/// This machine with the Debian that boots on nodes too.
fn with_debian(name: &str) -> HostBuilder {
    let disk = GuestImages::get().unwrap().disk;
    native(name)
        .unwrap()
        .inject(disk, "/payload/guest/disk.raw")
}

#[test]
fn the_debian_of_the_hvm_machine_runs_natively_with_disk_and_network() {
    natively(
        || with_debian("debian"),
        |host| {
            let vm = Vm::pv(
                host,
                "debian",
                "root=LABEL=guest blanket.ip=10.9.0.2/24 systemd.show_status=0",
                "--memory 1G --cpus 2 --disk /payload/guest/disk.raw \
                 --net tap,host_ip=10.9.0.1/24,mac=52:54:00:09:00:02",
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            let state = guest
                .sh("systemctl is-system-running --wait; systemctl is-active multi-user.target")
                .timeout(LONG)
                .run()
                .unwrap();
            let state = String::from_utf8_lossy(&state.stdout).into_owned();
            assert!(state.starts_with("running\nactive"), "{state}");
            let root = guest.sh("findmnt -no SOURCE /").text().unwrap();
            assert!(root.starts_with("/dev/xvda"), "{root}");
            let mac = guest.sh("cat /sys/class/net/e*/address").text().unwrap();
            assert_eq!(mac, "52:54:00:09:00:02\n");
            let page = "curl -sS --fail --retry 30 --retry-connrefused --retry-delay 1 \
                        http://10.9.0.2/";
            assert_eq!(host.sh(page).text().unwrap(), GUEST_PAGE);
            bulk_data_goes_both_ways(host, &guest);
            keeps_its_disk_over_a_reboot(&vm, guest);
            assert_eq!(
                host.sh(page).text().unwrap(),
                GUEST_PAGE,
                "after the reboot"
            );
            assert_kernel_is_content(&vm.guest().unwrap());
            assert_stops(&vm);
        },
    );
}

/// iperf3 between this machine and a guest at 10.9.0.2.
fn bulk_data_goes_both_ways(host: &Host, guest: &Client) {
    for options in ["-t 3", "-t 3 -R"] {
        let received = iperf3(guest, host, "10.9.0.2", options).unwrap();
        assert!(received > 64 << 20, "{options}: {received}");
    }
}

fn keeps_its_disk_over_a_reboot(vm: &Vm, guest: Client) {
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let first = guest.sh(boot_id).text().unwrap();
    let kept = "dd if=/dev/urandom of=/var/tmp/data bs=1M count=16 conv=fsync 2>/dev/null; \
                sha256sum < /var/tmp/data";
    let sum = guest.sh(kept).text().unwrap();
    guest.sh("systemctl reboot").spawn("/dev/null").unwrap();
    drop(guest);
    let deadline = Instant::now() + Duration::from_secs(80);
    let guest = loop {
        let guest = vm.guest().unwrap();
        match guest.sh(boot_id).timeout(Duration::from_secs(5)).text() {
            Ok(id) if id != first => break guest,
            _ => assert!(Instant::now() < deadline, "no reboot"),
        }
        std::thread::sleep(Duration::from_millis(500));
    };
    assert_eq!(guest.sh("sha256sum < /var/tmp/data").text().unwrap(), sum);
}

#[test]
fn a_guest_reboots_fifty_times() {
    natively(
        || native("reboots").unwrap(),
        |host| {
            // Instead of an init: a line, and the next boot.
            host.sh(
                "blanket run reboots --machine pv --kernel /payload/guest/vmlinuz \
                 --initrd /payload/guest/initrd.cpio --memory 256M \
                 --console socket=/run/reboots.console,log=/run/reboots.log \
                 --cmdline 'console=hvc0 quiet panic=-1 rdinit=/bin/sh -- \
                 -c \"echo the next; reboot -f\"'",
            )
            .text()
            .unwrap();
            let wait = "until [ $(grep -c 'the next' /run/reboots.log) -ge 51 ]; do \
                        blanket ps --json | grep -q running; sleep 0.2; done";
            let waited = host.sh(wait).timeout(LONG).text();
            let log = host.sh("blanket logs --monitor reboots").run().unwrap();
            assert!(waited.is_ok(), "{waited:?}\n{log}");
            let log = host.sh("cat /run/reboots.log").text().unwrap();
            assert!(
                !log.contains("Call Trace") && !log.contains("panic"),
                "{log}"
            );
        },
    );
}

#[test]
fn a_shell_on_the_console_takes_input_and_answers() {
    natively(
        || native("console").unwrap(),
        |host| {
            // No command line and no console are named: the defaults fit the machine.
            host.sh(
                "blanket run shell --machine pv --kernel /payload/guest/vmlinuz \
                 --initrd /payload/guest/initrd.cpio --memory 256M",
            )
            .text()
            .unwrap();
            host.sh(
                "until blanket logs shell | grep -q 'guest: init'; do sleep 0.1; done; \
                 blanket rm --force shell",
            )
            .text()
            .unwrap();
            host.sh(
                "blanket run shell --machine pv --kernel /payload/guest/vmlinuz \
                 --initrd /payload/guest/initrd.cpio --memory 256M \
                 --cmdline 'console=hvc0 quiet rdinit=/bin/sh' --console stdio; \
                 until blanket logs shell | grep -q '#'; do sleep 0.1; done",
            )
            .text()
            .unwrap();
            let say = "{ echo 'echo the answer is $((6 * 7))'; } | blanket console shell --idle 2";
            let said = host.sh(say).text().unwrap();
            assert!(said.contains("the answer is 42"), "{said}");
            // A flood both ways, of which nothing is lost: the agent's frames have checksums.
            let vm = Vm::pv(host, "flood", "", "--memory 256M --on-reboot exit").unwrap();
            let guest = vm.guest().unwrap();
            let data: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
            guest.write("/run/data", 0o600, &data).unwrap();
            assert!(
                guest.read("/run/data").unwrap() == data,
                "it changed on its way"
            );
        },
    );
}

/// This machine with programs for load on a disk, and a disk for data.
fn with_workloads(name: &str) -> HostBuilder {
    let disk = workloads().unwrap();
    native(name)
        .unwrap()
        .inject(disk, "/payload/workloads.ext4")
}

/// A guest that has the programs for load under `/mnt`, and 256 MiB of disk at `/dev/xvdb`.
fn loaded<'a>(host: &'a Host, name: &str, flags: &str) -> (Vm<'a>, Client) {
    host.sh(format!("truncate -s 256M /var/tmp/{name}"))
        .text()
        .unwrap();
    let vm = Vm::pv(
        host,
        name,
        "blanket.ip=10.9.0.2/24",
        &format!(
            "--disk path=/payload/workloads.ext4,readonly=on --disk /var/tmp/{name} \
             --net tap,host_ip=10.9.0.1/24 --on-reboot exit {flags}"
        ),
    )
    .unwrap();
    let guest = vm.guest().unwrap();
    guest
        .sh(
            "modprobe ext4; mount -o ro /dev/xvda /mnt; mount -t proc proc /mnt/proc; \
             mount -t sysfs sysfs /mnt/sys; mount --bind /dev /mnt/dev; \
             mount -t tmpfs tmpfs /mnt/tmp; mount -t tmpfs tmpfs /mnt/run",
        )
        .text()
        .unwrap();
    (vm, guest)
}

/// Stressors that check what they do, for some seconds.
fn stress(guest: &Client, seconds: u32) {
    let stress = guest.sh(format!(
        "cd /mnt/tmp; chroot /mnt sh -c 'cd /tmp; exec stress-ng --verify --timeout {seconds}s \
         --metrics-brief --cpu 2 --vm 1 --vm-bytes 64M --fork 2 --futex 2 --mmap 1 \
         --mmap-bytes 64M --signal 2 --switch 2 --pipe 1 --timer 1 --malloc 1 --shm 1'"
    ));
    let limit = Duration::from_secs(u64::from(seconds)) + LONG;
    let output = stress.timeout(limit).run().unwrap();
    assert!(output.status.success(), "{output}");
    assert_kernel_is_content(guest);
}

/// Random writes, read back and compared.
fn verify_disk(guest: &Client, mib: u32) {
    let fio = guest.sh(format!(
        "chroot /mnt fio --name=verify --filename=/dev/xvdb --size={mib}M --rw=randwrite \
         --bsrange=512-128k --ioengine=libaio --iodepth=32 --direct=1 --verify=crc32c \
         --verify_fatal=1 --do_verify=1 --fsync=64 --output-format=json"
    ));
    let output = fio.timeout(LONG).run().unwrap();
    assert!(output.status.success(), "{output}");
}

#[test]
fn stressors_and_a_verified_disk_leave_a_guest_content() {
    natively(
        || with_workloads("stress"),
        |host| {
            let (vm, guest) = loaded(host, "stress", "--cpus 2 --memory 1G");
            verify_disk(&guest, 64);
            stress(&guest, 8);
            drop(guest);
            assert_stops(&vm);
        },
    );
}

#[test]
#[ignore = "takes minutes"]
fn a_minute_of_stressors_and_a_large_verified_disk_leave_a_guest_content() {
    natively(
        || with_workloads("long"),
        |host| {
            for (name, flags) in [
                ("two", "--cpus 2 --memory 1G"),
                ("four", "--cpus 4 --memory 1G"),
                ("trusted", "--cpus 2 --memory 1G --trust-guest-user"),
            ] {
                let (vm, guest) = loaded(host, name, flags);
                verify_disk(&guest, 256);
                stress(&guest, 60);
                guest_is_sound(&guest, 500, 500, name != "trusted");
                drop(guest);
                assert_stops(&vm);
            }
        },
    );
}

#[test]
fn a_guest_under_load_is_paused_resumed_and_gives_memory_back() {
    natively(
        || with_workloads("pause"),
        |host| {
            let (vm, guest) = loaded(host, "pause", "--cpus 2 --memory 512M");
            pauses(host, &vm, &guest);
            balloons(&vm, &guest);
            // A reset brings the guest back from its kernel.
            assert!(vm.blanket("reset", "").unwrap().status.success());
            drop(guest);
            let guest = vm.guest().unwrap();
            assert!(!guest.sh("[ -e /run/stop ]").run().unwrap().status.success());
        },
    );
}

fn pauses(host: &Host, vm: &Vm, guest: &Client) {
    guest
        .sh("dd if=/dev/urandom of=/run/x bs=1M count=8; n=0; \
             while [ ! -e /run/stop ]; do dd if=/run/x of=/dev/xvdb bs=4k conv=fsync || exit 1; \
             n=$((n + 1)); echo $n > /run/rounds; done; touch /run/stopped")
        .spawn("/run/load.log")
        .unwrap();
    host.sh("ping -i 0.05 10.9.0.2")
        .spawn("/run/ping.log")
        .unwrap();
    let counters = || {
        let metrics = vm.info().unwrap()["metrics"].clone();
        (
            metrics["vcpus"].clone(),
            metrics["devices"]["blk1"]["writes"].clone(),
        )
    };
    for _ in 0..15 {
        assert!(vm.blanket("pause", "").unwrap().status.success());
        let before = counters();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(counters(), before, "a paused guest does nothing");
        assert!(vm.blanket("resume", "").unwrap().status.success());
        std::thread::sleep(Duration::from_millis(100));
    }
    guest
        .sh(
            "touch /run/stop; until [ -e /run/stopped ]; do sleep 0.1; done; \
             echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/xvdb bs=1M count=8 | cmp - /run/x",
        )
        .text()
        .unwrap();
    let rounds = guest.sh("cat /run/rounds").text().unwrap();
    assert!(rounds.trim().parse::<u32>().unwrap() > 0);
    host.sh("ping -c 3 -i 0.2 -W 5 10.9.0.2").text().unwrap();
    assert_kernel_is_content(guest);
}

/// The guest's balloon takes 128 MiB, which go back to this machine, and gives them up again.
fn balloons(vm: &Vm, guest: &Client) {
    const BALLOON: &str = "/sys/devices/system/xen_memory/xen_memory0";
    const TAKEN_KIB: u64 = 128 << 10;
    let target: u64 = guest
        .sh(format!("cat {BALLOON}/target_kb"))
        .text()
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let set = |kib: u64| {
        let wait = format!(
            "echo {kib} > {BALLOON}/target_kb; until [ $(cat {BALLOON}/info/current_kb) -eq {kib} ]; \
             do sleep 0.1; done"
        );
        guest.sh(wait).text().unwrap();
    };
    let resident = || {
        let info = vm.info().unwrap();
        info["metrics"]["memory"]["guest_resident"]
            .as_u64()
            .unwrap()
    };
    // Every page has been touched once.
    let fill = "dd if=/dev/zero of=/run/fill bs=1M count=220 2>/dev/null; rm /run/fill";
    guest.sh(fill).text().unwrap();
    let before = resident();
    set(target - TAKEN_KIB);
    let after = resident();
    assert!(
        after + (TAKEN_KIB << 9) < before,
        "{before} -> {after} bytes"
    );
    set(target);
    guest.sh(fill).text().unwrap();
    assert_kernel_is_content(guest);
}

#[test]
fn a_kernel_that_is_none_for_this_machine_is_refused_with_the_remedy() {
    natively(
        || {
            native("refused")
                .unwrap()
                .inject(payload("hello").unwrap(), "/hello")
        },
        |host| {
            let run = host
                .sh("blanket run hello --machine pv --kernel /hello")
                .run()
                .unwrap();
            let error = String::from_utf8_lossy(&run.stderr);
            assert!(
                !run.status.success() && error.contains("--machine hvm"),
                "{error}"
            );
            assert_eq!(host.sh("blanket ps -a --json").text().unwrap().trim(), "[]");
        },
    );
}
