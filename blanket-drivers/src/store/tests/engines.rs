//! What every engine promises.

use std::path::Path;

use proptest::prelude::*;

use super::super::{Error, stripe};
use super::*;

const SECTORS: u64 = 1024;
const LEN: usize = 512 * 1024;

#[derive(Clone, Debug)]
enum Step {
    Read(Range, Vec<usize>),
    Write(Range, Vec<usize>, u8),
    Flush,
    Discard(Range),
    WriteZeroes(Range),
}

/// First byte and length.
type Range = (u64, usize);

fn range() -> impl Strategy<Value = Range> {
    // Now and then more than a private buffer holds.
    (0..SECTORS, prop_oneof![4 => 0..20u64, 1 => 200..600u64]).prop_map(|(at, n)| {
        (
            at * 512,
            usize::try_from(n.min(SECTORS - at) * 512).unwrap(),
        )
    })
}

fn step() -> impl Strategy<Value = Step> {
    let cuts = || prop::collection::vec(any::<usize>(), 0..6);
    prop_oneof![
        3 => (range(), cuts()).prop_map(|(range, cuts)| Step::Read(range, cuts)),
        4 => (range(), cuts(), any::<u8>()).prop_map(|(range, cuts, seed)| Step::Write(range, cuts, seed)),
        1 => Just(Step::Flush),
        1 => range().prop_map(Step::Discard),
        1 => range().prop_map(Step::WriteZeroes),
    ]
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

/// What the disk must hold; `None` where anything may be after a discard.
struct Model(Vec<Option<u8>>);

impl Model {
    fn slice(&mut self, (at, len): Range) -> &mut [Option<u8>] {
        let at = usize::try_from(at).unwrap();
        &mut self.0[at..at + len]
    }

    fn matches(&mut self, range: Range, bytes: &[u8]) -> bool {
        self.slice(range)
            .iter()
            .zip(bytes)
            .all(|(wanted, found)| wanted.is_none_or(|wanted| wanted == *found))
    }

    fn check(&mut self, store: &mut dyn Store) {
        let bytes = read(store, 0, self.0.len()).unwrap();
        assert!(self.matches((0, bytes.len()), &bytes), "the disk's content");
    }
}

fn play(store: &mut dyn Store, model: &mut Model, step: Step) {
    match step {
        Step::Read((at, len), cuts) => {
            let mut bytes = vec![0x5a; len];
            let request = transfer(Operation::Read, at, &mut bytes, &cuts);
            assert_eq!(run(store, request).unwrap() as usize, len);
            assert!(model.matches((at, len), &bytes));
        }
        Step::Write((at, len), cuts, seed) => {
            let mut bytes = pattern(seed, len);
            let request = transfer(Operation::Write, at, &mut bytes, &cuts);
            assert_eq!(run(store, request).unwrap() as usize, len);
            for (cell, byte) in model.slice((at, len)).iter_mut().zip(bytes) {
                *cell = Some(byte);
            }
        }
        Step::Flush => assert_eq!(run(store, plain(Operation::Flush, 0, 0)).unwrap(), 0),
        Step::Discard((at, len)) => {
            run(store, plain(Operation::Discard, at, len as u64)).unwrap();
            model.slice((at, len)).fill(None);
        }
        Step::WriteZeroes((at, len)) => {
            run(store, plain(Operation::WriteZeroes, at, len as u64)).unwrap();
            model.slice((at, len)).fill(Some(0));
        }
    }
}

/// Random steps on the image of `spec`, which says `fill` everywhere at first;
/// again after the image was closed and opened.
fn follow_the_model(spec: &Spec, fill: u8, steps: Vec<Step>) {
    let mut model = Model(vec![Some(fill); LEN]);
    let image = Image::open(spec).unwrap();
    assert_eq!(image.capacity(), LEN as u64);
    let mut store = queue(&image);
    for step in steps {
        play(&mut *store, &mut model, step);
    }
    model.check(&mut *store);
    drop((store, image));
    let image = Image::open(spec).unwrap();
    model.check(&mut *queue(&image));
}

fn raw_spec(dir: &Path, engine: Engine, direct: bool) -> Spec {
    Spec {
        engine,
        direct,
        ..spec(&raw_image(dir, LEN, 0x11))
    }
}

/// A set of so many volumes. They are named in another order when it is used.
fn striped_spec(dir: &Path, volumes: u64, chunk: u64) -> Spec {
    let paths = (0..volumes).map(|i| {
        let path = dir.join(format!("volume{i}"));
        let file = std::fs::File::create(&path).unwrap();
        // The smallest one counts; what is left of it after the last whole
        // chunk is not used.
        let len = stripe::DATA_START + LEN as u64 / volumes + i * 8192 + chunk - 512;
        file.set_len(len).unwrap();
        path
    });
    let mut paths: Vec<_> = paths.collect();
    stripe::create(&paths, chunk, false).unwrap();
    paths.reverse();
    Spec {
        format: None,
        stripe: paths.split_off(1),
        ..spec(&paths[0])
    }
}

/// A qcow2 image over a raw one that says 0x22.
fn layered_spec(dir: &Path) -> Spec {
    raw_image(dir, LEN, 0x22);
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "disk.raw",
            "-F",
            "raw",
            "top.qcow2",
        ],
    );
    Spec {
        format: Some(Format::Qcow2),
        ..spec(&dir.join("top.qcow2"))
    }
}

