//! Images that cannot be opened, and what the errors say.

use super::super::{Error, lock};
use super::*;

fn refusal(spec: &Spec) -> String {
    Image::open(spec).unwrap_err().to_string()
}

#[test]
fn a_writer_keeps_everybody_off_and_readers_keep_writers_off() {
    let dir = tempfile::tempdir().unwrap();
    let writer = spec(&raw_image(dir.path(), 4096, 0));
    let reader = Spec {
        readonly: true,
        ..writer.clone()
    };
    let image = Image::open(&writer).unwrap();
    assert!(matches!(Image::open(&writer), Err(Error::InUse { .. })));
    let said = refusal(&reader);
    assert!(
        said.contains("in use by another VM") && said.contains("stop it"),
        "{said}"
    );
    drop(image);
    let _one = Image::open(&reader).unwrap();
    let _two = Image::open(&reader).unwrap();
    assert!(matches!(Image::open(&writer), Err(Error::InUse { .. })));
}

#[test]
fn the_lock_is_held_as_long_as_a_store_lives() {
    let dir = tempfile::tempdir().unwrap();
    for engine in [Engine::Auto, Engine::Sync] {
        let spec = Spec {
            engine,
            ..spec(&raw_image(dir.path(), 4096, 0))
        };
        let image = Image::open(&spec).unwrap();
        let store = queue(&image);
        drop(image);
        assert!(matches!(Image::open(&spec), Err(Error::InUse { .. })));
        drop(store);
        Image::open(&spec).unwrap();
    }
}

#[test]
fn a_lock_of_another_process_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(dir.path(), 4096, 0);
    // The child inherits the open file and with it the lock.
    let file = std::fs::File::options().read(true).write(true).open(&path);
    let file = file.unwrap();
    assert!(lock::take(&file, true).unwrap());
    let mut child = Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
    let said = refusal(&spec(&path));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(said.contains(&format!("(pid {})", child.id())), "{said}");
}

#[test]
fn every_unusable_image_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("empty"), b"").unwrap();
    std::fs::write(at("tiny"), vec![0; 511]).unwrap();
    std::fs::write(at("raw"), vec![0; 4096]).unwrap();
    std::fs::write(at("magic"), b"QFI\xfb".repeat(1024)).unwrap();
    std::os::unix::fs::symlink("loop", at("loop")).unwrap();
    for (name, format, remedy) in [
        ("missing", None, "qemu-img create"),
        ("empty", None, "truncate"),
        ("tiny", None, "truncate"),
        (".", None, "neither a file nor a block device"),
        ("/dev/null", None, "neither a file nor a block device"),
        ("raw", Some(Format::Qcow2), "say raw"),
        ("magic", None, "qemu-img check"),
        ("loop", None, "cannot open"),
    ] {
        let said = refusal(&Spec {
            format,
            ..spec(&at(name))
        });
        assert!(said.contains(remedy), "{name}: {said}");
    }
}

#[test]
fn the_bytes_behind_the_last_sector_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(dir.path(), 1024 + 100, 7);
    let image = Image::open(&spec(&path)).unwrap();
    assert_eq!(image.capacity(), 1024);
    write(&mut *queue(&image), 0, vec![8; 1024]).unwrap();
    drop(image);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[..1024], vec![8; 1024]);
    assert_eq!(bytes[1024..], vec![7; 100]);
}

#[test]
fn a_guest_cannot_turn_a_probed_raw_image_into_qcow2() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw_image(dir.path(), 4096, 0);
    let mut header = vec![0; 1024];
    header[..4].copy_from_slice(b"QFI\xfb");
    for engine in [Engine::Auto, Engine::Sync] {
        let probed = Spec {
            format: None,
            engine,
            ..spec(&path)
        };
        let image = Image::open(&probed).unwrap();
        assert_eq!(image.format(), Format::Raw);
        let mut store = queue(&image);
        let error = write(&mut *store, 0, header.clone()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        write(&mut *store, 512, header.clone()).unwrap();
        write(&mut *store, 0, vec![1; 1024]).unwrap();
    }
    // Who says raw means it.
    let image = Image::open(&spec(&path)).unwrap();
    write(&mut *queue(&image), 0, header).unwrap();
}

#[test]
fn an_image_reads_another_file_only_where_that_is_allowed() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    raw_image(dir.path(), 1 << 20, 9);
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "disk.raw",
        "-F",
        "raw",
        "top.qcow2",
    ];
    qemu_img(dir.path(), &create);
    let trusted = Spec {
        format: Some(Format::Qcow2),
        ..spec(&dir.path().join("top.qcow2"))
    };
    let said = refusal(&Spec {
        backing: false,
        ..trusted.clone()
    });
    assert!(
        said.contains("disk.raw") && said.contains("backing=on"),
        "{said}"
    );
    Image::open(&trusted).unwrap();
}

