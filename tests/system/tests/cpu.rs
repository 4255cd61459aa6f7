//! The processor that guests see.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use blanket_system_tests::{GUEST_LIMIT, Vm, native, natively, on_node, payload, provider};
use blanket_testbed::Client;

const LINUX: &str = "--kernel /payload/guest/vmlinux --memory 512M --cmdline 'console=ttyS0 quiet'";

/// The word after a `key :` of `/proc/cpuinfo`.
fn of_cpuinfo(guest: &Client, key: &str) -> String {
    let script = format!("sed -n 's/^{key}[[:space:]]*: *//p' /proc/cpuinfo | head -n 1");
    guest.sh(script).text().unwrap().trim().to_owned()
}

#[test]
fn a_guest_sees_a_model_or_the_nodes_processor_and_no_model_that_is_more() {
    on_node(
        || provider("models").unwrap(),
        |node| {
            let linux = format!("{LINUX} --initrd /payload/guest/initrd.cpio");
            let own = of_cpuinfo(node, "model name");
            for (flags, model, name) in [
                // The emulated processor has no AVX.
                ("", "x86-64-v2", "Blanket x86-64-v2 processor"),
                ("--cpu host", "host", own.as_str()),
            ] {
                let vm = Vm::run(node, model, &format!("{linux} {flags}")).unwrap();
                let info = vm.info().unwrap();
                assert_eq!(info["vm"]["cpu"], model, "{info}");
                let reason = info["vm"]["cpu_reason"].as_str().unwrap_or_default();
                assert_eq!(reason.contains("xsave"), flags.is_empty(), "{info}");
                let guest = vm.guest().unwrap();
                assert_eq!(of_cpuinfo(&guest, "model name"), name);
                let flags = of_cpuinfo(&guest, "flags");
                let has = |flag| flags.split(' ').any(|f| f == flag);
                assert!(has("sse4_2") && has("aes") && !has("svm"), "{flags}");
                // The node's processor has what no model has.
                assert_eq!(has("sse4a"), model == "host", "{flags}");
                drop(guest);
                vm.blanket("stop", "--force").unwrap();
            }
            let doctor = node.sh("blanket doctor --json").text().unwrap();
            assert!(doctor.contains(r#""auto": "x86-64-v2""#), "{doctor}");
            let run = format!("blanket run more {linux} --cpu x86-64-v3");
            let refused = node.sh(run).run().unwrap();
            let error = String::from_utf8_lossy(&refused.stderr);
            assert!(!refused.status.success(), "{refused}");
            assert!(
                error.contains("xsave") && error.contains("--cpu host"),
                "{error}"
            );
            let machines = node.sh("blanket ps -a").text();
            assert!(!machines.unwrap().contains("more"));
        },
    );
}

#[test]
fn a_pv_guest_where_programs_see_the_nodes_processor_gets_no_other() {
    natively(
        || native("native").unwrap(),
        |host| {
            let run = "blanket run guest --machine pv --kernel /payload/guest/vmlinuz";
            let refused = host.sh(format!("{run} --cpu x86-64-v2")).run().unwrap();
            let error = String::from_utf8_lossy(&refused.stderr);
            if host
                .sh("grep -qwE 'svm|vmx' /proc/cpuinfo")
                .run()
                .unwrap()
                .status
                .success()
            {
                assert!(refused.status.success(), "{refused}");
                host.sh("blanket stop --force guest").text().unwrap();
            } else {
                assert!(!refused.status.success(), "{refused}");
                assert!(error.contains("does not intercept CPUID"), "{error}");
            }
        },
    );
}

/// Blanket and the modules of KVM, for a guest of the kernel that the node has.
const HYPERVISOR: &str = r#"
set -e
mkdir -p /run/extra/usr/bin && cd /run/extra
cp /usr/bin/blanket /usr/bin/blanket-vmm usr/bin && cp /hello /count .
for module in irqbypass kvm kvm-amd; do
    find "/lib/modules/$(uname -r)" -name "$module.ko*" -exec cp {} . \;
done
find . | busybox cpio -o -H newc >/run/extra.cpio
cat /payload/guest/initrd.cpio /run/extra.cpio >/run/initrd.cpio
"#;

/// The guest's guest `count` counts on from `said`, leaving no number out; how far.
fn counts(above: &Client, said: usize) -> usize {
    let goal = said + 5;
    let wait = format!(
        "for i in $(seq 600); do blanket logs count | grep -qw 'number {goal}' && break; \
         sleep 0.5; done; blanket ps -a; blanket logs count | tr -d '\\r' | sed -n 's/^number //p'"
    );
    let said = above.sh(wait).timeout(GUEST_LIMIT).text().unwrap();
    let numbers: Vec<usize> = said.lines().filter_map(|it| it.parse().ok()).collect();
    assert!(numbers.len() > goal, "{said}");
    assert!(numbers.iter().copied().eq(0..numbers.len()), "{said}");
    numbers.len()
}

#[test]
fn a_guest_that_may_runs_a_guest_of_its_own() {
    on_node(
        || {
            provider("above")
                .unwrap()
                .inject(payload("hello").unwrap(), "/hello")
                .inject(payload("count").unwrap(), "/count")
        },
        |node| {
            node.sh(HYPERVISOR).text().unwrap();
            let flags = format!("{LINUX} --initrd /run/initrd.cpio --nested");
            let mut vm = Vm::run(node, "hypervisor", &flags).unwrap();
            let above = vm.guest().unwrap();
            let kvm = "insmod /irqbypass.ko && insmod /kvm.ko && insmod /kvm-amd.ko";
            above.sh(kvm).text().unwrap();
            let run = "blanket run inner --machine hvm --kernel /hello --memory 64M";
            above.sh(run).timeout(GUEST_LIMIT).text().unwrap();
            let logs = "for i in $(seq 300); do blanket logs inner | grep -q 'hello from a guest' \
                        && break; sleep 0.2; done; blanket logs inner";
            let logs = above.sh(logs).timeout(GUEST_LIMIT).text().unwrap();
            assert!(logs.contains("hello from a guest"), "{logs}");
            let run = "blanket run count --machine hvm --kernel /count --memory 64M";
            above.sh(run).timeout(GUEST_LIMIT).text().unwrap();
            let said = counts(&above, 0);
            drop(above);
            // It moves with its guest, which is in the middle of something.
            let (moved, report) = vm
                .migrate("moved", "--downtime 5000 --mode pre-copy")
                .unwrap();
            println!("{report}");
            vm = moved;
            let above = vm.guest().unwrap();
            let said = counts(&above, said);
            drop(above);
            // From a snapshot, it goes on where that was made.
            vm.blanket("snapshot", "/run/nested").unwrap();
            vm.blanket("stop", "--force").unwrap();
            let restore = "blanket restore /run/nested --name back \
                           --console socket=/run/blanket/back/console.sock";
            node.sh(restore).timeout(GUEST_LIMIT).text().unwrap();
            let back = Vm::started(node, "back");
            let above = back.guest().unwrap();
            counts(&above, said);
            let log = above.sh("dmesg").text().unwrap();
            for complaint in ["BUG:", "Oops", "WARNING: CPU", "Call Trace"] {
                assert!(!log.contains(complaint), "{complaint} in\n{log}");
            }
            drop(above);
            back.blanket("stop", "--force").unwrap();
        },
    );
}
