//! What a guest sees of its machine, and that it is the same on every provider.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use blanket_system_tests::program;
use blanket_testbed::{Accelerator, Client, GuestImages, Provider, inspection};
use tempfile::NamedTempFile;

/// Run in the guest, whose disk has the programs that the initramfs has not. What differs between
/// two runs on one machine is left out: times, counts, what is calibrated, what two processes race
/// for, and long waits for a processor.
const SCRIPT: &str = r#"
mount -t ext4 -o ro /dev/vda /mnt
for folder in proc sys dev; do mount --bind /$folder /mnt/$folder; done
section() { echo; echo "== $*"; "$@"; }
section chroot /mnt lspci -nn
section chroot /mnt lspci -t
section chroot /mnt lscpu | sed '/^BogoMIPS/d'
section chroot /mnt ip -o link
section chroot /mnt lsblk -o NAME,MAJ:MIN,RM,SIZE,RO,TYPE,ROTA,LOG-SEC,PHY-SEC,DISC-GRAN,SERIAL
section cat /sys/devices/system/clocksource/clocksource0/available_clocksource
section cat /sys/devices/system/clocksource/clocksource0/current_clocksource
section cat /sys/devices/system/clockevents/clockevent0/current_device
section cat /proc/interrupts | sed 's/:\( *[0-9][0-9]* \)*/:/'
section cat /proc/iomem
section cat /proc/ioports
section dmesg | sed -e 's/^\[[^]]*\] //' -e 's/sched offset of [0-9]* cycles/sched offset/' \
    -e 's/Detected [0-9.]* MHz/Detected/' -e 's/max_cycles.*//' -e 's/Marking stable.*//' \
    -e 's/[0-9.]* BogoMIPS\( (lpj=[0-9]*)\)*/BogoMIPS/' -e 's/audit([0-9.:]*)/audit/' \
    -e 's/^sh ([0-9]*): /sh: /' -e '/link becomes ready/d' -e '/Long readout interval/d' | sort
umount /mnt/dev /mnt/sys /mnt/proc /mnt
"#;

/// Compares what the guest sees with what guests on the other providers saw, in this run of the
/// tests or an earlier one of the same programs.
pub(crate) fn is_the_same_everywhere(which: Provider, guest: &Client) {
    let view = guest.sh(SCRIPT).text().unwrap();
    for part in [
        "[1af4:1042]",
        "vda ",
        "kvm-clock",
        "eth0: <",
        "Linux version",
    ] {
        assert!(view.contains(part), "{part} is missing in {view}");
    }
    let folder = folder();
    fs::create_dir_all(&folder).unwrap();
    // Whole at once: another provider's test may be reading.
    let mut file = NamedTempFile::new_in(&folder).unwrap();
    file.write_all(view.as_bytes()).unwrap();
    file.persist(folder.join(which.name())).unwrap();
    let others = Provider::ALL.into_iter().filter(|other| *other != which);
    for other in others {
        if let Ok(seen) = fs::read_to_string(folder.join(other.name())) {
            let different = differences(&seen, &view);
            assert!(
                different.is_empty(),
                "the guest sees other things on {} (-) than on {} (+):\n{different}",
                other.name(),
                which.name()
            );
        }
    }
}

/// Where the views of guests of the same programs and images are.
fn folder() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    fs::read(program("blanket-vmm").unwrap())
        .unwrap()
        .hash(&mut hasher);
    // The paths name the hashes of their contents.
    GuestImages::get().unwrap().files().hash(&mut hasher);
    inspection().unwrap().hash(&mut hasher);
    SCRIPT.hash(&mut hasher);
    format!("{:?}", Accelerator::probe()).hash(&mut hasher);
    let name = format!("views-{:016x}", hasher.finish());
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn differences(before: &str, now: &str) -> String {
    let lines = |text| str::lines(text).collect::<BTreeSet<_>>();
    let (before, now) = (lines(before), lines(now));
    let gone = before.difference(&now).map(|line| format!("-{line}\n"));
    let new = now.difference(&before).map(|line| format!("+{line}\n"));
    gone.chain(new).collect()
}

#[test]
fn differences_are_the_lines_that_only_one_has() {
    assert_eq!(differences("a\nb\nc", "b\nc\na"), "");
    assert_eq!(differences("a\nb", "b\nc"), "-a\n+c\n");
}
