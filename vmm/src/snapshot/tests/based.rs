//! Snapshots that have what differs from another one.

use std::fs;

use tempfile::{TempDir, tempdir};

use super::*;

/// Writes what `ram` has to `name`, based on `base` if that is named.
fn save(dir: &Path, name: &str, ram: &GuestRam, base: Option<&str>, how: How) -> Written {
    let path = dir.join(name);
    let access = Access {
        key: how.key.clone(),
        ..Access::default()
    };
    let base = base.map(|base| Base::open(&dir.join(base), &path, &access).unwrap());
    let how = How { base, ..how };
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    record(&bytes(ram), options.unwrap(), how).unwrap()
}

/// Three files in a directory: all of memory, then what had changed, twice. And
/// that memory, as it was each time.
fn chain(how: &How) -> (TempDir, GuestRam, [Vec<u8>; 3]) {
    let dir = tempdir().unwrap();
    let ram = ram();
    for page in 0..256u64 {
        ram.write_obj(page + 1, GuestAddress(page * PAGE as u64))
            .unwrap();
    }
    save(dir.path(), "full", &ram, None, how.clone());
    let full = content(&ram);
    // A page that changes, one that goes, one that comes: alone in its chunk, and not.
    ram.write_obj(7u64, GuestAddress(3 * PAGE as u64)).unwrap();
    ram.write_obj(0u64, GuestAddress(5 * PAGE as u64)).unwrap();
    ram.write_obj(8u64, GuestAddress(HOLE)).unwrap();
    ram.write_obj(9u64, GuestAddress(300 * PAGE as u64))
        .unwrap();
    let second = save(dir.path(), "second", &ram, Some("full"), how.clone());
    assert_eq!(second.memory, 3 * PAGE as u64);
    let then = content(&ram);
    // A whole chunk of zeros where there was none, and what changed before changes again.
    for page in 16..32u64 {
        ram.write_obj(0u64, GuestAddress(page * PAGE as u64))
            .unwrap();
    }
    ram.write_obj(10u64, GuestAddress(3 * PAGE as u64)).unwrap();
    let third = save(dir.path(), "third", &ram, Some("second"), how.clone());
    assert_eq!(third.memory, PAGE as u64);
    (dir, ram.clone(), [full, then, content(&ram)])
}

#[test]
fn each_of_a_chain_has_the_memory_of_its_time() {
    let key = encrypted(7).key;
    for compression in [Compression::None, Compression::Zstd] {
        for key in [None, key.clone()] {
            let access = Access {
                key: key.clone(),
                ..Access::default()
            };
            let how = How {
                compression,
                key,
                base: None,
            };
            let (dir, _, expected) = chain(&how);
            for (name, expected) in ["full", "second", "third"].iter().zip(&expected) {
                let back = read_with(&dir.path().join(name), &access).unwrap();
                assert!(content(&back) == *expected, "{name}");
            }
        }
    }
}

#[test]
fn a_base_is_found_beside_the_file_or_where_it_is_said_to_be() {
    let (dir, ram, expected) = chain(&How::default());
    let other = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let moved = |name: &str| other.path().join(name);
    let reads = |path: &Path, access: &Access| {
        let back = read_with(path, access).map(|ram| content(&ram) == expected[2]);
        back.map_err(|error| error.to_string())
    };
    let anywhere = Access::default();
    // The file alone.
    fs::rename(at("third"), moved("third")).unwrap();
    let error = reads(&moved("third"), &anywhere).unwrap_err();
    let was = moved("second");
    assert!(error.contains(was.to_str().unwrap()), "{error}");
    assert!(
        error.contains("is not there") && error.contains("--base"),
        "{error}"
    );
    let said = Access {
        bases: vec![at("second")],
        ..Access::default()
    };
    assert_eq!(reads(&moved("third"), &said), Ok(true));
    // All of them.
    for name in ["full", "second"] {
        fs::rename(at(name), moved(name)).unwrap();
    }
    assert_eq!(reads(&moved("third"), &anywhere), Ok(true));
    // Only a base beneath its base, under another name.
    fs::rename(moved("full"), at("elsewhere")).unwrap();
    let error = reads(&moved("third"), &anywhere).unwrap_err();
    assert!(error.contains(moved("full").to_str().unwrap()), "{error}");
    let said = Access {
        bases: vec![moved("second"), at("elsewhere")],
        ..Access::default()
    };
    assert_eq!(reads(&moved("third"), &said), Ok(true));
    // In another directory.
    let far = at("elsewhere");
    let base = Base::open(&far, &moved("far"), &anywhere).unwrap();
    let how = How {
        base: Some(base),
        ..How::default()
    };
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(moved("far"));
    record(&bytes(&ram), options.unwrap(), how).unwrap();
    assert_eq!(reads(&moved("far"), &anywhere), Ok(true));
    fs::rename(moved("far"), at("far")).unwrap();
    assert_eq!(reads(&at("far"), &anywhere), Ok(true));
    // Another one in its place.
    fs::copy(moved("second"), moved("full")).unwrap();
    let error = reads(&moved("third"), &anywhere).unwrap_err();
    assert!(error.contains("is another snapshot"), "{error}");
}

