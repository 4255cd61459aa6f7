//! Content beside the stores: the same bytes, whatever the image is.

use super::super::{Access, create_overlay, stripe};
use super::*;

const CHUNK: u64 = 8192;
const LEN: u64 = 64 * CHUNK;

/// A raw image, an overlay and a striped set, all of zeros.
fn images(dir: &Path) -> Vec<Image> {
    let raw = dir.join("raw");
    std::fs::File::create(&raw).unwrap().set_len(LEN).unwrap();
    let (below, top) = (dir.join("below"), dir.join("top"));
    std::fs::File::create(&below).unwrap().set_len(LEN).unwrap();
    create_overlay(&top, &below).unwrap();
    let volumes = ["a", "b"].map(|name| dir.join(name));
    for volume in &volumes {
        // Room for what the set says of itself.
        let file = std::fs::File::create(volume).unwrap();
        file.set_len(LEN / 2 + (1 << 20)).unwrap();
    }
    stripe::create(&volumes, CHUNK, false).unwrap();
    let open = |spec: Spec| Image::open(&spec).unwrap();
    vec![
        open(spec(&raw)),
        open(Spec {
            format: Some(Format::Qcow2),
            ..spec(&top)
        }),
        open(Spec {
            format: None,
            stripe: vec![volumes[1].clone()],
            ..spec(&volumes[0])
        }),
    ]
}

/// Everything that may be other than zeros.
fn data(access: &Access) -> Vec<(u64, Vec<u8>)> {
    let (mut all, mut at) = (Vec::new(), 0);
    while let Some(range) = access.next_data(at).unwrap() {
        assert!(range.start >= at && range.end > range.start);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        access.read(range.start, &mut bytes).unwrap();
        at = range.end;
        all.push((range.start, bytes));
    }
    all
}

#[test]
fn what_is_written_beside_a_store_is_read_through_it_and_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    for image in images(dir.path()) {
        let access = image.access();
        assert_eq!(access.capacity(), image.capacity());
        let mut store = queue(&image);
        let pattern: Vec<u8> = (0..3 * CHUNK).map(|i| (i % 251) as u8).collect();
        // Across chunks of a set.
        access.write(CHUNK - 512, &pattern).unwrap();
        assert_eq!(
            read(&mut *store, CHUNK - 512, pattern.len()).unwrap(),
            pattern
        );
        write(&mut *store, 20 * CHUNK, pattern.clone()).unwrap();
        let mut bytes = vec![0; pattern.len()];
        access.read(20 * CHUNK, &mut bytes).unwrap();
        assert_eq!(bytes, pattern);
        access.clear(20 * CHUNK, 2 * CHUNK).unwrap();
        access.flush().unwrap();
        let mut whole = vec![0; image.capacity() as usize];
        for (at, bytes) in data(&access) {
            whole[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        assert_eq!(read(&mut *store, 0, whole.len()).unwrap(), whole);
        assert_eq!(
            whole[20 * CHUNK as usize..][..2 * CHUNK as usize],
            vec![0; 2 * CHUNK as usize]
        );
        assert!(access.read(image.capacity(), &mut [0; 512]).is_err());
        assert!(access.write(image.capacity() - 512, &[0; 1024]).is_err());
    }
}

#[test]
fn the_holes_of_a_raw_image_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let image = Image::open(&spec(&path)).unwrap();
    let access = image.access();
    assert_eq!(access.next_data(0).unwrap(), None);
    access.write(512 << 20, &[1; 4096]).unwrap();
    let found = access.next_data(0).unwrap().unwrap();
    assert!(found.contains(&(512 << 20)) && found.end - found.start <= 1 << 20);
    assert_eq!(access.next_data(found.end).unwrap(), None);
}
