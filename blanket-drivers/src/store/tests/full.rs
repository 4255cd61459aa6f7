//! Files for which there is no room.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::super::stripe;
use super::*;

/// Room of the file system, in bytes.
const ROOM: usize = 2 << 20;

/// Has this thread alone see a file system with [`ROOM`] in `dir`.
fn mount(dir: &Path) -> io::Result<()> {
    let dir = CString::new(dir.as_os_str().as_bytes())?;
    let options = CString::new(format!("size={ROOM}"))?;
    // SAFETY: all strings end with a zero and outlive the calls.
    let failed = unsafe {
        libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) != 0
            || libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) != 0
            || libc::mount(
                c"none".as_ptr(),
                dir.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            ) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs `test` in a folder with little room, if one can be had.
fn with_little_room(test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| match mount(dir.path()) {
            Ok(()) => test(dir.path()),
            Err(error) => eprintln!("skipped, because nothing can be mounted: {error}"),
        });
    });
}

/// A write's completion.
fn try_write(store: &mut dyn Store, request: Request) -> Completion {
    // SAFETY: the callers keep the memory until this returns.
    unsafe { store.submit(request) }.unwrap();
    let mut done = Vec::new();
    store.drain(&mut done);
    assert_eq!(done.len(), 1);
    done.remove(0)
}

/// Fills the room, and does a write again when some of it was given back.
fn what_found_no_room_is_done_later(spec: &Spec, ballast: &Path) {
    let image = Image::open(spec).unwrap();
    let mut store = queue(&image);
    write(&mut *store, 0, vec![1; 4096]).unwrap();
    run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap();
    let error = std::fs::write(ballast, vec![0; ROOM]).unwrap_err();
    assert!(is_full(&error), "{error}");
    // Half a MiB, the first page of which has its room already.
    let mut bytes: Vec<u8> = (0..512 << 10).map(|i| (i >> 9) as u8).collect();
    let request = transfer(Operation::Write, 0, &mut bytes, &[100, 70_000]);
    let refused = try_write(&mut *store, request);
    assert!(is_full(&refused.result.unwrap_err()));
    let rest = refused.rest.unwrap();
    // As often as it takes; whole if need be.
    let refused = try_write(&mut *store, rest);
    let rest = refused.rest.unwrap();
    std::fs::remove_file(ballast).unwrap();
    let done = try_write(&mut *store, rest);
    assert!(done.result.is_ok() && done.rest.is_none(), "{done:?}");
    assert_eq!(read(&mut *store, 0, bytes.len()).unwrap(), bytes);
    run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap();
}

#[test]
fn a_write_that_finds_no_room_comes_back_and_is_done_when_there_is_some() {
    with_little_room(|dir| {
        let path = dir.join("disk.raw");
        for engine in [Engine::Auto, Engine::Sync] {
            let file = std::fs::File::create(&path).unwrap();
            file.set_len(64 << 20).unwrap();
            let spec = Spec {
                engine,
                ..spec(&path)
            };
            what_found_no_room_is_done_later(&spec, &dir.join("ballast"));
        }
    });
}

#[test]
fn a_striped_sets_volumes_may_have_no_room_too() {
    with_little_room(|dir| {
        let volumes = ["a", "b"].map(|name| dir.join(name));
        for path in &volumes {
            std::fs::File::create(path)
                .unwrap()
                .set_len(64 << 20)
                .unwrap();
        }
        stripe::create(&volumes, 64 << 10, false).unwrap();
        let spec = Spec {
            stripe: vec![volumes[1].clone()],
            ..spec(&volumes[0])
        };
        what_found_no_room_is_done_later(&spec, &dir.join("ballast"));
    });
}

#[test]
fn a_full_qcow2_image_goes_on_when_there_is_room() {
    if !have_qemu_img() {
        return;
    }
    with_little_room(|dir| {
        qemu_img(dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
        let spec = Spec {
            format: Some(Format::Qcow2),
            ..spec(&dir.join("disk.qcow2"))
        };
        what_found_no_room_is_done_later(&spec, &dir.join("ballast"));
        qemu_img(dir, &["check", "disk.qcow2"]);
    });
}
