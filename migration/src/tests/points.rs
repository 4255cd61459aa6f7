//! Replicas, while the guest writes.

use std::fs::{self, File};

use crate::destination::standby::Replica;
use crate::journal::{Journal, Point, replay};

use super::*;

/// A guest that writes a number to its first disk, then to its second one, and so
/// on, all over their first halves.
struct Ordered {
    ram: GuestRam,
    disks: [Arc<Ram>; 2],
    runs: Arc<AtomicBool>,
    resting: Arc<Mutex<()>>,
    over: Arc<AtomicBool>,
}

fn number(disk: &Ram) -> u64 {
    let mut bytes = [0; 8];
    disk.read(0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

impl Ordered {
    fn new() -> Self {
        let this = Self {
            ram: ram(),
            disks: [Ram::new(), Ram::new()],
            runs: Arc::new(AtomicBool::new(true)),
            resting: Arc::default(),
            over: Arc::default(),
        };
        // What it never writes.
        for disk in &this.disks {
            disk.store((SECTORS - 9) * SECTOR as u64, &[7; SECTOR]);
        }
        let (disks, runs) = (this.disks.clone(), Arc::clone(&this.runs));
        let (resting, over) = (Arc::clone(&this.resting), Arc::clone(&this.over));
        thread::spawn(move || {
            let mut n = 0u64;
            while !over.load(Ordering::SeqCst) {
                for disk in &disks {
                    let _busy = resting.lock().unwrap();
                    if runs.load(Ordering::SeqCst) {
                        n += u64::from(Arc::ptr_eq(disk, &disks[0]));
                        let place = (1 + n * 37 % (SECTORS / 2)) * SECTOR as u64;
                        for at in [0, place] {
                            disk.store(at, &n.to_le_bytes());
                            disk.log.mark_dirty(at as usize, 8);
                        }
                    }
                }
                thread::sleep(Duration::from_micros(100));
            }
        });
        this
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Guest for Ordered {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn disks(&self) -> Arc<Disks> {
        Arc::new(self.disks.clone().map(|disk| disk as Arc<dyn Disk>))
    }

    fn begin(&mut self) -> Result<Pages, String> {
        Err("a replica has no memory".to_owned())
    }

    fn dirty(&mut self) -> Result<Pages, String> {
        self.begin()
    }

    fn end(&mut self) {}

    fn throttle(&mut self, _: u8) -> Result<(), String> {
        Ok(())
    }

    fn frame(&mut self, _: &mut Vec<u8>) -> Option<Place> {
        None
    }

    fn is_found(&self) -> bool {
        false
    }

    fn stop(&mut self) -> Result<Vec<u8>, String> {
        self.runs.store(false, Ordering::SeqCst);
        let _at_rest = self.resting.lock().unwrap();
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn give_up(&mut self) {
        panic!("it is nobody else's");
    }
}

/// A replica, and the numbers that it has had at its points.
struct Kept {
    folder: PathBuf,
    own: [Arc<Ram>; 2],
    disks: [Arc<dyn Disk>; 2],
    points: Mutex<Vec<[u64; 2]>>,
    /// Nothing is applied from this point on.
    stops: usize,
}

impl Kept {
    fn new(folder: &Path, own: [Arc<Ram>; 2], stops: usize) -> Self {
        Self {
            folder: folder.to_owned(),
            disks: own.clone().map(|disk| disk as Arc<dyn Disk>),
            own,
            points: Mutex::default(),
            stops,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Replica for Kept {
    fn disks(&self) -> &Disks {
        &self.disks
    }

    fn journal(&self) -> io::Result<Option<Journal>> {
        match self.path("point").exists() {
            true => Ok(Some(Journal::new(File::create(self.path("new"))?))),
            false => Ok(None),
        }
    }

    fn keep(&self, _: &Point) -> Result<(), String> {
        fs::write(self.path("point"), "").unwrap();
        if self.path("new").exists() {
            fs::rename(self.path("new"), self.path("journal")).unwrap();
        }
        Ok(())
    }

    fn apply(&self) -> Result<(), String> {
        let mut points = self.points.lock().unwrap();
        if points.len() == self.stops {
            return Err("it is broken".to_owned());
        }
        if self.path("journal").exists() {
            replay(&self.path("journal"), &self.disks).map_err(|error| error.to_string())?;
            fs::remove_file(self.path("journal")).unwrap();
        }
        points.push(self.own.each_ref().map(|disk| number(disk)));
        Ok(())
    }
}

/// Replicates until the replica has so many points, or it fails.
fn replicate(guest: &mut Ordered, kept: &Arc<Kept>, points: usize, fault: Fault) -> Status {
    let folder = tempfile::tempdir().unwrap();
    let (path, near) = (folder.path().join("source"), folder.path().join("near"));
    let listener = UnixListener::bind(&path).unwrap();
    relay(&near, path, fault, &Arc::default());
    let there = Arc::clone(kept);
    let standby = thread::spawn(move || {
        let (met, _) = Destination::meet(&near)?;
        met.stand_by(&*there)
    });
    let options = Options {
        mode: Mode::PreCopy,
        streams: 3,
        ..Options::default()
    };
    let terms = Terms {
        session: [7; 16],
        machine: Vec::new(),
        disks: guest.disks.iter().map(|disk| disk.capacity()).collect(),
        descriptors: &[],
    };
    let progress = Arc::new(Progress::default());
    let (watched, kept) = (Arc::clone(&progress), Arc::clone(kept));
    let watcher = thread::spawn(move || {
        while kept.points.lock().unwrap().len() < points && watched.status().phase != Phase::Failed
        {
            thread::sleep(Duration::from_millis(1));
        }
        watched.cancel();
    });
    let ram = guest.ram.clone();
    let ended = Source::meet(&listener, terms, &ram, &options, &progress).and_then(|source| {
        let interval = Duration::from_millis(3);
        source.replicate(guest, interval, &options, &progress, &listener)
    });
    if let Err(error) = &ended {
        progress.fail(error.to_string());
    }
    drop(listener);
    watcher.join().unwrap();
    assert!(ended.is_err() && standby.join().unwrap().is_err());
    assert!(guest.runs.load(Ordering::SeqCst));
    progress.status()
}

/// Each point has what was written before whatever it has.
fn are_in_order(kept: &Kept) {
    let points = kept.points.lock().unwrap();
    for [first, second] in &*points {
        assert!(*second <= *first && *first <= *second + 1, "{points:?}");
    }
    assert!(points.is_sorted(), "{points:?}");
}

#[test]
fn a_replica_is_always_at_a_moment_of_a_guest_that_writes() {
    let mut guest = Ordered::new();
    let folder = tempfile::tempdir().unwrap();
    let own = [Ram::new(), Ram::new()];
    let kept = Arc::new(Kept::new(folder.path(), own, usize::MAX));
    let status = replicate(&mut guest, &kept, 30, Fault::None);
    assert!(status.error.unwrap().contains("cancelled"));
    let replication = status.replication.unwrap();
    assert!(replication.points >= 30 && replication.most_pause_us >= replication.pause_us);
    are_in_order(&kept);
    assert!(kept.points.lock().unwrap().last().unwrap()[0] > 30);
}

#[test]
fn wherever_a_replication_is_cut_the_replica_is_at_a_moment_and_goes_on_from_there() {
    let mut guest = Ordered::new();
    let folder = tempfile::tempdir().unwrap();
    let own = [Ram::new(), Ram::new()];
    let first = Arc::new(Kept::new(folder.path(), own.clone(), usize::MAX));
    replicate(&mut guest, &first, 3, Fault::None);
    for round in 0..12 {
        let to_destination = round % 3 != 0;
        let after = if to_destination {
            2000 + 9001 * round
        } else {
            40 * round
        };
        let fault = Fault::Cut {
            to_destination,
            after,
        };
        // Sometimes it is killed between keeping and applying a point.
        let stops = if round % 4 == 0 { 2 } else { usize::MAX };
        let kept = Arc::new(Kept::new(folder.path(), own.clone(), stops));
        replicate(&mut guest, &kept, 1000, fault);
        // As when it is promoted: whatever came after the last point is left out.
        if kept.path("journal").exists() {
            replay(&kept.path("journal"), &kept.disks).unwrap();
        }
        let now = own.each_ref().map(|disk| number(disk));
        kept.points.lock().unwrap().push(now);
        are_in_order(&kept);
    }
    // What is there is not sent again.
    let kept = Arc::new(Kept::new(folder.path(), own, usize::MAX));
    let status = replicate(&mut guest, &kept, 2, Fault::None);
    assert!(status.disks_same > 0, "{status:?}");
}

#[test]
fn a_journal_that_is_not_whole_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let disk = Ram::new();
    let disks: [Arc<dyn Disk>; 1] = [Arc::clone(&disk) as _];
    let journal = Journal::new(File::create(&path).unwrap());
    let block = |at: u64| [&0u64.to_le_bytes()[..], &at.to_le_bytes(), &[9; SECTOR]].concat();
    journal
        .take(wire::Kind::Blocks, &block(512), &disks)
        .unwrap();
    // Not within the disk.
    let outside = journal.take(wire::Kind::Blocks, &block(SECTORS * SECTOR as u64), &disks);
    assert!(outside.is_err());
    let point = Point {
        number: 5,
        age_ms: 1,
        at_ms: 2,
    };
    journal.end(&point).unwrap();
    let whole = fs::read(&path).unwrap();
    for cut in (0..whole.len()).step_by(61) {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(replay(&path, &disks).is_err(), "{cut}");
        assert_eq!(disk.next_data(0).unwrap(), None);
    }
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert!(replay(&path, &disks).is_err());
    assert_eq!(disk.next_data(0).unwrap(), None);
    for _ in 0..2 {
        fs::write(&path, &whole).unwrap();
        assert_eq!(replay(&path, &disks).unwrap(), point);
        assert_eq!(disk.next_data(0).unwrap(), Some(512..1024));
    }
}
