//! `blanket up` makes a node of a machine, and `blanket down` undoes it: on a machine without
//! systemd, and on a Debian with it.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::process::Command;
use std::time::Duration;

use blanket_system_tests::{Vm, on_node, payload, program, provider};
use blanket_testbed::{Client, NodeBuilder, Provider};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(300);

/// A machine whose kernel has loaded nothing that Blanket wants.
fn describe() -> NodeBuilder {
    provider("fresh")
        .unwrap()
        .cpus(1)
        .provider(Provider::Ec2Nitro)
        .inject(payload("hello").unwrap(), "/hello")
        .inject(payload("idle").unwrap(), "/idle")
}

/// Unloads what the testbed has loaded, and loads what the kernel loads by itself for the uplinks'
/// self-test. The testbed's agent keeps a VM.
fn make_fresh(node: &Client) {
    let wait = "until grep -qs 1 /sys/class/net/eth0/carrier; do sleep 0.1; done; \
                blanket --home /run/other uplink >/dev/null; rm -r /run/other";
    node.sh(wait).timeout(LONG).text().unwrap();
    let script = "for p in /proc/[0-9]*; do \
                  if ls -l $p/fd 2>/dev/null | grep -q kvm; then kill -9 ${p#/proc/}; fi; \
                  done; sleep 0.5; \
                  modprobe -r vhost_net vhost_vsock; modprobe -r kvm_amd tun; \
                  echo never > /sys/kernel/mm/transparent_hugepage/enabled; \
                  [ ! -e /dev/kvm ] && [ ! -e /sys/class/misc/tun ]";
    node.sh(script).text().unwrap();
}

/// All that `blanket up` may change: files of /etc, modules, settings.
const STATE: &str = "find /etc -type d; find /etc -type f -exec sha256sum {} +; \
                     cut -d ' ' -f 1 /proc/modules | sort; cat /proc/sys/vm/nr_hugepages \
                     /sys/kernel/mm/transparent_hugepage/enabled; \
                     cd /proc/sys && find kernel vm net -type f ! -path '*/route/flush' \
                     ! -name 'random*' ! -path '*/random/*' ! -name ns_last_pid ! -name 'drop_caches' \
                     ! -name 'compact_memory' -exec grep -sH '' {} + | grep -v \
                     -e neigh -e 'dentry\\|inode\\|pty/nr\\|cache_stats\\|perf_' | sort; true";

fn state(of: &Client) -> String {
    of.sh(STATE).text().unwrap()
}

/// The lines in which two states differ.
fn difference(before: &str, after: &str) -> String {
    let only = |a: &str, b: &str, mark: &str| {
        let other: Vec<_> = b.lines().collect();
        let lines = a.lines().filter(|line| !other.contains(line));
        lines
            .map(|line| format!("{mark}{line}\n"))
            .collect::<String>()
    };
    only(before, after, "-") + &only(after, before, "+")
}

/// What a command says that must not fail.
fn says(of: &Client, command: &str) -> String {
    of.sh(command).timeout(LONG).text().unwrap()
}

