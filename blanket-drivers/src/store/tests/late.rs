//! Images whose content comes while they are in use.

use std::sync::Arc;
use std::time::Duration;

use blanket_memory::absent::{Absent, BLOCK};

use super::*;
use crate::store::Access;

const LEN: usize = 2 << 20;

/// What an image is to have, in the end.
fn source() -> Vec<u8> {
    (0..LEN as u64 / 8)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

fn late(dir: &Path, engine: Engine) -> Image {
    let path = raw_image(dir, LEN, 0);
    let spec = Spec {
        engine,
        ..spec(&path)
    };
    let image = Image::open(&spec).unwrap().with_late_content();
    image.absent().unwrap().expect(0..LEN as u64);
    image
}

/// Brings a range.
fn bring(absent: &Absent, access: &Access, source: &[u8], range: std::ops::Range<u64>) {
    let brought = absent.bring(range, |run| {
        access.write(run.start, &source[run.start as usize..run.end as usize])
    });
    brought.unwrap();
}

#[test]
fn what_is_read_and_written_before_it_has_come_is_as_if_it_had_been_there() {
    for engine in [Engine::Auto, Engine::Sync] {
        let dir = tempfile::tempdir().unwrap();
        let image = late(dir.path(), engine);
        let (absent, access) = (image.absent().unwrap(), image.access());
        let mut store = queue(&image);
        let source = Arc::new(source());
        let mut model = source.to_vec();
        let bringer = std::thread::spawn({
            let (absent, access, source) = (Arc::clone(&absent), access.clone(), source.clone());
            move || {
                let mut at = LEN as u64;
                while absent.any() {
                    for range in absent.take_wanted() {
                        bring(&absent, &access, &source, range);
                    }
                    // The others from the end on, again and again.
                    at = match at {
                        0 => LEN as u64,
                        at => at.saturating_sub(3 * BLOCK),
                    };
                    bring(&absent, &access, &source, at..at + 3 * BLOCK);
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
        });
        let mut random = 7u64;
        for i in 0..400 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (random >> 33) as usize % (LEN - 65536) / 512 * 512;
            let len = ((random >> 20) as usize % 128 + 1) * 512;
            if i % 3 == 0 {
                let bytes = vec![i as u8; len];
                model[at..at + len].copy_from_slice(&bytes);
                write(&mut *store, at as u64, bytes).unwrap();
            } else {
                let found = read(&mut *store, at as u64, len).unwrap();
                assert!(found == model[at..at + len], "{i}: {len} bytes at {at}");
            }
        }
        bringer.join().unwrap();
        assert!(read(&mut *store, 0, LEN).unwrap() == model);
    }
}

#[test]
fn a_store_that_is_drained_waits_for_what_has_not_come() {
    let dir = tempfile::tempdir().unwrap();
    let image = late(dir.path(), Engine::Auto);
    let (absent, access) = (image.absent().unwrap(), image.access());
    let mut store = queue(&image);
    let mut bytes = vec![0; 8192];
    let request = transfer(Operation::Read, 512, &mut bytes, &[]);
    // SAFETY: it is there until the end.
    unsafe { store.submit(request) }.unwrap();
    store.commit().unwrap();
    assert!(!event_within(&*store, 50) && store.in_flight() == 1);
    assert!(
        absent
            .take_wanted()
            .into_iter()
            .eq(std::iter::once(0..3 * BLOCK))
    );
    let bringer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        bring(&absent, &access, &source(), 0..1 << 20);
    });
    let mut done = Vec::new();
    store.drain(&mut done);
    assert_eq!(done.len(), 1);
    assert!(done[0].result.is_ok() && bytes == source()[512..512 + 8192]);
    bringer.join().unwrap();
}

#[test]
fn what_needs_content_that_is_lost_fails_and_all_else_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let image = late(dir.path(), Engine::Auto);
    let absent = image.absent().unwrap();
    let mut store = queue(&image);
    write(&mut *store, 8192, vec![3; 4096]).unwrap();
    let lost = Arc::clone(&absent);
    let loser = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        lost.lose();
    });
    let error = read(&mut *store, 0, 512).unwrap_err().to_string();
    assert!(error.contains("had not followed"), "{error}");
    loser.join().unwrap();
    assert!(write(&mut *store, 512, vec![3; 512]).is_err());
    write(&mut *store, 0, vec![4; 4096]).unwrap();
    assert_eq!(read(&mut *store, 8192, 4096).unwrap(), [3; 4096]);
    assert_eq!(read(&mut *store, 0, 512).unwrap(), [4; 512]);
}
