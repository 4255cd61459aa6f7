//! What is made less arrives.

use blanket_memory::{Backing, Spec, build_at};
use proptest::prelude::*;

use super::*;
use crate::destination::place;

const PAGES: usize = 200;

fn ram() -> GuestRam {
    let size = (PAGES * PAGE) as u64;
    let spec = Spec {
        size,
        backing: Backing::Small,
        shared: false,
    };
    build_at(&spec, &[(GuestAddress(0), size)]).unwrap()
}

/// Has the destination take what is in a batch: its kinds.
fn take(batch: &mut Batch, ram: &GuestRam) -> Vec<Kind> {
    batch.add_zeros();
    let mut kinds = Vec::new();
    let mut rest = batch.frames.bytes();
    let mut payload = Vec::new();
    while !rest.is_empty() {
        let kind = wire::receive(&mut rest, &mut payload).unwrap();
        place(kind, &payload, ram).unwrap();
        kinds.push(kind);
    }
    batch.clear();
    kinds
}

/// Easy to compress, but for noise; `seed` 0 is zeros.
fn page(seed: u8, noise: bool) -> Page {
    let mut state = u64::from(seed);
    std::array::from_fn(|i| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        match (seed, noise) {
            (0, _) => 0,
            (_, true) => (state >> 33) as u8,
            (_, false) => seed.wrapping_add((i / 64) as u8) | 1,
        }
    })
}

fn options(compress: Compress) -> Options {
    Options {
        compress,
        ..Options::default()
    }
}

proptest! {
    /// Round after round over pages that change, with as much of each as there is.
    #[test]
    fn whatever_is_made_of_memory_it_arrives(
        rounds in proptest::collection::vec(
            proptest::collection::vec((0..PAGES, 0u8..5, any::<bool>(), 0..PAGE), 1..60), 1..6),
        compress in prop_oneof![Just(Compress::Auto), Just(Compress::Off), Just(Compress::Lz4)],
        groups in 0u64..4,
    ) {
        let there = ram();
        let mut here = vec![[0; PAGE]; PAGES];
        let options = Options { delta_cache: groups << 18, ..options(compress) };
        let squeeze = Squeeze::new(&options);
        let mut batch = Batch::default();
        for (number, round) in (0..).zip(&rounds) {
            let mut dirty = std::collections::BTreeSet::new();
            for (which, seed, noise, from) in round {
                // A part of it, mostly.
                let whole = page(*seed, *noise);
                here[*which][*from..].copy_from_slice(&whole[*from..]);
                dirty.insert(*which);
            }
            squeeze.begin_round(number > 0);
            let mut packer = squeeze.packer(Some(number));
            for which in dirty {
                packer.pack((which * PAGE) as u64, &here[which], &mut batch);
                if which % 7 == 0 {
                    packer.sent(batch.len(), Duration::from_millis(1));
                    take(&mut batch, &there);
                }
            }
            take(&mut batch, &there);
            for (which, page) in here.iter().enumerate() {
                let mut found = [0; PAGE];
                there.read_slice(&mut found, GuestAddress((which * PAGE) as u64)).unwrap();
                prop_assert!(found == *page, "round {}, page {}", number, which);
            }
        }
        let packed = squeeze.packed();
        prop_assert!(packed.compressed_to <= packed.compressed);
        prop_assert!(packed.changed_to <= packed.changed);
        if compress == Compress::Off {
            prop_assert_eq!(packed, Packed::default());
        }
    }

    #[test]
    fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let ram = ram();
        let _ = unpack(&bytes);
        let _ = change(&bytes, &ram);
        // With a sound head.
        let _ = unpack(&[&[0; 8][..], &8192u32.to_le_bytes(), &bytes].concat());
        let len = (bytes.len() as u16).to_le_bytes();
        let _ = change(&[&[0; 12][..], &len, &bytes].concat(), &ram);
    }
}

