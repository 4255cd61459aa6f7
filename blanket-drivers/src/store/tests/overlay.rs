//! Images over others.

use super::super::create_overlay;
use super::*;

#[test]
fn an_overlay_reads_what_is_below_it_and_keeps_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let base = raw_image(dir.path(), 1 << 20, 7);
    let tops = ["a", "b"].map(|name| dir.path().join(name));
    for top in &tops {
        create_overlay(top, &base).unwrap();
        let again = create_overlay(top, &base).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }
    let open = |path: &Path| {
        let format = Some(Format::Qcow2);
        Image::open(&Spec {
            format,
            ..spec(path)
        })
        .unwrap()
    };
    // Both at once; one of them over the other's kind, too.
    let images = [open(&tops[0]), open(&tops[1])];
    assert_eq!(images[0].capacity(), 1 << 20);
    let mut stores = [queue(&images[0]), queue(&images[1])];
    write(&mut *stores[0], 4096, vec![1; 512]).unwrap();
    assert_eq!(
        read(&mut *stores[0], 4096, 1024).unwrap()[510..514],
        [1, 1, 7, 7]
    );
    assert_eq!(read(&mut *stores[1], 4096, 512).unwrap(), vec![7; 512]);
    // Nobody writes to what is below.
    assert!(matches!(
        Image::open(&spec(&base)),
        Err(super::super::Error::InUse { .. })
    ));
    run(&mut *stores[0], plain(Operation::Flush, 0, 0)).unwrap();
    drop((stores, images));
    assert!(std::fs::read(&base).unwrap() == vec![7; 1 << 20]);
    let third = dir.path().join("c");
    create_overlay(&third, &tops[0]).unwrap();
    let image = open(&third);
    assert_eq!(read(&mut *queue(&image), 4096, 512).unwrap(), vec![1; 512]);
}
