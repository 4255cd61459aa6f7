//! Snapshots of guests that run on, what can be wrong with their files, and clones.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use blanket_system_tests::{Vm, native, natively, on_node, provider};
use blanket_testbed::{Client, Output};
use serde_json::Value;

/// What `blanket snapshot NAME FLAGS --json` tells.
fn snapshot(vm: &Vm, flags: &str) -> Value {
    let saved = vm.blanket("snapshot", &format!("{flags} --json")).unwrap();
    assert!(saved.status.success(), "{saved}");
    serde_json::from_slice(&saved.stdout).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Fills memory of the guest with what nobody has elsewhere.
fn fill(guest: &Client, mib: u32) {
    let fill = format!(
        "dd if=/dev/urandom of=/run/x bs=1M count={mib} && sha256sum /run/x > /run/sum && \
         cat /proc/sys/kernel/random/boot_id > /run/id"
    );
    guest.sh(fill).text().unwrap();
}

/// It still is there.
fn is_whole(guest: &Client) {
    let check = "sha256sum -c /run/sum && cmp /run/id /proc/sys/kernel/random/boot_id && \
                 ! dmesg | grep -e BUG: -e Oops -e 'Call Trace'";
    guest.sh(check).text().unwrap();
}

/// Goes on changing its memory until it is ended.
fn changes_memory(guest: &Client) {
    guest
        .sh("while true; do dd if=/dev/urandom of=/run/y bs=1M count=8; done")
        .spawn("/run/changes.log")
        .unwrap();
}

/// Bytes of its memory that are in the node's.
fn resident(vm: &Vm) -> u64 {
    number(&vm.info().unwrap()["metrics"]["memory"]["guest_resident"])
}

/// `blanket restore FLAGS` as another VM.
fn restored<'a>(node: &'a Client, name: &str, flags: &str) -> Vm<'a> {
    let restore = format!("blanket restore {flags} --name {name} --console stdio");
    let output = node.sh(restore).run().unwrap();
    assert!(output.status.success(), "{output}");
    Vm::started(node, name)
}

#[test]
fn a_guest_is_saved_while_it_runs_and_its_memory_comes_back_when_it_is_needed() {
    natively(
        || native("snapshots").unwrap(),
        |host| {
            let vm = Vm::pv(host, "web", "", "--memory 1G").unwrap();
            let guest = vm.guest().unwrap();
            fill(&guest, 24);
            changes_memory(&guest);
            let saved = snapshot(&vm, "/run/web");
            assert_eq!(saved["live"], true, "{saved}");
            assert!(saved["pause_ms"].as_f64().unwrap() > 0.0, "{saved}");
            // It used about 100 MB.
            let bytes = number(&saved["bytes"]);
            assert!((24 << 20..150 << 20).contains(&bytes), "{saved}");
            assert!(number(&saved["memory_bytes"]) <= bytes, "{saved}");
            let blocks = host.sh("stat -c %b /run/web").text().unwrap();
            assert_eq!(blocks.trim().parse::<u64>().unwrap() * 512, bytes);
            let compressed = snapshot(&vm, "/run/less --compress");
            assert!(number(&compressed["bytes"]) < bytes * 3 / 4, "{compressed}");
            is_whole(&guest);
            assert_eq!(vm.info().unwrap()["state"], "running");
            refuses(host, &vm);
            // Beside each other, and beside the one that was saved.
            for (name, flags) in [("lazy", "/run/web"), ("eager", "/run/less --eager")] {
                let back = restored(host, name, flags);
                let there = resident(&back);
                let all = there > bytes / 2;
                assert_eq!(all, name == "eager", "{name}: {there} of {bytes}");
                is_whole(&back.guest().unwrap());
                // What was not needed is in its snapshots nevertheless.
                let again = snapshot(&back, "/run/again");
                assert!(number(&again["bytes"]) > bytes * 3 / 4, "{again}");
                back.blanket("rm", "--force").unwrap();
                let third = restored(host, "third", "/run/again");
                is_whole(&third.guest().unwrap());
                third.blanket("rm", "--force").unwrap();
            }
            is_whole(&guest);
        },
    );
}

