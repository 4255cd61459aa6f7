//! A disk's configuration and life.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO};

use super::*;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn the_configuration_space_describes_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let (_, spec) = image_of(dir.path(), (1 << 20) + 100);
    let disk = block(&spec, 4);
    let config = disk.config();
    assert_eq!((disk.kind(), disk.queue_sizes()), (2, &[256u16; 4][..]));
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(u32_at(&config, 12), 254);
    assert_eq!(u32_at(&config, 20), 512);
    assert_eq!(config[34..36], [4, 0]);
    assert_eq!((u32_at(&config, 36), u32_at(&config, 40)), (1 << 21, 1));
    assert_eq!((u32_at(&config, 48), u32_at(&config, 52)), (1 << 21, 1));
    assert_ne!(disk.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(disk.features() & EVERYTHING, EVERYTHING);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (path, spec) = image_of(dir.path(), 1 << 20);
    let spec = Spec {
        readonly: true,
        ..spec
    };
    let mut bench = Bench::on(dir, path, &spec, 1 << VIRTIO_BLK_F_RO);
    let features = bench.block.features();
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & EVERYTHING, 0);
    assert_eq!(bench.write(0, &[1; 512]), Status::IoError as u8);
    assert_eq!(bench.read(0, 512), vec![0x11; 512]);
}

#[test]
fn a_reset_gives_the_stores_back_for_the_next_driver() {
    let dir = tempfile::tempdir().unwrap();
    let (_, spec) = image_of(dir.path(), 1 << 20);
    let mut disk = block(&spec, 3);
    let ram = testing::ram(RAM);
    // A driver need not use all queues.
    for enabled in [&[0, 2][..], &[0, 1, 2], &[1]] {
        let drivers: Vec<_> = enabled.iter().map(|index| driver(&ram, *index)).collect();
        let handlers = disk
            .activate(activation(&ram, &drivers, EVERYTHING, true))
            .unwrap();
        assert_eq!(handlers.len(), enabled.len());
        disk.write_config(WRITEBACK, &[0]);
        // Twice the same queue is a bug that is reported.
        let again = disk.activate(activation(&ram, &drivers, EVERYTHING, true));
        assert!(again.is_err());
        disk.reset(handlers);
        assert!(disk.stores.iter().all(Option::is_some));
        assert_eq!(disk.config()[WRITEBACK], 1);
    }
}

#[test]
fn the_saved_state_has_the_write_cache_and_refuses_another_size() {
    let dir = tempfile::tempdir().unwrap();
    let (_, spec) = image_of(dir.path(), 1 << 20);
    let mut disk = block(&spec, 1);
    disk.write_config(WRITEBACK, &[0]);
    let state = disk.save(&[]).unwrap();
    drop(disk);
    let mut same = block(&spec, 1);
    same.restore(&state).unwrap();
    assert_eq!(same.config()[WRITEBACK], 0);
    drop(same);
    std::fs::write(&spec.path, vec![0; 4096]).unwrap();
    let error = block(&spec, 1).restore(&state).unwrap_err().to_string();
    assert!(
        error.contains("4096") && error.contains("same image"),
        "{error}"
    );
}

#[test]
fn a_halted_disk_lets_its_image_go() {
    let mut bench = Bench::new(EVERYTHING);
    assert_eq!(bench.write(0, &[1; 512]), Status::Ok as u8);
    let spec = Spec {
        path: bench.path.clone(),
        readonly: false,
        format: None,
        direct: false,
        backing: false,
        stripe: Vec::new(),
        engine: Engine::Auto,
    };
    assert!(Image::open(&spec).is_err());
    bench.handler.quiesce();
    bench.block.reset(vec![bench.handler]);
    bench.block.halt();
    drop(bench.block);
    Image::open(&spec).unwrap();
}
