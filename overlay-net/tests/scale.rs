//! What many stations, ports and nodes cost, counted: bytes, allocations,
//! copies of a frame, messages.
#![allow(clippy::expect_used, reason = "a test that cannot be set up fails")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use blanket_overlay::frame::Mac;

#[path = "../examples/scale/world.rs"]
mod world;

use world::{Nodes, Size, World};

thread_local! {
    /// Bytes that this thread has, and how often it has asked for some.
    static HELD: Cell<(isize, usize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator, which counts for each thread.
struct Counting;

fn count(bytes: isize, calls: usize) {
    HELD.with(|held| {
        let (had, asked) = held.get();
        held.set((had + bytes, asked + calls));
    });
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize, 1);
        // SAFETY: the caller keeps the rules of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize), 0);
        // SAFETY: the caller keeps the rules of `dealloc`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A switch of that size, and the bytes that it holds.
fn weighed(size: Size) -> (World, f64) {
    let (before, _) = HELD.get();
    let world = World::new(size);
    let (after, _) = HELD.get();
    (world, (after - before) as f64)
}

#[test]
fn memory_and_copies_grow_no_faster_than_linearly_and_a_lookup_allocates_nothing() {
    // The second one is what the overlay is made for.
    let sizes = [1, 10, 100].map(|times| Size {
        stations: 1000 * times,
        ports: 100 * times,
        nodes: 10 * times,
    });
    let mut weights = Vec::new();
    for size in sizes {
        let (mut world, bytes) = weighed(size);
        weights.push(bytes);
        assert!(world.forward(1), "the list of outputs has room now");
        let (held, asked) = HELD.get();
        for number in (1..size.stations).step_by(7) {
            assert!(world.forward(number), "{number} of {size:?}");
        }
        assert_eq!(HELD.get(), (held, asked), "{size:?}");
        // To each other port, and once to each other node.
        assert!(world.send(Mac([0xff; 6])));
        assert_eq!(world.out.list.len() as u32, size.ports - 1 + size.nodes - 1);
        assert_eq!(world.directory.len() as u32, size.stations);
        println!(
            "{size:?}: {:.0} bytes a station",
            bytes / f64::from(size.stations)
        );
    }
    // Tables grow by doubling: up to twice what they need.
    for pair in weights.windows(2) {
        assert!(pair[1] < pair[0] * 10.0 * 2.0, "{weights:?}");
    }
    assert!(weights[2] < weights[0] * 100.0 * 1.5, "{weights:?}");
    // And what it is: a station's share of it all.
    assert!(weights[1] < 10_000.0 * 2048.0, "{weights:?}");
}

#[test]
fn a_station_that_moved_is_known_to_all_after_one_message_to_each_however_many_there_are() {
    for (count, stations) in [(10, 1000), (100, 1000)] {
        let mut nodes = Nodes::new(count, stations);
        for number in 0..5 {
            let spread = nodes.moves(number * count);
            assert_eq!(spread.rounds, 1);
            // What is acknowledged of the move before is under way, too.
            assert!(spread.messages as u32 <= 2 * (count - 1), "{spread:?}");
            assert!(spread.bytes <= 100 * spread.messages, "{spread:?}");
        }
    }
}