#[test]
fn a_guest_moves_though_its_memory_has_not_all_come_from_its_snapshot() {
    natively(
        || native("restored").unwrap(),
        |host| {
            let vm = Vm::pv(host, "web", "", "--memory 512M").unwrap();
            let guest = vm.guest().unwrap();
            fill(&guest, 96);
            snapshot(&vm, "/run/web");
            drop(guest);
            vm.blanket("rm", "--force").unwrap();
            for mode in ["pre-copy", "post-copy"] {
                let back = restored(host, "lazy", "/run/web");
                let there = resident(&back);
                assert!(there < 90 << 20, "{there} of its memory are there already");
                let flags = format!("--mode {mode} --downtime 1000 --verify");
                let (moved, report) = back.migrate("moved", &flags).unwrap();
                println!("{report}");
                let follows = report["following"]["missing"].as_u64();
                assert_eq!(follows.is_some_and(|it| it > 90 << 20), mode == "post-copy");
                is_whole(&moved.guest().unwrap());
                moved.blanket("rm", "--force").unwrap();
            }
        },
    );
}

/// Files that cannot be written, and files that are damaged.
fn refuses(host: &Client, vm: &Vm) {
    let full = "mkdir /run/small && mount -t tmpfs -o size=20M none /run/small";
    host.sh(full).text().unwrap();
    let saved = vm.blanket("snapshot", "/run/small/web").unwrap();
    let error = String::from_utf8_lossy(&saved.stderr);
    assert!(!saved.status.success(), "{saved}");
    assert!(error.contains("No space left"), "{error}");
    let left = host
        .sh("ls -A /run/small; umount /run/small")
        .text()
        .unwrap();
    assert_eq!(left, "");
    // Whenever it is interrupted: all of it or nothing.
    for after in ["0.01", "0.05", "0.1", "0.2"] {
        let interrupt = format!(
            "mkdir -p /run/int && timeout -s INT {after} blanket snapshot web /run/int/web; \
             ls -A /run/int; rm -f /run/int/web"
        );
        let left = host.sh(interrupt).run().unwrap();
        let left = String::from_utf8_lossy(&left.stdout).into_owned();
        assert!(!left.contains("partial"), "{left}");
    }
    assert_eq!(vm.info().unwrap()["state"], "running");
    // The kernel's code is there.
    let damage = "cp --sparse=always /run/web /run/bad && \
                  printf DAMAGED | dd of=/run/bad bs=1 seek=20M conv=notrunc";
    host.sh(damage).text().unwrap();
    let restore = "blanket restore /run/bad --eager --name bad --console stdio";
    let output = host.sh(restore).run().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output}");
    assert!(error.contains("/run/bad is damaged (chunk "), "{error}");
}

/// What the guest sees: address of its interface, first bytes of its disk.
fn address(guest: &Client) -> String {
    guest.sh("cat /sys/class/net/eth0/address").text().unwrap()
}

/// Writes to its disk, and reads that back from it.
fn writes(guest: &Client, text: &str) {
    let write = format!(
        "echo {text} | dd of=/dev/xvda bs=512 count=1 conv=sync,fsync,notrunc && \
         echo 3 > /proc/sys/vm/drop_caches && head -n 1 /dev/xvda | grep -x {text}"
    );
    guest.sh(write).text().unwrap();
}

fn reads(guest: &Client, text: &str) {
    let read = format!("echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/xvda | grep -x {text}");
    guest.sh(read).text().unwrap();
}

