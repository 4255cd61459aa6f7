//! Virtqueues that no driver would make (virtio 1.2, 2.7).

use blanket_firmware::io::Width;
use blanket_firmware::random::Random;

use super::arena::Arena;
use super::virtio::{Device, common};

const ACKNOWLEDGE: u64 = 1;
const DRIVER: u64 = 2;
const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;
const VERSION_1: u64 = 1 << 32;

const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;

const QUEUES_MAX: u16 = 8;
/// Longest queue that is filled.
const SIZE_MAX: u64 = 1024;
const CORRUPTIONS: usize = 12;

/// Offsets from a queue's sound place.
const AVAIL: u64 = 64 << 10;
const USED: u64 = 128 << 10;

struct Queue {
    index: u16,
    size: u64,
    place: u64,
}

/// Brings the device up with hostile queues, kicks them, and corrupts them
/// while it works. The device is reset at the end.
pub(crate) fn attack(device: &Device, arena: &Arena, random: &mut Random) {
    device.reset();
    negotiate(device, random);
    let queues = (device.get(common::QUEUES, Width::Word) as u16).min(QUEUES_MAX);
    arena.fill_data(random);
    arena.fill_tables(random, |random, at| {
        put_descriptor(arena, random, at, SIZE_MAX, 0);
    });
    for index in 0..queues {
        let queue = Queue {
            index,
            size: setup(device, arena, random, index),
            place: arena.rings(index),
        };
        fill(arena, random, &queue);
    }
    let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    device.set(common::STATUS, Width::Byte, status);
    for index in 0..queues {
        device.set(common::QUEUE_SELECT, Width::Word, u64::from(index));
        device.kick(index);
    }
    for _ in 0..CORRUPTIONS {
        let index = random.below(u64::from(queues.max(1))) as u16;
        corrupt(arena, random, arena.rings(index));
        device.set(common::QUEUE_SELECT, Width::Word, u64::from(index));
        device.kick(index);
        device.garbage_kick(random);
    }
    device.reset();
}

fn negotiate(device: &Device, random: &mut Random) {
    device.set(common::STATUS, Width::Byte, ACKNOWLEDGE);
    device.set(common::STATUS, Width::Byte, ACKNOWLEDGE | DRIVER);
    let mut offered = 0;
    for half in 0..2 {
        device.set(common::FEATURE_SELECT, Width::Long, half);
        offered |= device.get(common::FEATURES, Width::Long) << (32 * half);
    }
    let features = match random.below(8) {
        0 => random.bits(),
        1..=3 => offered,
        _ => offered & random.bits() | VERSION_1,
    };
    for half in 0..2 {
        device.set(common::DRIVER_FEATURE_SELECT, Width::Long, half);
        device.set(
            common::DRIVER_FEATURES,
            Width::Long,
            features >> (32 * half),
        );
    }
    let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    device.set(common::STATUS, Width::Byte, status);
    device.set(common::MSIX_VECTOR, Width::Word, random.nasty());
}

/// Configures a queue, mostly soundly enough that the device accepts it.
/// Returns how many of its entries are to be filled.
fn setup(device: &Device, arena: &Arena, random: &mut Random, index: u16) -> u64 {
    device.set(common::QUEUE_SELECT, Width::Word, u64::from(index));
    let max = device.get(common::QUEUE_SIZE, Width::Word).max(1);
    let size = match random.below(8) {
        0 => random.nasty() & 0xffff,
        1 => max + 1,
        2 => (max >> random.below(8)).max(1),
        _ => max,
    };
    device.set(common::QUEUE_SIZE, Width::Word, size);
    device.set(common::QUEUE_MSIX_VECTOR, Width::Word, random.nasty());
    let place = arena.rings(index);
    for (register, sound) in [
        (common::QUEUE_DESC, place),
        (common::QUEUE_DRIVER, place + AVAIL),
        (common::QUEUE_DEVICE, place + USED),
    ] {
        let address = match random.below(32) {
            0 => arena.garbage(random),
            1 => sound + random.below(16),
            // Rings over each other.
            2 => place,
            _ => sound,
        };
        device.set(register, Width::Long, address);
        device.set(register + 4, Width::Long, address >> 32);
    }
    device.set(common::QUEUE_ENABLE, Width::Word, 1);
    size.clamp(1, SIZE_MAX)
}

