//! Sets that are whole, and sets that are not.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::*;
use crate::store::{Engine, Operation, Request, Store};
use blanket_memory::IoVec;
use proptest::prelude::*;

const CHUNK: u64 = 8192;

fn volumes(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    let make = |name: &&str| {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(DATA_START + 16 * CHUNK).unwrap();
        path
    };
    names.iter().map(make).collect()
}

fn spec(paths: &[&PathBuf]) -> Spec {
    Spec {
        path: paths[0].clone(),
        readonly: false,
        format: None,
        direct: false,
        backing: false,
        engine: Engine::Auto,
        stripe: paths[1..].iter().map(|path| (*path).clone()).collect(),
    }
}

fn refusal(paths: &[&PathBuf]) -> String {
    Image::open(&spec(paths)).unwrap_err().to_string()
}

#[test]
fn the_order_in_which_volumes_are_named_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let all = volumes(dir.path(), &["a", "b", "c"]);
    let layout = create(&all, CHUNK, false).unwrap();
    assert_eq!(layout.capacity(), 3 * 16 * CHUNK);
    let first = Image::open(&spec(&[&all[0], &all[1], &all[2]])).unwrap();
    assert_eq!(first.capacity(), layout.capacity());
    drop(first);
    // What is first is the first volume's, whoever is named first.
    let one = [b'x'; 512];
    let marked = File::options().write(true).open(&all[0]).unwrap();
    marked.write_all_at(&one, DATA_START).unwrap();
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let image = Image::open(&spec(&order.map(|i| &all[i]))).unwrap();
        let mut store = image.queue(4, &|| Box::new(|| Ok(()))).unwrap();
        assert_eq!(read(&mut *store, 0, 512).unwrap(), one, "{order:?}");
    }
}

fn read(store: &mut dyn Store, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let request = Request {
        operation: Operation::Read,
        offset,
        len: 0,
        vectors: vec![IoVec::new(bytes.as_mut_ptr(), len)],
        token: 9,
    };
    // SAFETY: `bytes` outlives the drain.
    unsafe { store.submit(request) }.unwrap();
    let mut done = Vec::new();
    store.drain(&mut done);
    assert_eq!((done.len(), done[0].token), (1, 9));
    done.remove(0).result.map(|n| {
        assert_eq!(n as usize, len);
        bytes
    })
}

#[test]
fn a_set_that_is_not_whole_or_not_one_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let all = volumes(dir.path(), &["a", "b", "c", "d", "e", "f"]);
    create(&all[..3], CHUNK, false).unwrap();
    create(&all[3..5], CHUNK, false).unwrap();
    let [a, b, c, d, _, f] = [0, 1, 2, 3, 4, 5].map(|i| &all[i]);
    let told = refusal(&[c, a]);
    assert!(told.contains("3 volumes; number 1 is missing"), "{told}");
    let told = refusal(&[a, b, d]);
    assert!(told.contains("another striped set"), "{told}");
    let told = refusal(&[a, f, b]);
    assert!(told.contains("blanket store stripe"), "{told}");
    let told = refusal(&[a]);
    assert!(told.contains("one volume of a striped set"), "{told}");
    let copy = dir.path().join("copy");
    std::fs::copy(a, &copy).unwrap();
    let told = refusal(&[a, b, &copy]);
    assert!(told.contains("name each volume once"), "{told}");
    let file = File::options().write(true).open(c).unwrap();
    file.set_len(DATA_START + CHUNK).unwrap();
    let told = refusal(&[a, b, c]);
    assert!(told.contains("needs"), "{told}");
    file.write_all_at(b"?", 100).unwrap();
    let told = refusal(&[a, b, c]);
    assert!(told.contains("damaged"), "{told}");
}

#[test]
fn a_volume_of_a_set_that_is_named_by_itself_stays_what_it_is_unless_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let all = volumes(dir.path(), &["a", "b"]);
    create(&all, CHUNK, false).unwrap();
    let meant = Spec {
        format: Some(Format::Raw),
        ..spec(&[&all[0]])
    };
    assert!(Image::open(&meant).is_ok());
}