#[test]
fn clones_run_beside_each_other_with_disks_and_addresses_of_their_own() {
    natively(
        || native("clones").unwrap(),
        |host| {
            host.sh("truncate -s 16M /run/disk").text().unwrap();
            let flags = "--memory 512M --disk /run/disk --net tap";
            let vm = Vm::pv(host, "web", "", flags).unwrap();
            let guest = vm.guest().unwrap();
            fill(&guest, 8);
            writes(&guest, "before");
            let cloned = vm.blanket("clone", "3 --name c{}").unwrap();
            assert!(cloned.status.success(), "{cloned}");
            assert_eq!(String::from_utf8_lossy(&cloned.stdout), "c1\nc2\nc3\n");
            let names = ["c1", "c2", "c3"];
            let clones = names.map(|name| Vm::started(host, name));
            let mut addresses = vec![address(&guest)];
            let mut taps = vec![];
            for (name, clone) in names.iter().zip(&clones) {
                let info = clone.info().unwrap();
                let device = |name: &str| {
                    let devices = info["vm"]["devices"].as_array().unwrap().clone();
                    devices
                        .into_iter()
                        .find(|device| device["name"] == name)
                        .unwrap()
                };
                taps.push(device("net0")["tap"].as_str().unwrap().to_owned());
                let mac = device("net0")["mac"].as_str().unwrap().to_owned();
                let guest = clone.guest().unwrap();
                is_whole(&guest);
                reads(&guest, "before");
                writes(&guest, name);
                assert_eq!(address(&guest).trim(), mac);
                addresses.push(address(&guest));
            }
            addresses.sort();
            addresses.dedup();
            taps.sort();
            taps.dedup();
            assert_eq!((addresses.len(), taps.len()), (4, 3));
            for (name, clone) in names.iter().zip(&clones) {
                reads(&clone.guest().unwrap(), name);
            }
            // The source is as it was, and goes on.
            reads(&guest, "before");
            is_whole(&guest);
            writes(&guest, "after");
            reads(&clones[0].guest().unwrap(), "c1");
            let cloning = "ls -A /var/lib/blanket/cloning";
            assert_eq!(host.sh(cloning).text().unwrap(), "");
            for clone in &clones {
                clone.blanket("rm", "--force").unwrap();
            }
            of_a_snapshot(host, &vm);
        },
    );
}

/// Clones of a snapshot: it says when they cannot be.
fn of_a_snapshot(host: &Client, vm: &Vm) {
    let refused = |what: &str, why: &str| {
        let output = host.sh(format!("blanket clone {what}")).run().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(why), "{output}");
    };
    snapshot(vm, "/run/plain");
    refused("/run/plain", "--suspend");
    refused("web 2 --name same", "{}");
    snapshot(vm, "/run/web --suspend --stop");
    host.sh("blanket rm web").text().unwrap();
    host.sh("blanket clone /run/web 2").text().unwrap();
    for name in ["web-1", "web-2"] {
        let guest = Vm::started(host, name).guest().unwrap();
        reads(&guest, "after");
        writes(&guest, name);
        is_whole(&guest);
    }
    host.sh("touch /run/disk").text().unwrap();
    refused("/run/web --name late", "has changed since");
    let listed = host.sh("blanket ps --json").text().unwrap();
    assert!(!listed.contains("late"), "{listed}");
}

#[test]
fn a_snapshot_has_what_changed_since_another_one_and_is_encrypted_if_wanted() {
    natively(
        || native("chains").unwrap(),
        |host| {
            let vm = Vm::pv(host, "web", "", "--memory 512M").unwrap();
            let guest = vm.guest().unwrap();
            fill(&guest, 24);
            let full = number(&snapshot(&vm, "/run/full")["bytes"]);
            let change = "dd if=/dev/urandom of=/run/z bs=1M count=4";
            guest.sh(change).text().unwrap();
            let second = snapshot(&vm, "/run/second --base /run/full");
            assert_eq!(second["live"], true, "{second}");
            let bytes = number(&second["bytes"]);
            assert!((4 << 20..full / 2).contains(&bytes), "{second} of {full}");
            // The same file again, from one beneath it.
            let saved = vm.blanket("snapshot", "/run/full --base /run/second");
            let error = failed(&saved.unwrap());
            assert!(error.contains("give it another name"), "{error}");
            let third = snapshot(&vm, "/run/third --base /run/second --compress");
            assert!(number(&third["bytes"]) < full / 2, "{third} of {full}");
            guest.sh("sha256sum -c /run/sum").text().unwrap();
            for (name, flags) in [("lazy", "/run/third"), ("eager", "/run/third --eager")] {
                let back = restored(host, name, flags);
                let all = resident(&back) > full / 2;
                assert_eq!(all, name == "eager", "{name}");
                is_whole(&back.guest().unwrap());
                back.blanket("rm", "--force").unwrap();
            }
            is_found_or_told(host);
            is_encrypted(host, &vm, full);
            is_whole(&guest);
        },
    );
}