fn put_descriptor(arena: &Arena, random: &mut Random, at: u64, size: u64, index: u64) {
    let flags = random.pick(&[
        0,
        NEXT,
        NEXT,
        WRITE,
        WRITE | NEXT,
        WRITE | NEXT,
        INDIRECT,
        INDIRECT | NEXT,
        0xffff,
    ]);
    let address = if flags & INDIRECT != 0 && !random.one_in(4) {
        arena.table(random)
    } else if random.one_in(4) {
        arena.garbage(random)
    } else {
        arena.data(random)
    };
    let len = match random.below(4) {
        0 => random.nasty(),
        1 => 16 * random.below(64),
        _ => random.pick(&[0, 1, 8, 12, 16, 20, 512, 1514, 4096, 65536]),
    };
    let next = match random.below(8) {
        0 => index,
        1 => size,
        2 => random.nasty(),
        3 => random.below(size),
        _ => (index + 1) % size,
    };
    put(arena, at, [address, len, flags, next]);
}

fn put(arena: &Arena, at: u64, [address, len, flags, next]: [u64; 4]) {
    arena.put(at, Width::Quad, address);
    arena.put(at + 8, Width::Long, len);
    arena.put(at + 12, Width::Word, flags);
    arena.put(at + 14, Width::Word, next);
}

/// A chain of the shape that devices expect, so that they look at its content:
/// a header, data, and a byte for the status. The header is what a disk wants.
fn put_request(arena: &Arena, random: &mut Random, queue: &Queue, head: u64) {
    let header = arena.data(random);
    let kind = match random.below(4) {
        0 => random.pick(&[4, 8, 11, 13, 14]),
        1 => random.nasty(),
        _ => random.below(2),
    };
    let sector = match random.below(4) {
        0 => random.nasty(),
        _ => random.below(256),
    };
    arena.put(header, Width::Quad, kind & 0xffff_ffff);
    arena.put(header + 8, Width::Quad, sector);
    // Kind 1 is a write to the disk, of data that the device reads.
    let direction = if kind & 1 == 1 && !random.one_in(4) {
        0
    } else {
        WRITE
    };
    let len = random.pick(&[1, 64, 512, 512, 1514, 4096, 65536]);
    let data = arena.data(random);
    let status = arena.data(random);
    let parts = [
        [header, 16, NEXT, head + 1],
        [data, len, NEXT | direction, head + 2],
        [status, 1, WRITE, 0],
    ];
    for (index, part) in (head..).zip(parts) {
        put(arena, queue.place + 16 * index, part);
    }
}

/// Fills descriptors, requests in the first half, and the available ring.
fn fill(arena: &Arena, random: &mut Random, queue: &Queue) {
    let requests = queue.size / 2 / 3;
    for request in 0..requests {
        put_request(arena, random, queue, 3 * request);
    }
    for index in 3 * requests..queue.size {
        let at = queue.place + 16 * index;
        put_descriptor(arena, random, at, queue.size, index);
    }
    // A device may stop at the first bad chain: sometimes there is none, until
    // the rings get corrupted.
    let sober = requests != 0 && random.one_in(2);
    let avail = queue.place + AVAIL;
    for entry in 0..queue.size {
        let head = match random.below(16) {
            _ if sober => 3 * random.below(requests),
            0 => random.nasty(),
            1 => queue.size,
            2..8 => 3 * random.below(requests.max(1)),
            _ => random.below(queue.size),
        };
        arena.put(avail + 4 + 2 * entry, Width::Word, head);
    }
    arena.put(avail, Width::Word, random.below(2));
    arena.put(avail + 4 + 2 * queue.size, Width::Word, random.nasty());
    let published = match random.below(8) {
        _ if sober => queue.size.min(1 + random.below(16)),
        0 => queue.size + 1 + u64::from(queue.index),
        1 => random.nasty(),
        _ => queue.size.min(1 + random.below(16)),
    };
    arena.put(avail + 2, Width::Word, published);
}

/// Overwrites something in the rings of a running queue and publishes more.
fn corrupt(arena: &Arena, random: &mut Random, place: u64) {
    for _ in 0..8 {
        let ring = place + random.pick(&[0, 0, AVAIL, USED]);
        let at = ring + random.below(4096) / 16 * 16;
        match random.below(3) {
            0 => put_descriptor(arena, random, at, SIZE_MAX, random.clone().below(SIZE_MAX)),
            1 => arena.put(at + 8, Width::Long, random.nasty()),
            _ => arena.put(at + 12, Width::Long, random.nasty()),
        }
    }
    let published = arena.get(place + AVAIL + 2, Width::Word);
    let more = match random.below(4) {
        0 => random.nasty(),
        _ => random.below(16),
    };
    let published = published.wrapping_add(more);
    arena.put(place + AVAIL + 2, Width::Word, published);
}