#[test]
fn a_damaged_base_is_named() {
    let (dir, ..) = chain(&How::default());
    let full = dir.path().join("full");
    let file = File::options().read(true).write(true).open(&full).unwrap();
    let mut byte = [0];
    let at = (0..).map(|chunk| PAGE as u64 + chunk * PAGE as u64);
    // Page 8, which nobody has changed since.
    let at = at.take(400).find(|at| {
        file.read_exact_at(&mut byte, *at).unwrap();
        byte == [9]
    });
    file.write_all_at(&[1], at.unwrap()).unwrap();
    let error = read_file(&dir.path().join("third"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/full is damaged (chunk 0,"), "{error}");
    let len = file.metadata().unwrap().len();
    file.write_all_at(&[1], len - 1).unwrap();
    let error = read_file(&dir.path().join("third"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/full: it is damaged"), "{error}");
}

#[test]
fn what_cannot_be_a_base_is_refused() {
    let (dir, ram, _) = chain(&How::default());
    let open = |base: &str, file: &str| {
        let opened = Base::open(
            &dir.path().join(base),
            &dir.path().join(file),
            &Access::default(),
        );
        opened.map(drop).map_err(|error| error.to_string())
    };
    open("third", "fourth").unwrap();
    for own in ["full", "second", "third"] {
        let error = open("third", own).unwrap_err();
        assert!(error.contains("another name"), "{error}");
    }
    fs::write(dir.path().join("old"), bytes(&ram)).unwrap();
    let error = open("old", "new").unwrap_err();
    assert!(
        error.contains("version 1") && error.contains("without --base"),
        "{error}"
    );
    save(dir.path(), "sealed", &ram, None, encrypted(7));
    let error = open("sealed", "new").unwrap_err();
    assert!(error.contains("name its key"), "{error}");
    // One that is not encrypted may be beneath one that is.
    save(dir.path(), "mixed", &ram, Some("third"), encrypted(7));
    let back = read_with(&dir.path().join("mixed"), &access(7)).unwrap();
    assert!(content(&back) == content(&ram));
    let base = Base::open(
        &dir.path().join("full"),
        &dir.path().join("x"),
        &Access::default(),
    );
    let how = How {
        base: Some(base.unwrap()),
        ..How::default()
    };
    let regions = Regions(vec![(0, SIZE as u64)]);
    let writer = Writer::new(tempfile::tempfile().unwrap(), &head(), regions, how);
    assert!(matches!(writer, Err(Error::BaseMemory)));
}

#[test]
fn a_chain_has_an_end() {
    let dir = tempdir().unwrap();
    let ram = ram();
    ram.write_obj(1u64, GuestAddress(0)).unwrap();
    save(dir.path(), "0", &ram, None, How::default());
    for number in 1..=MOST_BASES {
        let base = (number - 1).to_string();
        save(
            dir.path(),
            &number.to_string(),
            &ram,
            Some(&base),
            How::default(),
        );
    }
    let last = dir.path().join(MOST_BASES.to_string());
    assert!(content(&read_file(&last).unwrap()) == content(&ram));
    let error = Base::open(&last, &dir.path().join("new"), &Access::default());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("without --base"), "{error}");
}
