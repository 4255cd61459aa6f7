//! Machines made of files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;

use super::*;

/// A device's folder with these files.
fn device(root: &Path, name: &str, files: &[(&str, &str)]) {
    let folder = root.join("sys/block").join(name);
    fs::create_dir_all(&folder).unwrap();
    for (file, content) in files {
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

fn nvme(root: &Path) {
    device(
        root,
        "nvme1n1",
        &[
            ("size", "209715200\n"),
            ("dev", "259:1\n"),
            ("ro", "0\n"),
            ("queue/logical_block_size", "512\n"),
            ("queue/physical_block_size", "4096\n"),
            ("queue/write_cache", "write through\n"),
            ("queue/max_sectors_kb", "128\n"),
            ("queue/io_poll", "1\n"),
            ("mq/0/cpu_list", "0\n"),
            ("mq/1/cpu_list", "1\n"),
            ("device/model", "Amazon EC2 NVMe Instance Storage        \n"),
            ("device/serial", "AWS22\x1b[31m\n"),
            ("device/transport", "pcie\n"),
        ],
    );
}

#[test]
fn a_volume_is_described_and_its_text_is_one_plain_line() {
    let root = tempfile::tempdir().unwrap();
    nvme(root.path());
    let all = list(root.path(), "ec2");
    let [volume] = &all[..] else {
        panic!("{all:?}")
    };
    assert_eq!(volume.path, Path::new("/dev/nvme1n1"));
    assert_eq!(
        (volume.size, volume.place),
        (100 << 30, Place::InstanceStore)
    );
    assert_eq!(volume.serial.as_deref(), Some("AWS22?[31m"));
    assert!(volume.uses.is_empty() && !volume.readonly);
    let limits = &volume.limits;
    assert_eq!(limits.logical_block, Some(512));
    assert_eq!(limits.physical_block, Some(4096));
    assert_eq!(limits.largest_io, Some(128 << 10));
    assert_eq!(limits.volatile_cache, Some(false));
    assert_eq!((limits.queues, limits.polled), (2, true));
    assert_eq!(limits.discard, 0);
}

#[test]
fn what_uses_a_volume_is_told_of_it_and_of_its_partitions() {
    let root = tempfile::tempdir().unwrap();
    device(
        root.path(),
        "sda",
        &[
            ("size", "8192"),
            ("dev", "8:0"),
            ("sda1/partition", "1"),
            ("sda1/dev", "8:1"),
            ("sda2/partition", "2"),
            ("sda2/dev", "8:2"),
            ("sda2/holders/dm-0/dev", "254:0"),
            ("sda3/partition", "3"),
            ("sda3/dev", "8:3"),
            ("sda4/partition", "4"),
            ("sda4/dev", "8:4"),
        ],
    );
    let proc = root.path().join("proc/self");
    fs::create_dir_all(&proc).unwrap();
    fs::write(
        proc.join("mountinfo"),
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 1 0:5 / /proc rw - proc proc rw\n",
    )
    .unwrap();
    fs::write(
        root.path().join("proc/swaps"),
        "Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n",
    )
    .unwrap();
    let all = list(root.path(), "openstack");
    assert_eq!(
        all[0].uses,
        [
            "sda1 mounted at /",
            "sda2 held by dm-0",
            "sda3 swap",
            "partition sda4"
        ]
    );
    assert_eq!(all[0].place, Place::Unknown);
}

#[test]
fn only_disks_are_listed_and_in_the_order_in_which_people_count() {
    let root = tempfile::tempdir().unwrap();
    let names = [
        "sdb",
        "sdaa",
        "sda",
        "vda",
        "xvda",
        "nvme10n1",
        "nvme2n1",
        "loop0",
        "dm-0",
        "zram0",
        "nvme0c0n1",
        "sr0",
        "nvme0n1p1",
        "sd0",
        "md127",
    ];
    for name in names {
        device(root.path(), name, &[("size", "8")]);
    }
    // Without a medium.
    device(root.path(), "sdc", &[("size", "0")]);
    let all = list(root.path(), "unknown");
    let found: Vec<_> = all.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(
        found,
        ["nvme2n1", "nvme10n1", "sda", "sdb", "sdaa", "vda", "xvda"]
    );
}

#[test]
fn disks_of_xen_are_told_apart_by_what_the_provider_tells() {
    let root = tempfile::tempdir().unwrap();
    for name in ["xvda", "xvdb", "vda"] {
        device(root.path(), name, &[("size", "8")]);
    }
    let places = |stores: Option<&str>| {
        let mut all = list(root.path(), "ec2");
        let stores = stores.map(|name| vec![name.to_owned()]);
        let instance = Instance {
            instance_stores: stores,
            ..Instance::default()
        };
        tell_apart(&mut all, &instance);
        all.iter().map(|it| it.place).collect::<Vec<_>>()
    };
    let unknown = Place::Unknown;
    assert_eq!(places(None), [unknown; 3]);
    let told = [unknown, Place::Network, Place::InstanceStore];
    assert_eq!(places(Some("xvdb")), told);
}

#[test]
fn the_driver_is_that_of_the_controller() {
    let root = tempfile::tempdir().unwrap();
    device(root.path(), "sda", &[("size", "8")]);
    let pci = root.path().join("sys/devices/pci0000:00/0000:00:05.0");
    let disk = pci.join("host0/target0:0:0/0:0:0:0");
    fs::create_dir_all(&disk).unwrap();
    symlink("../../../../../../bus/scsi/drivers/sd", disk.join("driver")).unwrap();
    symlink("../../../bus/pci/drivers/vmw_pvscsi", pci.join("driver")).unwrap();
    symlink(&disk, root.path().join("sys/block/sda/device")).unwrap();
    let all = list(root.path(), "vmware");
    assert_eq!(all[0].driver.as_deref(), Some("vmw_pvscsi"));
}

#[test]
fn a_machine_without_block_devices_has_no_volumes() {
    let root = tempfile::tempdir().unwrap();
    assert!(list(root.path(), "ec2").is_empty());
}

#[test]
fn a_result_is_of_use_as_long_as_the_volume_is_the_same() {
    let root = tempfile::tempdir().unwrap();
    nvme(root.path());
    let volume = list(root.path(), "ec2").remove(0);
    let cache = Cache::new(&root.path().join("stores"));
    let record = Record {
        key: Key::of(&volume),
        report: crate::store::Report {
            engines: Vec::new(),
            chosen: crate::store::Engine::Polled,
            reason: "measured".to_owned(),
        },
        wanted: None,
    };
    cache.store(&record).unwrap();
    assert_eq!(cache.load(&volume), Some(record));
    let mut other = volume.clone();
    other.serial = None;
    assert_eq!(cache.load(&other), None);
    fs::write(root.path().join("stores/nvme1n1.json"), "{").unwrap();
    assert_eq!(cache.load(&volume), None);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_bytes_in_any_file_give_bounded_plain_text(
        contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 8),
        size in 1..u64::MAX,
    ) {
        let root = tempfile::tempdir().unwrap();
        nvme(root.path());
        let folder = root.path().join("sys/block/nvme1n1");
        for (file, content) in [
            "queue/logical_block_size", "queue/physical_block_size", "queue/write_cache",
            "queue/max_sectors_kb", "device/model", "device/serial", "device/transport", "dev",
        ].iter().zip(&contents) {
            fs::write(folder.join(file), content).unwrap();
        }
        fs::write(folder.join("size"), size.to_string()).unwrap();
        for volume in list(root.path(), "ec2") {
            let limits = &volume.limits;
            prop_assert!(limits.logical_block.is_none_or(u32::is_power_of_two));
            for text in [&volume.model, &volume.serial].into_iter().flatten() {
                prop_assert!(text.chars().count() <= 256);
                prop_assert!(!text.chars().any(char::is_control));
            }
        }
    }

    #[test]
    fn any_tables_of_mounts_and_swaps_are_read(mounts: String, swaps: String) {
        uses::Table::parse(&mounts, &swaps);
    }
}
