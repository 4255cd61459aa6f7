use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use blanket_devices::lifecycle::SavedState;
use blanket_memory::{Backing, Spec};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::VmConfig;
use crate::snapshot::{Compression, Head, Pieces, Recorder, Snapshot};

const SIZE: u64 = 96 << 20;
/// A page in each of these is used, the last one alone in its table.
const USED: [u64; 4] = [0x5000, 0x15000, 0x20000, SIZE - 4096];

fn ram() -> GuestRam {
    let spec = Spec {
        size: SIZE,
        backing: Backing::Small,
        shared: false,
    };
    blanket_memory::build(&spec).unwrap()
}

/// A pager for `ram`; none where this user has no userfaultfd.
fn pager(ram: &GuestRam) -> Option<Pager> {
    match Uffd::open() {
        Ok(uffd) => Some(Pager::spawn(uffd, ram, Box::new(|| Ok(()))).unwrap()),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn start(ram: &GuestRam) -> Vec<u8> {
    let head = Head::new("web".into(), VmConfig::default());
    let state = SavedState::pack("test", 3, &7u32).unwrap();
    Pieces::start(&head, &state, ram).unwrap()
}

/// Records what is sent.
fn record(live: &mut Live, path: &Path) {
    let mut recorder = Recorder::new(std::fs::File::create(path).unwrap(), Compression::None);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        match live.poll(&mut context) {
            std::task::Poll::Ready(Some(piece)) => recorder.write_all(&piece).unwrap(),
            std::task::Poll::Ready(None) => break,
            std::task::Poll::Pending => std::thread::sleep(Duration::from_micros(100)),
        }
    }
    assert_eq!(recorder.report().unwrap().pause_us, 7000);
    recorder.finish(&[]).unwrap();
}

fn value(ram: &GuestRam, at: u64) -> u64 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

/// A snapshot of memory whose pages in [`USED`] have their address and `more`
/// as content.
fn saved(more: u64) -> tempfile::NamedTempFile {
    let ram = ram();
    for at in USED {
        ram.write_obj(at + more, GuestAddress(at)).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let head = Head::new("web".into(), VmConfig::default());
    let state = SavedState::pack("test", 3, &7u32).unwrap();
    let pieces = Pieces::new(&head, &state, ram, Touched::open(), Arc::default()).unwrap();
    let mut recorder = Recorder::new(file.reopen().unwrap(), Compression::Zstd);
    for piece in pieces {
        recorder.write_all(&piece).unwrap();
    }
    recorder.finish(&[]).unwrap();
    file
}

fn reader(path: &Path) -> Arc<Reader> {
    match Snapshot::open(path).unwrap() {
        Snapshot::File(reader) => reader,
        Snapshot::Stream(_) => panic!("it is no stream"),
    }
}

#[test]
fn memory_is_saved_as_it_was_while_it_is_changed() {
    let ram = ram();
    let Some(pager) = pager(&ram) else { return };
    let pages = || (0..SIZE / 2).step_by(4096);
    for at in pages() {
        ram.write_obj(at + 1, GuestAddress(at)).unwrap();
    }
    let mut live = pager.save(start(&ram), Touched::open()).unwrap();
    live.paused(Duration::from_millis(7)).unwrap();
    // From its end on, against the order in which it is sent; and what was
    // never touched.
    let stop = Arc::new(AtomicBool::new(false));
    let (guest, stopped) = (ram.clone(), Arc::clone(&stop));
    let writer = std::thread::spawn(move || {
        let mut rounds = 0;
        while !stopped.load(Ordering::Relaxed) || rounds == 0 {
            for page in (0..SIZE / 4096).rev() {
                let at = GuestAddress(page * 4096);
                guest.write_obj(u64::MAX, at).unwrap();
            }
            rounds += 1;
        }
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    record(&mut live, file.path());
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert!(pages().all(|at| value(&ram, at) == u64::MAX));
    let back = self::ram();
    reader(file.path()).load(&back, Touched::open()).unwrap();
    assert!(pages().all(|at| value(&back, at) == at + 1));
    assert!(
        (SIZE / 2..SIZE)
            .step_by(4096)
            .all(|at| value(&back, at) == 0)
    );
}

#[test]
fn a_reader_that_leaves_lets_the_guest_go_on() {
    let ram = ram();
    let Some(pager) = pager(&ram) else { return };
    ram.write_obj(1u64, GuestAddress(0)).unwrap();
    for _ in 0..2 {
        let live = pager.save(start(&ram), Touched::open()).unwrap();
        drop(live);
        ram.write_obj(2u64, GuestAddress(0)).unwrap();
    }
    pager.complete().unwrap();
}

#[test]
fn memory_comes_when_it_is_touched_and_not_before() {
    let file = saved(0);
    let ram = ram();
    let Some(pager) = pager(&ram) else { return };
    // What a kernel that was loaded has left.
    for at in [0x5000, 0x9000, 70 << 20] {
        ram.write_obj(u64::MAX, GuestAddress(at)).unwrap();
    }
    pager
        .restore(reader(file.path()), WorkingSet::default())
        .unwrap();
    assert_eq!(blanket_memory::touched_bytes(&ram), 0);
    assert_eq!([value(&ram, 0x5000), value(&ram, 0x9000)], [0x5000, 0]);
    assert!(blanket_memory::touched_bytes(&ram) <= CHUNKS);
    assert_eq!(value(&ram, 70 << 20), 0);
    assert!(USED.into_iter().all(|at| value(&ram, at) == at));
    ram.write_obj(8u64, GuestAddress(0x15000)).unwrap();
    // From here on all is there, and stays.
    pager.complete().unwrap();
    drop(file);
    assert_eq!(value(&ram, 0x15000), 8);
    assert_eq!(value(&ram, SIZE / 2), 0);
}

/// Two chunks.
const CHUNKS: u64 = 2 * crate::snapshot::CHUNK as u64;

#[test]
fn what_was_needed_first_is_read_ahead_the_next_time() {
    let file = saved(0);
    let beside = crate::snapshot::working_set_of(file.path());
    let ram = ram();
    let Some(pager) = pager(&ram) else { return };
    let reader = reader(file.path());
    let set = WorkingSet::open(file.path(), &reader);
    pager.restore(Arc::clone(&reader), set).unwrap();
    assert_eq!(value(&ram, SIZE - 4096), SIZE - 4096);
    let noted = || std::fs::metadata(&beside).unwrap().len() > 0;
    while !noted() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let again = self::ram();
    let Some(pager) = self::pager(&again) else {
        return;
    };
    let set = WorkingSet::open(file.path(), &reader);
    pager.restore(Arc::clone(&reader), set).unwrap();
    while blanket_memory::touched_bytes(&again) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(blanket_memory::touched_bytes(&again) <= CHUNKS);
    assert_eq!(value(&again, SIZE - 4096), SIZE - 4096);
    // Another snapshot's is of no use.
    let other = saved(1);
    let theirs = crate::snapshot::working_set_of(other.path());
    std::fs::rename(&beside, &theirs).unwrap();
    let open = WorkingSet::open(other.path(), &self::reader(other.path()));
    assert!(format!("{open:?}").contains("chunks: []"), "{open:?}");
    std::fs::remove_file(&theirs).unwrap();
}