#[test]
fn cut_and_misdirected_qcow2_images_are_refused() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = |name: &str| Spec {
        format: Some(Format::Qcow2),
        ..spec(&dir.path().join(name))
    };
    raw_image(dir.path(), 1 << 20, 9);
    let convert = ["convert", "-O", "qcow2", "disk.raw", "full.qcow2"];
    qemu_img(dir.path(), &convert);
    for len in [4, 71, 72, 4096, 70_000, 200_000] {
        std::fs::copy(dir.path().join("full.qcow2"), dir.path().join("cut.qcow2")).unwrap();
        let file = std::fs::File::options()
            .write(true)
            .open(dir.path().join("cut.qcow2"));
        file.unwrap().set_len(len).unwrap();
        let said = refusal(&qcow2("cut.qcow2"));
        let remedy = if len < 512 {
            "was it cut"
        } else {
            "it was cut"
        };
        assert!(said.contains(remedy), "{len}: {said}");
    }
    // A backing file that is gone, one in use, and an image below itself.
    let create = |name: &str, backing: &str, format: &str| {
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "1M",
        ];
        qemu_img(dir.path(), &args);
    };
    create("orphan.qcow2", "gone.raw", "raw");
    let said = refusal(&qcow2("orphan.qcow2"));
    assert!(said.contains("gone.raw"), "{said}");
    create("child.qcow2", "disk.raw", "raw");
    let writer = Image::open(&spec(&dir.path().join("disk.raw"))).unwrap();
    let said = refusal(&qcow2("child.qcow2"));
    assert!(said.contains("being written by another VM"), "{said}");
    drop(writer);
    let _child = Image::open(&qcow2("child.qcow2")).unwrap();
    let disk = spec(&dir.path().join("disk.raw"));
    assert!(matches!(Image::open(&disk), Err(Error::InUse { .. })));
    create("self.qcow2", "full.qcow2", "qcow2");
    let args = [
        "rebase",
        "-u",
        "-b",
        "self.qcow2",
        "-F",
        "qcow2",
        "self.qcow2",
    ];
    qemu_img(dir.path(), &args);
    let said = refusal(&Spec {
        readonly: true,
        ..qcow2("self.qcow2")
    });
    assert!(said.contains("layers"), "{said}");
}

#[test]
fn a_short_qcow2_image_with_a_long_hole_takes_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hole.qcow2");
    // Version 3, clusters of 512 bytes, both tables behind the first one.
    let mut header = [0u8; 104];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[23] = 9;
    header[27] = 1;
    header[46] = 2;
    header[54] = 2;
    header[103] = 104;
    for (field, entries) in [(36, 0x0080_0000u32), (56, 0x0001_0000)] {
        let mut header = header;
        header[field..field + 4].copy_from_slice(&entries.to_be_bytes());
        std::fs::write(&path, header).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        let said = refusal(&Spec {
            format: Some(Format::Qcow2),
            ..spec(&path)
        });
        assert!(said.contains("tables are larger"), "{said}");
    }
}

#[test]
fn a_qcow2_image_is_told_by_its_first_bytes_and_served_by_a_thread() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let args = ["create", "-q", "-f", "qcow2", "some image.qcow2", "10G"];
    qemu_img(dir.path(), &args);
    let probed = Spec {
        format: None,
        ..spec(&dir.path().join("some image.qcow2"))
    };
    let image = Image::open(&probed).unwrap();
    assert_eq!(
        (image.format(), image.engine()),
        (Format::Qcow2, Engine::Sync)
    );
    assert_eq!(image.capacity(), 10 << 30);
    assert_eq!(image.default_serial(), "someimage");
    drop(image);
    let said = refusal(&Spec {
        engine: Engine::IoUring,
        ..probed
    });
    assert!(said.contains("engine=auto"), "{said}");
}

#[test]
fn a_failed_thread_setup_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::open(&Spec {
        engine: Engine::Sync,
        ..spec(&raw_image(dir.path(), 4096, 0))
    })
    .unwrap();
    let error = image
        .queue(1, &|| Box::new(|| Err(io::Error::other("no filter"))))
        .err();
    assert!(error.unwrap().to_string().contains("no filter"));
}

/// A loop device on a file, gone when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn on(file: &Path, sector: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap();
                Some(Self(PathBuf::from(path.trim())))
            }
            _ => {
                eprintln!("skipped, because no loop device can be had (root, losetup)");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_a_disk_with_its_own_block_size() {
    let dir = tempfile::tempdir().unwrap();
    let file = raw_image(dir.path(), 1 << 20, 6);
    for (sector, direct, engine) in [
        (512, false, Engine::Auto),
        (4096, true, Engine::Auto),
        (4096, true, Engine::Sync),
    ] {
        let Some(device) = LoopDevice::on(&file, sector) else {
            return;
        };
        let spec = Spec {
            direct,
            engine,
            ..spec(&device.0)
        };
        let image = Image::open(&spec).unwrap();
        assert_eq!((image.capacity(), image.block_size()), (1 << 20, sector));
        assert!(image.discard());
        let mut store = queue(&image);
        let mut bytes = vec![9; 65_536];
        let request = transfer(Operation::Write, 8192, &mut bytes, &[77, 5000]);
        assert_eq!(run(&mut *store, request).unwrap(), 65_536);
        run(&mut *store, plain(Operation::Discard, 8192, 4096)).unwrap();
        run(&mut *store, plain(Operation::WriteZeroes, 16_384, 4096)).unwrap();
        run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap();
        assert_eq!(read(&mut *store, 16_384, 4096).unwrap(), vec![0; 4096]);
        assert_eq!(read(&mut *store, 20_480, 4096).unwrap(), vec![9; 4096]);
        if sector == 4096 {
            let error = read(&mut *store, 512, 512).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        assert!(matches!(
            Image::open(&spec),
            Err(Error::InUse { .. } | Error::Open { .. })
        ));
        drop((store, image));
        Image::open(&spec).unwrap();
    }
}
