//! Drivers that break the rules: answered with an error, or the device asks
//! for a reset; never more.

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

use super::*;

const ERROR: u8 = Status::IoError as u8;

#[test]
fn malformed_requests_get_an_error_and_the_disk_goes_on() {
    let mut bench = Bench::new(EVERYTHING);
    let unknown = Status::Unsupported as u8;
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    for (kind, sector, data, status) in [
        // Beyond the end, wrapping around.
        (read, 2048, vec![(DATA_AT, 512, true)], ERROR),
        (write, 2047, vec![(DATA_AT, 1024, false)], ERROR),
        (read, u64::MAX, vec![(DATA_AT, 512, true)], ERROR),
        (write, 1 << 55, vec![(DATA_AT, 512, false)], ERROR),
        (write, (1 << 55) - 1, vec![(DATA_AT, 512, false)], ERROR),
        // The wrong direction, or nothing.
        (read, 0, vec![(DATA_AT, 512, false)], ERROR),
        (write, 0, vec![(DATA_AT, 512, true)], ERROR),
        (read, 0, vec![], ERROR),
        (write, 0, vec![(DATA_AT, 0, false)], ERROR),
        // Parts of sectors.
        (read, 0, vec![(DATA_AT, 511, true)], ERROR),
        (write, 0, vec![(DATA_AT, 513, false)], ERROR),
        // Nothing we know.
        (2, 0, vec![(DATA_AT, 512, true)], unknown),
        (u32::MAX, 0, vec![], unknown),
    ] {
        let said = bench.ask(kind, sector, &data);
        assert_eq!(said, (1, status), "{kind} {sector} {data:?}");
    }
    assert_eq!(bench.counter("errors"), 13);
    assert_eq!(bench.driver.interrupts.reset_count(), 0);
    assert_eq!(bench.driver.interrupts.config_count(), 0);
    assert_eq!(bench.write(0, &[5; 512]), Status::Ok as u8);
    assert_eq!(bench.read(0, 512), vec![5; 512]);
    assert_eq!(bench.read(1, 512), vec![0x11; 512]);
}

#[test]
fn a_request_without_room_for_its_status_is_given_back_empty() {
    let mut bench = Bench::new(EVERYTHING);
    put_header(&bench.ram, HEADER_AT, VIRTIO_BLK_T_OUT, 0);
    let head = bench
        .driver
        .add(&[(HEADER_AT, 16, false), (DATA_AT, 512, false)]);
    bench.serve();
    assert_eq!(bench.driver.used(), Some((head, 0)));
    let short = bench
        .driver
        .add(&[(HEADER_AT, 15, false), (STATUS_AT, 1, true)]);
    bench.serve();
    assert_eq!(bench.driver.used(), Some((short, 1)));
    assert_eq!(status(&bench.ram), ERROR);
    // A chain of more than 4 GiB counts only up to there.
    let long = [(HEADER_AT, 16, false), (DATA_AT, u32::MAX, true)];
    let long = bench.driver.add(&long);
    bench.serve();
    assert_eq!(bench.driver.used(), Some((long, 0)));
    let nothing = bench.driver.add(&[(HEADER_AT, 0, false)]);
    bench.serve();
    assert_eq!(bench.driver.used(), Some((nothing, 0)));
    assert_eq!(std::fs::read(&bench.path).unwrap(), vec![0x11; 1 << 20]);
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut bench = Bench::new(EVERYTHING);
    put_header(&bench.ram, HEADER_AT, VIRTIO_BLK_T_IN, 0);
    let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
    bench
        .driver
        .describe(0, Descriptor::new(HEADER_AT, 16, next, 1));
    bench
        .driver
        .describe(1, Descriptor::new(DATA_AT, 512, next | write, 1));
    bench.driver.offer(0);
    bench.serve();
    let answered = bench.driver.used().is_some();
    assert!(answered || bench.driver.interrupts.reset_count() == 1);
}

#[test]
fn buffers_outside_memory_break_the_queue_until_a_reset() {
    for (addr, len) in [(RAM as u64 - 100, 512), (1 << 40, 512), (0, u32::MAX - 17)] {
        let mut bench = Bench::new(EVERYTHING);
        put_header(&bench.ram, HEADER_AT, VIRTIO_BLK_T_IN, 0);
        bench.driver.add(&[
            (HEADER_AT, 16, false),
            (addr, len, true),
            (STATUS_AT, 1, true),
        ]);
        bench.serve();
        assert_eq!(bench.driver.used(), None);
        assert_eq!(bench.driver.interrupts.reset_count(), 1, "{addr:#x}");
        // Reset is the way out.
        bench.block.reset(vec![bench.handler]);
        bench.driver = driver(&bench.ram, 0);
        let again = activation(
            &bench.ram,
            std::slice::from_ref(&bench.driver),
            EVERYTHING,
            true,
        );
        bench.handler = bench.block.activate(again).unwrap().remove(0);
        assert_eq!(bench.read(0, 512), vec![0x11; 512]);
    }
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        4 => 0..RAM as u64,
        2 => Just(HEADER_AT),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..2048u32, 2 => Just(16u32), 2 => Just(512u32), 1 => any::<u32>()];
    (
        addr,
        len,
        0..8u16,
        prop_oneof![8 => 0..16u16, 1 => any::<u16>()],
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_in_the_ring_neither_panics_nor_hangs(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![8 => 0..16u16, 1 => any::<u16>()], 1..40),
        kind in 0..16u32,
        sector in prop_oneof![0..4096u64, any::<u64>()],
    ) {
        let mut bench = Bench::new(EVERYTHING);
        put_header(&bench.ram, HEADER_AT, kind, sector);
        for (i, (addr, len, flags, next)) in table.into_iter().enumerate() {
            let descriptor = Descriptor::new(addr, len, flags, next);
            bench.driver.describe(u16::try_from(i).unwrap(), descriptor);
        }
        let offered = heads.len();
        for head in heads {
            bench.driver.offer(head);
        }
        bench.serve();
        // Buffers may lie over the rings themselves, so even the used index
        // may be anything. The disk keeps its size, the handler its store.
        prop_assert!(bench.driver.interrupts.reset_count() <= 1);
        prop_assert!(bench.counter("writes") + bench.counter("reads") <= 65_536 + offered as u64);
        prop_assert_eq!(std::fs::metadata(&bench.path).unwrap().len(), 1 << 20);
        bench.block.reset(vec![bench.handler]);
        prop_assert!(bench.block.stores.iter().all(Option::is_some));
    }
}