/// What a command that must fail says on standard error.
fn refuses(of: &Client, command: &str) -> String {
    let output = of.sh(command).timeout(LONG).run().unwrap();
    assert!(!output.status.success(), "{command}: {output}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_machine_becomes_a_node_and_is_left_as_it_was() {
    on_node(describe, |node| {
        make_fresh(node);
        let before = state(node);
        let planned = says(node, "blanket up --dry-run --hugepages 64M");
        for what in [
            "load kvm_amd",
            "load tun",
            "nr_hugepages to 32",
            "enabled to madvise",
        ] {
            assert!(planned.contains(what), "{what} is not in\n{planned}");
        }
        assert!(!planned.contains("done"), "{planned}");
        assert_eq!(difference(&before, &state(node)), "", "by a dry run");
        says(node, "[ ! -e /var/lib/blanket ]");

        let done = says(node, "blanket up --hugepages 64M");
        assert!(
            done.contains("provider: ec2 (Amazon EC2), nitro, m5.xlarge, us-east-1a"),
            "{done}"
        );
        assert!(done.contains("guests get: hvm machine, because"), "{done}");
        assert!(done.contains("uplink eth0: "), "{done}");
        assert!(done.contains("measure the engines of vda"), "{done}");
        assert!(done.contains("\nstore vda: "), "{done}");
        says(node, "[ -e /var/lib/blanket/stores/vda.json ]");
        let up = state(node);
        let changed = difference(&before, &up);
        for what in [
            "+kvm_amd",
            "+tun",
            "modules-load.d/blanket.conf",
            "+always [madvise] never",
        ] {
            assert!(changed.contains(what), "{what} is not in\n{changed}");
        }
        let record = says(node, "cat /var/lib/blanket/up.json");
        let again = says(node, "blanket up");
        assert!(again.starts_with("nothing to do\n"), "{again}");
        assert_eq!(difference(&up, &state(node)), "", "by the second time");
        assert_eq!(says(node, "cat /var/lib/blanket/up.json"), record);
        let report: Value = serde_json::from_str(&says(node, "blanket up --json")).unwrap();
        assert_eq!(report["changes"], Value::Array(vec![]), "{report}");
        assert_eq!(report["provider"], "ec2");

        guests_run_and_keep_the_node(node);
        says(node, "blanket down");
        assert_eq!(difference(&before, &state(node)), "", "after all");
        says(node, "[ ! -e /var/lib/blanket/up.json ]");
        assert_eq!(says(node, "blanket down"), "nothing to undo\n");
    });
}

/// One ends by itself, in huge pages; another one runs, and what it needs stays.
fn guests_run_and_keep_the_node(node: &Client) {
    let flags = "--kernel /hello --memory 32M --hugepages 2m";
    let vm = Vm::run(node, "hello", flags).unwrap();
    let ended = vm.ended().unwrap();
    assert!(ended.contains("powered off"), "{ended}");
    Vm::run(node, "idle", "--kernel /idle --memory 32M").unwrap();
    let refused = refuses(node, "blanket down");
    assert!(refused.contains("guests are running: idle"), "{refused}");
    assert!(refused.contains("blanket evacuate"), "{refused}");
    says(node, "blanket stop --force idle && blanket rm hello idle");
}

#[test]
fn what_fails_in_the_middle_is_named_goes_on_later_and_can_be_undone() {
    on_node(describe, |node| {
        make_fresh(node);
        let before = state(node);
        let tun = "$(find /lib/modules /usr/lib/modules -name 'tun.ko*' | head -n 1)";
        says(
            node,
            &format!("tun={tun}; echo $tun > /run/tun; mv $tun /run/tun.ko"),
        );
        for _ in 0..2 {
            let failed = refuses(node, "blanket up");
            assert!(failed.contains("modules, cannot load tun: "), "{failed}");
            assert!(failed.contains("blanket up goes on from here"), "{failed}");
            says(node, "[ -e /dev/kvm ]");
        }
        // Half of it can be undone.
        says(node, "blanket down");
        assert_eq!(difference(&before, &state(node)), "", "half of it");
        refuses(node, "blanket up");
        says(node, "mv /run/tun.ko $(cat /run/tun)");
        let done = says(node, "blanket up");
        assert!(
            done.contains("load tun") && !done.contains("load kvm_amd"),
            "{done}"
        );
        let much = refuses(node, "blanket up --hugepages 64G");
        assert!(
            much.contains("too many") && much.contains("at the most"),
            "{much}"
        );
        assert!(says(node, "blanket up").starts_with("nothing to do\n"));
        says(node, "blanket down");
        assert_eq!(difference(&before, &state(node)), "", "all of it");
        let nobody = refuses(
            node,
            "setpriv --reuid 65534 --clear-groups blanket --home /tmp/x up",
        );
        assert!(nobody.contains("needs root"), "{nobody}");
    });
}

/// Boots the guests' Debian as a container of the node's kernel: its systemd is the first process,
/// and modules, settings and `/dev/kvm` are the node's.
const BOOT: &str = r#"cat > /run/boot <<'END'
echo $$ > /sys/fs/cgroup/debian/cgroup.procs
exec unshare --mount --pid --uts --ipc --cgroup --fork sh -c '
set -e
mount --make-rprivate /
cd /run/debian
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount --bind /payload/guest mnt
mkdir run/left
pivot_root . run/left
cd /
umount -l /run/left
exec env -i container=testbed PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd'
END
mkdir -p /sys/fs/cgroup/debian /run/debian
mount -t ext4 -o loop /payload/guest/disk.raw /run/debian
mount --bind /usr/lib/modules /run/debian/usr/lib/modules
cp /usr/bin/blanket /usr/bin/blanket-vmm /run/debian/usr/bin/
cd /run/debian/etc/systemd/system
rm sysinit.target.wants/testbed-*
mkdir -p /run/debian/var/log/journal /run/debian/volume
mount -t tmpfs tmpfs /run/debian/volume
for unit in systemd-udevd.service systemd-udev-trigger.service lighttpd.service acpid.service     acpid.socket acpid.path systemd-logind.service console-getty.service getty.target     systemd-timesyncd.service systemd-remount-fs.service; do ln -sf /dev/null $unit; done
"#;

/// The Debian's first process, as the node sees it; nothing if it does not run.
const FIRST: &str = r"for p in /proc/[0-9]*; do
[ $p = /proc/1 ] || { grep -qs '^NSpid:.*[[:space:]]1$' $p/status && echo ${p#/proc/}; }; done; true";

/// A Debian on the node.
struct Debian<'a>(&'a Client);

impl Debian<'_> {
    /// Boots it and waits until all is started.
    fn boot(&self) {
        self.0.sh("sh /run/boot").spawn("/run/debian.log").unwrap();
        let wait = format!("until [ -n \"$({FIRST})\" ]; do sleep 0.2; done");
        says(self.0, &wait);
        let ready = "until systemctl is-system-running --wait 2>/dev/null | \
                     grep -q -e running -e degraded; do sleep 0.5; done";
        self.says(ready);
    }

    /// A script's text, run in it.
    fn line(script: &str) -> String {
        let script = script.replace('\'', r"'\''");
        format!(
            "nsenter --target $({FIRST}) --mount --pid --uts --ipc --cgroup \
             sh -c 'export LC_ALL=C PATH=/usr/sbin:/usr/bin; {script}'"
        )
    }

    fn says(&self, script: &str) -> String {
        let output = self.0.sh(Self::line(script)).timeout(LONG).run().unwrap();
        assert!(output.status.success(), "{script}: {output}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn refuses(&self, script: &str) -> String {
        refuses(self.0, &Self::line(script))
    }

    /// What its services had to say, when it is off.
    fn journal(&self) -> String {
        says(self.0, "chroot /run/debian journalctl -a --no-pager -n 300")
    }

    /// Shuts it down as an administrator does.
    fn shuts_down(&self) {
        self.0
            .sh(Self::line("systemctl poweroff"))
            .timeout(LONG)
            .run()
            .unwrap();
        says(
            self.0,
            &format!("while [ -n \"$({FIRST})\" ]; do sleep 0.2; done"),
        );
    }
}

/// The last number that a guest has counted to.
fn counted(text: &str) -> u32 {
    let numbers = text.lines().filter_map(|line| line.strip_prefix("tick "));
    let last = numbers
        .filter_map(|number| number.trim().parse().ok())
        .next_back();
    last.unwrap_or_else(|| panic!("it does not count: {text}"))
}

/// A repository with the package kmod, and without it the Debian, in which programs run by `chroot`.
const WITHOUT_KMOD: &str = r#"mount -t ext4 -o loop /payload/guest/disk.raw /mnt
mount --bind /usr/lib/modules /mnt/usr/lib/modules
for folder in dev proc sys; do mount --rbind /$folder /mnt/$folder; done
cp /usr/bin/blanket /usr/bin/blanket-vmm /mnt/usr/bin/
mkdir /mnt/repository
cp /kmod.deb /mnt/repository
rm -rf /mnt/etc/apt/sources.list /mnt/etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/repository ./' > /mnt/etc/apt/sources.list
chroot /mnt sh -c 'dpkg --purge --force-depends kmod
cd /repository
{ dpkg-deb -f kmod.deb; echo Filename: ./kmod.deb; echo Size: $(stat -c %s kmod.deb)
echo SHA256: $(sha256sum < kmod.deb | cut -d " " -f 1); } > Packages'
"#;

#[test]
fn a_missing_package_is_installed_and_goes_when_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let download = "apt-get -q download kmod && mv kmod_*.deb kmod.deb";
    let downloaded = Command::new("sh")
        .args(["-c", download])
        .current_dir(&folder)
        .status();
    assert!(downloaded.unwrap().success(), "no package kmod");
    let deb = folder.path().join("kmod.deb");
    let with_deb = || describe().inject(&deb, "/kmod.deb");
    on_node(with_deb, |node| {
        make_fresh(node);
        says(node, WITHOUT_KMOD);
        let inside = |command: &str| {
            format!("PATH=/usr/sbin:/usr/bin chroot /mnt env --unset=TMPDIR {command}")
        };
        let has_kmod = inside("test -x /usr/sbin/modprobe");
        let failed = refuses(
            node,
            &inside("sh -c 'mv /repository/kmod.deb /repository/away; blanket up'"),
        );
        assert!(
            failed.contains("packages, cannot install kmod: "),
            "{failed}"
        );
        let done = says(
            node,
            &inside("sh -c 'mv /repository/away /repository/kmod.deb; blanket up'"),
        );
        assert!(done.contains("done     install kmod"), "{done}");
        assert!(done.contains("load kvm_amd"), "{done}");
        assert!(says(node, &inside("blanket up")).starts_with("nothing to do\n"));
        let down = says(node, &inside("blanket down"));
        assert!(
            down.contains("left     install kmod (--purge removes it)"),
            "{down}"
        );
        says(node, &has_kmod);
        let down = says(node, &inside("blanket down --purge"));
        assert!(down.contains("undone   install kmod"), "{down}");
        refuses(node, &has_kmod);
        says(
            node,
            "[ ! -e /dev/kvm ] && [ ! -e /mnt/var/lib/blanket/up.json ]",
        );
    });
}

#[test]
fn with_systemd_guests_are_saved_at_the_machines_end_and_back_at_its_next_boot() {
    on_node(describe, |node| {
        make_fresh(node);
        says(node, BOOT);
        let debian = Debian(node);
        debian.boot();
        let etc = "find /etc -type d; find /etc -type f -exec sha256sum {} +; find /etc -type l; \
                   systemctl list-unit-files --no-legend --state=enabled; cut -d \" \" -f 1 /proc/modules";
        let before = debian.says(etc);
        let done = debian.says("blanket up --evacuate-to /volume");
        for unit in ["blanket.service", "blanket-watch.service"] {
            assert!(done.contains(&format!("enable and start {unit}")), "{done}");
            debian.says(&format!(
                "systemctl is-active {unit} && systemctl is-enabled {unit}"
            ));
        }
        assert!(done.contains("guests are saved to /volume when"), "{done}");
        assert!(debian.says("blanket up").starts_with("nothing to do\n"));

        debian.says(
            "blanket run web --machine hvm --kernel /mnt/vmlinux --initrd /mnt/initrd.cpio \
             --memory 128M --cmdline \"console=ttyS0 quiet panic=-1 rdinit=/bin/sh -- -c \
             \\\"n=0; while :; do n=\\$((n + 1)); echo tick \\$n; sleep 1; done\\\"\"",
        );
        let scopes = debian.says("systemctl list-units --no-legend --type=scope");
        assert!(scopes.contains("Blanket guest web"), "{scopes}");
        debian.says("until blanket logs web | grep -q \"tick 3\"; do sleep 0.5; done");
        let known = counted(&debian.says("blanket logs web"));
        debian.shuts_down();
        let saved = node.sh("ls /run/debian/volume").run().unwrap();
        let saved = String::from_utf8_lossy(&saved.stdout).into_owned();
        assert_eq!(saved, "web.json\nweb.snapshot\n", "{}", debian.journal());
        // As after a real boot.
        says(node, "modprobe -r kvm_amd tun && [ ! -e /dev/kvm ]");

        debian.boot();
        says(node, "[ -e /dev/kvm ] && [ -e /sys/class/misc/tun ]");
        let states = debian.says("systemctl is-active blanket.service blanket-watch.service");
        assert_eq!(states, "active\nactive\n");
        debian.says("until blanket logs web | grep -q tick; do sleep 0.5; done; blanket ps");
        let log = debian.says("blanket logs web");
        assert!(
            counted(&log) > known && !log.contains("tick 1\n"),
            "{known}, then {log}"
        );
        let refused = debian.refuses("blanket down");
        assert!(refused.contains("guests are running: web"), "{refused}");
        debian.says("blanket evacuate --to /volume && blanket rm web");
        debian.says("blanket down");
        assert_eq!(difference(&before, &debian.says(etc)), "");
        debian.refuses("systemctl cat blanket.service");
        debian.shuts_down();
    });
}

#[test]
fn with_systemd_the_switch_is_confined_from_outside_too_and_works() {
    let switch = || program("blanket-switch").unwrap();
    let with_switch = || describe().inject(switch(), "/usr/bin/blanket-switch");
    on_node(with_switch, |node| {
        make_fresh(node);
        says(node, BOOT);
        says(node, "cp /usr/bin/blanket-switch /run/debian/usr/bin/");
        let debian = Debian(node);
        debian.boot();
        let done = debian.says("blanket up");
        assert!(done.contains("blanket-switch.service"), "{done}");
        debian.says("until blanket net info 2>/dev/null; do sleep 0.5; done");
        let info: Value = serde_json::from_str(&debian.says("blanket net info --json")).unwrap();
        let is = &info["confinement"];
        assert_eq!(is["seccomp"], "on");
        let kept = serde_json::json!(["CAP_CHOWN", "CAP_NET_ADMIN"]);
        assert_eq!(is["capabilities"], kept);
        // TAPs, sockets, and what is kept.
        debian.says(
            "blanket net create blue && blanket net attach blue t --tap t && \
             blanket net attach blue v --vhost-user /run/v.sock && [ -S /run/v.sock ]",
        );
        debian.says(
            "systemctl restart blanket-switch && until blanket net info 2>/dev/null; do sleep 0.5; done",
        );
        let ports: Value = serde_json::from_str(&debian.says("blanket net port --json")).unwrap();
        let ports = ports.as_array().unwrap();
        assert!(
            ports.len() == 2 && ports.iter().all(|port| port["down"].is_null()),
            "{ports:?}"
        );
        debian.says("blanket down");
        debian.refuses("systemctl cat blanket-switch.service");
        debian.shuts_down();
    });
}