fn ring_or_skip(spec: &Spec) -> bool {
    match Image::open(spec) {
        Ok(_) => true,
        Err(Error::Engine { source, .. }) => {
            eprintln!("skipped, because there is no io_uring: {source}");
            false
        }
        Err(Error::Direct { source, .. }) => {
            eprintln!("skipped, because there is no direct I/O here: {source}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_ring_does_what_a_disk_does(
        steps in prop::collection::vec(step(), 1..40),
        direct in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let spec = raw_spec(dir.path(), Engine::IoUring, direct);
        if ring_or_skip(&spec) {
            follow_the_model(&spec, 0x11, steps);
        }
    }

    #[test]
    fn a_thread_does_what_a_disk_does(
        steps in prop::collection::vec(step(), 1..40),
        direct in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let spec = raw_spec(dir.path(), Engine::Sync, direct);
        if ring_or_skip(&spec) {
            follow_the_model(&spec, 0x11, steps);
        }
    }

    #[test]
    fn a_striped_set_does_what_a_disk_does(
        steps in prop::collection::vec(step(), 1..40),
        direct in any::<bool>(),
        ring in any::<bool>(),
        volumes in prop::sample::select(vec![2, 4]),
        chunk in 12..=16u32,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let engine = if ring { Engine::Auto } else { Engine::Sync };
        let spec = striped_spec(dir.path(), volumes, 1 << chunk);
        let spec = Spec { engine, direct, ..spec };
        if ring_or_skip(&spec) {
            follow_the_model(&spec, 0, steps);
        }
    }

    #[test]
    fn a_qcow2_image_does_what_a_disk_does_and_stays_sound(
        steps in prop::collection::vec(step(), 1..40),
        direct in any::<bool>(),
    ) {
        if !have_qemu_img() {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec { direct, ..layered_spec(dir.path()) };
        if ring_or_skip(&spec) {
            follow_the_model(&spec, 0x22, steps);
            qemu_img(dir.path(), &["check", "top.qcow2"]);
        }
        let backing = std::fs::read(dir.path().join("disk.raw")).unwrap();
        prop_assert!(backing.iter().all(|byte| *byte == 0x22), "the backing file changed");
    }
}

#[test]
fn qemu_reads_back_what_was_written_to_a_qcow2_image() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = layered_spec(dir.path());
    let mut expected = vec![0x22; LEN];
    {
        let image = Image::open(&spec).unwrap();
        let mut store = queue(&image);
        for (at, len, seed) in [
            (0usize, 512usize, 1u8),
            (65_024, 1536, 2),
            (200_704, 262_144, 3),
        ] {
            let bytes = pattern(seed, len);
            write(&mut *store, at as u64, bytes.clone()).unwrap();
            expected[at..at + len].copy_from_slice(&bytes);
        }
        run(&mut *store, plain(Operation::WriteZeroes, 4096, 70_144)).unwrap();
        expected[4096..4096 + 70_144].fill(0);
        run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap();
        // A flush is enough: the image is sound on disk while it is in use.
        std::fs::copy(&spec.path, dir.path().join("copy.qcow2")).unwrap();
    }
    std::fs::write(dir.path().join("expected.raw"), expected).unwrap();
    for image in ["top.qcow2", "copy.qcow2"] {
        qemu_img(dir.path(), &["check", image]);
        qemu_img(
            dir.path(),
            &["compare", "-f", "qcow2", "-F", "raw", image, "expected.raw"],
        );
    }
}

/// Several queues at once, each with its own part of the disk, requests in
/// flight eight deep.
fn queues_share(spec: &Spec) {
    const QUEUES: usize = 4;
    const PART: usize = LEN / QUEUES;
    let image = Image::open(spec).unwrap();
    std::thread::scope(|scope| {
        for part in 0..QUEUES {
            let mut store = queue(&image);
            scope.spawn(move || {
                for round in 0..8u8 {
                    let mut bytes = pattern(round ^ (part as u8) << 4, PART);
                    let chunk = PART / 8;
                    for (i, piece) in bytes.chunks_mut(chunk).enumerate() {
                        let at = (part * PART + i * chunk) as u64;
                        let mut request = transfer(Operation::Write, at, piece, &[7]);
                        request.token = i as u64;
                        // SAFETY: `bytes` outlives the drain.
                        unsafe { store.submit(request) }.unwrap();
                    }
                    // SAFETY: no memory.
                    let full = unsafe { store.submit(plain(Operation::Flush, 0, 0)) };
                    assert_eq!(full.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                    store.commit().unwrap();
                    let mut done = Vec::new();
                    store.drain(&mut done);
                    done.sort_by_key(|completion| completion.token);
                    let tokens: Vec<u64> = done.iter().map(|one| one.token).collect();
                    assert_eq!(tokens, (0..8).collect::<Vec<u64>>());
                    assert!(
                        done.iter()
                            .all(|one| matches!(one.result, Ok(n) if n as usize == chunk))
                    );
                    assert_eq!(
                        read(&mut *store, (part * PART) as u64, PART).unwrap(),
                        bytes
                    );
                    run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap();
                }
            });
        }
    });
}

#[test]
fn queues_of_one_image_work_at_the_same_time() {
    let dir = tempfile::tempdir().unwrap();
    queues_share(&raw_spec(dir.path(), Engine::Auto, false));
    queues_share(&raw_spec(dir.path(), Engine::Sync, false));
    queues_share(&striped_spec(dir.path(), 2, 4096));
    if have_qemu_img() {
        queues_share(&layered_spec(dir.path()));
        qemu_img(dir.path(), &["check", "top.qcow2"]);
    }
}

#[test]
fn bad_requests_fail_and_leave_the_image_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for engine in [Engine::Auto, Engine::Sync] {
        let spec = raw_spec(dir.path(), engine, false);
        let image = Image::open(&spec).unwrap();
        let mut store = queue(&image);
        for (at, len) in [
            (LEN as u64, 512),
            (LEN as u64 - 512, 1024),
            (u64::MAX - 511, 512),
            (1 << 63, 512),
            (100, 512),
            (0, 100),
        ] {
            let error = write(&mut *store, at, vec![0xff; len]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at} {len}");
            let error = read(&mut *store, at, len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at} {len}");
            for operation in [Operation::Discard, Operation::WriteZeroes] {
                let error = run(&mut *store, plain(operation, at, len as u64)).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at} {len}");
            }
        }
        assert_eq!(write(&mut *store, 0, Vec::new()).unwrap(), 0);
        drop((store, image));
        assert_eq!(std::fs::read(&spec.path).unwrap(), vec![0x11; LEN]);
    }
}

#[test]
fn a_read_only_image_refuses_whatever_would_change_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut specs = vec![raw_spec(dir.path(), Engine::Auto, false)];
    specs.push(Spec {
        engine: Engine::Sync,
        ..specs[0].clone()
    });
    for spec in specs {
        let image = Image::open(&Spec {
            readonly: true,
            ..spec
        })
        .unwrap();
        assert!(image.readonly() && !image.discard());
        let mut store = queue(&image);
        let denied = write(&mut *store, 0, vec![0; 512]).unwrap_err();
        assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
        let denied = run(&mut *store, plain(Operation::WriteZeroes, 0, 512)).unwrap_err();
        assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(read(&mut *store, 512, 512).unwrap(), vec![0x11; 512]);
        assert_eq!(run(&mut *store, plain(Operation::Flush, 0, 0)).unwrap(), 0);
    }
}

#[test]
fn an_image_that_is_cut_while_in_use_gives_errors() {
    let dir = tempfile::tempdir().unwrap();
    for engine in [Engine::Auto, Engine::Sync] {
        let spec = raw_spec(dir.path(), engine, false);
        let image = Image::open(&spec).unwrap();
        let mut store = queue(&image);
        let file = std::fs::File::options().write(true).open(&spec.path);
        file.unwrap().set_len(4096 + 100).unwrap();
        let error = read(&mut *store, 4096, 1024).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read(&mut *store, 0, 4096).unwrap(), vec![0x11; 4096]);
    }
}
