//! virtio-blk's queue, on an io_uring or a thread: no ring, chain, request,
//! move or reset hurts the device, the image never grows, and a driver that
//! behaves reads back what it writes afterwards.
#![no_main]

use arbitrary::Arbitrary;
use blanket_devices::virtio::blk::Block;
use blanket_drivers::store::{Engine, Format, Image, Spec};
use blanket_fuzz::bench::Bench;
use blanket_fuzz::file::MemFile;
use blanket_fuzz::guest::Session;
use libfuzzer_sys::fuzz_target;

/// Bytes of the disk.
const CAPACITY: u64 = 64 << 10;
/// Request types (virtio 1.2, 5.2.6), little-endian.
const IN: [u8; 4] = [0, 0, 0, 0];
const OUT: [u8; 4] = [1, 0, 0, 0];

#[derive(Arbitrary, Debug)]
struct Input {
    thread: bool,
    readonly: bool,
    session: Session,
}

fn header(kind: [u8; 4], sector: u8) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind);
    header[8] = sector;
    header
}

fuzz_target!(|input: Input| {
    let file = MemFile::new(&[], CAPACITY);
    let image = Image::open(&Spec {
        path: file.path(),
        readonly: input.readonly,
        format: Some(Format::Raw),
        direct: false,
        backing: false,
        stripe: Vec::new(),
        engine: if input.thread {
            Engine::Sync
        } else {
            Engine::Auto
        },
    });
    let image = image.expect("an image");
    let device = Block::new("disk0", image, None, 1, || Box::new(|| Ok(())));
    let mut device = device.expect("a disk");
    let mut bench = Bench::new(&mut device);
    bench.run(&input.session, |_| {});
    assert_eq!(file.len(), CAPACITY);

    bench.behave(input.session.features);
    let data = [0x5a; 512];
    let (len, status) = bench.ask(0, &[&header(OUT, 3), &data], &[1]);
    assert_eq!((len, status[0] == 0), (1, !input.readonly));
    let (len, bytes) = bench.ask(0, &[&header(IN, 3)], &[512, 1]);
    assert_eq!((len, bytes[512]), (513, 0));
    assert!(input.readonly || bytes[..512] == data);
    bench.finish();
});