#[test]
fn what_is_compressed_is_so_and_what_has_changed_little_is_less() {
    let there = ram();
    let squeeze = Squeeze::new(&options(Compress::Lz4));
    let mut batch = Batch::default();
    let mut send = |number, pages: &[Page]| {
        squeeze.begin_round(number > 0);
        squeeze
            .packer(Some(number))
            .pack(0, pages.as_flattened(), &mut batch);
        let bytes = batch.len();
        (take(&mut batch, &there), bytes)
    };
    let mut pages = vec![
        page(3, false),
        page(4, false),
        page(0, false),
        page(5, true),
    ];
    let (kinds, bytes) = send(0, &pages);
    assert_eq!(kinds, [Kind::Lz4, Kind::Pages, Kind::Zeros]);
    assert!(bytes < 2 * PAGE, "{bytes}");
    // They are remembered from the second time on.
    send(1, &pages);
    pages[3][77] ^= 0xff;
    pages[1][78] ^= 0xff;
    let (kinds, bytes) = send(2, &pages[..]);
    assert_eq!(kinds, [Kind::Change, Kind::Zeros]);
    assert!(bytes < 300, "{bytes}");
    let packed = squeeze.packed();
    assert_eq!(packed.changed, 3 * PAGE as u64);
    assert!(packed.changed_to < 100 && packed.compressed_to < packed.compressed);
}

#[test]
fn a_change_of_another_page_and_memory_that_is_too_long_are_refused() {
    let there = ram();
    let squeeze = Squeeze::new(&options(Compress::Lz4));
    let mut batch = Batch::default();
    for number in 1..3 {
        squeeze.begin_round(true);
        squeeze
            .packer(Some(number))
            .pack(0, &page(5, true), &mut batch);
        if number == 1 {
            take(&mut batch, &there);
        }
    }
    there.write_obj(1u8, GuestAddress(9)).unwrap();
    let mut payload = Vec::new();
    let kind = wire::receive(&mut batch.frames.bytes(), &mut payload).unwrap();
    assert_eq!(kind, Kind::Change);
    let refused = change(&payload, &there).unwrap_err().to_string();
    assert!(refused.contains("another page"), "{refused}");
    for len in [MOST_MEMORY as u32 + 4096, u32::MAX, 100] {
        let payload = [&[0; 8][..], &len.to_le_bytes(), &[0; 20]].concat();
        assert!(
            unpack(&payload)
                .unwrap_err()
                .to_string()
                .contains("too long")
        );
    }
    // It is less than it says.
    let less = lz4_flex::block::compress(&[7; 4096]);
    let payload = [&[0; 8][..], &8192u32.to_le_bytes(), &less].concat();
    assert!(unpack(&payload).is_err());
}

#[test]
fn changes_are_told_over_slow_links_and_only_as_long_as_that_saves_something() {
    let squeeze = Squeeze::new(&options(Compress::Auto));
    let is_on = || lock(&squeeze.changes).on;
    let round = |bytes, after, work| {
        lock(&squeeze.changes).sums = Sums {
            before: bytes,
            after,
            work,
            send: Duration::ZERO,
        };
        squeeze.begin_round(true);
    };
    squeeze.begin_round(false);
    assert!(!is_on());
    squeeze.begin_round(true);
    assert!(!is_on(), "the link is not known");
    lock(&squeeze.judge).link = 10e-9;
    squeeze.begin_round(true);
    assert!(is_on());
    let work = Duration::from_millis(1);
    // Nothing was remembered before, then something, then it is of no use.
    round(1 << 20, 1 << 20, work);
    assert!(is_on());
    round(1 << 20, 1 << 10, work);
    assert!(is_on());
    round(1 << 20, 1 << 20, work);
    assert!(!is_on());
    for _ in 1..REST {
        squeeze.begin_round(true);
        assert!(!is_on());
    }
    squeeze.begin_round(true);
    assert!(is_on());
    lock(&squeeze.judge).link = 0.5e-9;
    squeeze.begin_round(true);
    assert!(!is_on());
}