/// What a command that failed said.
fn failed(output: &Output) -> String {
    assert!(!output.status.success(), "{output}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bases that are elsewhere now, or another file.
fn is_found_or_told(host: &Client) {
    let restore = "blanket restore /run/third --name moved --console stdio";
    let fails = || failed(&host.sh(restore).run().unwrap());
    host.sh("mv /run/full /run/elsewhere").text().unwrap();
    let error = fails();
    assert!(error.contains("/run/full is not there"), "{error}");
    assert!(error.contains("--base FILE"), "{error}");
    host.sh("cp --sparse=always /run/third /run/full")
        .text()
        .unwrap();
    let error = fails();
    assert!(error.contains("is another snapshot"), "{error}");
    let moved = restored(host, "moved", "/run/third --base /run/elsewhere");
    is_whole(&moved.guest().unwrap());
    moved.blanket("rm", "--force").unwrap();
    host.sh("mv /run/elsewhere /run/full").text().unwrap();
}

/// A file that only those with its key can read, and clones of it.
fn is_encrypted(host: &Client, vm: &Vm, full: u64) {
    let keys = "head -c 32 /dev/urandom > /run/key; head -c 32 /dev/urandom > /run/wrong";
    host.sh(keys).text().unwrap();
    let saved = snapshot(vm, "/run/secret --key /run/key");
    assert_eq!(saved["live"], true, "{saved}");
    let bytes = number(&saved["bytes"]);
    assert!((full / 2..full * 3 / 2).contains(&bytes), "{saved}");
    // The kernel's code has it, and nothing that is not encrypted.
    let banner = |file: &str| format!("grep -a -c 'Linux version' /run/{file}");
    host.sh(banner("full")).text().unwrap();
    assert!(!host.sh(banner("secret")).run().unwrap().status.success());
    let more = snapshot(vm, "/run/more --key /run/key --base /run/secret --compress");
    assert!(number(&more["bytes"]) < full / 2, "{more}");
    let restore = |flags: &str| host.sh(format!("blanket restore {flags}")).run().unwrap();
    for (flags, why) in [
        ("/run/secret", "is encrypted: name its key"),
        ("/run/more --key /run/wrong", "another key"),
        ("/run/full --key /run/key", "not encrypted"),
        ("/run/more --key /run/full", "is no key"),
    ] {
        let error = failed(&restore(&format!("{flags} --name no")));
        assert!(error.contains(why), "{flags}: {error}");
    }
    let damage = "cp --sparse=always /run/secret /run/bad && \
                  printf DAMAGED | dd of=/run/bad bs=1 seek=20M conv=notrunc";
    host.sh(damage).text().unwrap();
    let error = failed(&restore(
        "/run/bad --key /run/key --eager --name no --console stdio",
    ));
    assert!(error.contains("/run/bad is damaged (chunk "), "{error}");
    let back = restored(host, "back", "/run/more --key /run/key");
    is_whole(&back.guest().unwrap());
    back.blanket("rm", "--force").unwrap();
    let clone = "blanket clone /run/more 2 --name c{} --key /run/key";
    host.sh(clone).text().unwrap();
    for name in ["c1", "c2"] {
        is_whole(&Vm::started(host, name).guest().unwrap());
    }
}

/// Has the guest take the name that the xenstore has for it, now and whenever that changes.
fn takes_its_name(guest: &Client) {
    // XS_WATCH and XS_READ of `name`, each with its header of four words.
    let take = r#"
        name() {
            exec 4<>/dev/xen/xenbus
            printf '\002\0\0\0\0\0\0\0\0\0\0\0\005\0\0\0name\0' >&4
            dd bs=4096 count=1 <&4 2>/dev/null | tail -c +17
            exec 4>&-
        }
        exec 3<>/dev/xen/xenbus
        printf '\004\0\0\0\0\0\0\0\0\0\0\0\011\0\0\0name\0own\0' >&3
        while dd bs=4096 count=1 <&3 >/run/event 2>/dev/null; do
            hostname "$(name)"
        done"#;
    guest.sh(take).spawn("/run/name.log").unwrap();
}

/// The guest takes this name.
fn is_called(guest: &Client, name: &str) {
    let wait = format!(
        "for i in $(seq 100); do [ \"$(hostname)\" = {name} ] && exit 0; sleep 0.1; done; \
         hostname; cat /run/name.log; exit 1"
    );
    let waited = guest.sh(wait).run().unwrap();
    assert!(waited.status.success(), "{name}: {waited}");
}

#[test]
fn a_guest_that_goes_on_elsewhere_learns_what_it_is_called_there() {
    natively(
        || native("names").unwrap(),
        |host| {
            // One is cloned as it runs, the other has to suspend itself.
            for (web, flags) in [("web", ""), ("net", "--net tap")] {
                let vm = Vm::pv(host, web, "", &format!("--memory 256M {flags}")).unwrap();
                let guest = vm.guest().unwrap();
                takes_its_name(&guest);
                is_called(&guest, web);
                let cloned = vm
                    .blanket("clone", &format!("2 --name {web}-{{}}"))
                    .unwrap();
                assert!(cloned.status.success(), "{cloned}");
                for number in 1..=2 {
                    let name = format!("{web}-{number}");
                    let clone = Vm::started(host, &name);
                    is_called(&clone.guest().unwrap(), &name);
                    clone.blanket("rm", "--force").unwrap();
                }
                is_called(&guest, web);
                drop(guest);
                let (moved, _) = vm.migrate("moved", "").unwrap();
                let guest = moved.guest().unwrap();
                is_called(&guest, "moved");
                drop(guest);
                // Its next start is that of this VM, too.
                moved.blanket("reset", "").unwrap();
                let guest = moved.guest().unwrap();
                takes_its_name(&guest);
                is_called(&guest, "moved");
                drop(guest);
                moved.blanket("rm", "--force").unwrap();
            }
        },
    );
}

/// The guest's generation ID, as its hash. (Debian's kernel has no driver.)
fn generation(guest: &Client) -> String {
    let read = "grep -qx QEMUVGID /sys/bus/acpi/devices/QEMUVGID:00/hid; \
                dd if=/dev/mem bs=16 skip=65024 count=1 2> /run/dd | sha256sum; cat /run/dd >&2";
    guest.sh(read).text().unwrap()
}

/// What the guest of an hvm machine finds that it is called.
fn name_by_memory(guest: &Client) -> String {
    let read = "dd if=/dev/mem bs=256 skip=4065 count=1 2> /dev/null | head -c 64 | tr -d '\\0'";
    guest.sh(read).text().unwrap()
}

#[test]
fn a_guest_of_an_hvm_machine_is_saved_while_it_runs_and_comes_back() {
    on_node(
        || provider("snapshots").unwrap(),
        |node| {
            let vm = Vm::linux(node, "web", "", "--memory 256M").unwrap();
            let guest = vm.guest().unwrap();
            fill(&guest, 4);
            let before = generation(&guest);
            changes_memory(&guest);
            let saved = snapshot(&vm, "/run/web");
            assert_eq!(saved["live"], true, "{saved}");
            is_whole(&guest);
            let back = restored(node, "back", "/run/web");
            is_whole(&back.guest().unwrap());
            is_whole(&guest);
            // The one that was saved is who it was.
            assert_eq!(generation(&guest), before);
            let restored = generation(&back.guest().unwrap());
            assert_ne!(restored, before);
            let names = [&guest, &back.guest().unwrap()].map(name_by_memory);
            assert_eq!(names, ["web", "back"]);
            back.blanket("rm", "--force").unwrap();
            let cloned = vm.blanket("clone", "").unwrap();
            assert!(cloned.status.success(), "{cloned}");
            let clone = Vm::started(node, "web-1").guest().unwrap();
            is_whole(&clone);
            assert!(![&before, &restored].contains(&&generation(&clone)));
            assert_eq!(name_by_memory(&clone), "web-1");
            assert_eq!(name_by_memory(&guest), "web");
            assert_eq!(generation(&guest), before);
        },
    );
}