#[test]
fn what_is_not_empty_is_not_striped_unless_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let all = volumes(dir.path(), &["a", "b"]);
    let file = File::options().write(true).open(&all[1]).unwrap();
    let end = DATA_START + 16 * CHUNK - 1;
    file.write_all_at(b"x", end).unwrap();
    let before = contents(&all);
    let error = create(&all, CHUNK, false).unwrap_err();
    assert!(matches!(&error, Error::NotEmpty { path } if *path == all[1]));
    assert_eq!(contents(&all), before);
    create(&all, CHUNK, true).unwrap();
    for (paths, chunk) in [(&all[..1], CHUNK), (&all[..], 12_288), (&all[..], 1 << 30)] {
        assert!(matches!(create(paths, chunk, true), Err(Error::Shape(_))));
    }
    // In use by a VM.
    let image = Image::open(&spec(&[&all[0], &all[1]])).unwrap();
    assert!(matches!(create(&all, CHUNK, true), Err(Error::Open(_))));
    drop(image);
}

fn contents(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

#[test]
fn a_volume_that_fails_costs_its_own_chunks_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let all = volumes(dir.path(), &["a", "b"]);
    create(&all, CHUNK, false).unwrap();
    for engine in [Engine::Auto, Engine::Sync] {
        let image = Image::open(&Spec {
            engine,
            ..spec(&[&all[0], &all[1]])
        })
        .unwrap();
        let mut store = image.queue(4, &|| Box::new(|| Ok(()))).unwrap();
        let file = File::options().write(true).open(&all[1]).unwrap();
        file.set_len(DATA_START).unwrap();
        assert!(read(&mut *store, 0, 8192).is_ok());
        assert!(read(&mut *store, CHUNK, 512).is_err());
        assert!(read(&mut *store, 0, 16_384).is_err());
        assert!(read(&mut *store, 2 * CHUNK, 512).is_ok());
        file.set_len(DATA_START + 16 * CHUNK).unwrap();
    }
}

fn layout() -> impl Strategy<Value = Layout> {
    (2..6u32, 12..17u32, 1..20u64).prop_map(|(volumes, chunk, chunks)| Layout {
        volumes,
        chunk: 1 << chunk,
        data: chunks << chunk,
    })
}

proptest! {
    #[test]
    fn ranges_are_split_without_a_gap_or_an_overlap(
        layout in layout(),
        start in any::<prop::sample::Index>(),
        end in any::<prop::sample::Index>(),
    ) {
        let whole = usize::try_from(layout.capacity()).unwrap();
        let (a, b) = (start.index(whole) as u64, end.index(whole) as u64);
        let (start, end) = (a.min(b), a.max(b));
        let mut total = 0;
        for volume in 0..layout.volumes {
            let before = layout.extent(volume, 0, start);
            let part = layout.extent(volume, start, end - start);
            let after = layout.extent(volume, end, layout.capacity() - end);
            prop_assert_eq!(before.offset, DATA_START);
            prop_assert_eq!(before.offset + before.len, part.offset);
            prop_assert_eq!(part.offset + part.len, after.offset);
            prop_assert_eq!(after.offset + after.len, DATA_START + layout.data);
            total += part.len;
        }
        prop_assert_eq!(total, end - start);
    }

    #[test]
    fn memory_is_dealt_out_as_the_ranges_are(
        layout in layout(),
        at in any::<prop::sample::Index>(),
        lengths in prop::collection::vec(1..100_000usize, 1..8),
    ) {
        let len: usize = lengths.iter().sum();
        prop_assume!(len as u64 <= layout.capacity());
        let offset = at.index(usize::try_from(layout.capacity()).unwrap() - len + 1) as u64;
        let mut memory = vec![0u8; len];
        let mut rest = &mut memory[..];
        let vectors: Vec<IoVec> = lengths
            .iter()
            .map(|len| {
                let (piece, more) = std::mem::take(&mut rest).split_at_mut(*len);
                rest = more;
                IoVec::new(piece.as_mut_ptr(), *len)
            })
            .collect();
        let dealt = layout.deal(offset, &vectors);
        for (volume, pieces) in (0..).zip(&dealt) {
            let extent = layout.extent(volume, offset, len as u64);
            prop_assert_eq!(IoVec::total(pieces) as u64, extent.len);
            // Each byte says which volume it went to.
            let own = vec![u8::try_from(volume).unwrap() + 1; IoVec::total(pieces)];
            blanket_memory::iovec::write_bytes(pieces, &own);
        }
        for (i, byte) in memory.iter().enumerate() {
            let chunk = (offset + i as u64) / layout.chunk;
            prop_assert_eq!(u64::from(*byte), chunk % u64::from(layout.volumes) + 1);
        }
    }
}
