//! Both ends at once, over connections that fail.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use blanket_memory::absent::{Absent, Entry, Use};
use blanket_memory::dirty::{self, PAGE, Pages, WriteLog};
use blanket_memory::uffd::Uffd;
use blanket_memory::{Backing, GuestRam, Spec, build_at};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use relay::{Fault, relay};

mod disks;
mod fast;
mod follow;
mod lazy;
mod points;
mod relay;

const HIGH: u64 = 1 << 32;
const PAGES: u64 = 1500;

fn ram() -> GuestRam {
    let size = PAGES * PAGE as u64;
    let spec = Spec {
        size: 2 * size,
        backing: Backing::Small,
        shared: false,
    };
    build_at(
        &spec,
        &[(GuestAddress(0), size), (GuestAddress(HIGH), size)],
    )
    .unwrap()
}

const SECTORS: u64 = 5001;
const SECTOR: usize = 512;

/// A disk in memory, of a size that is no whole number of pages.
struct Ram {
    bytes: Mutex<Vec<u8>>,
    log: WriteLog,
    /// The guest makes zeros of a sector when it is looked for the first time what it
    /// has written.
    clears: AtomicBool,
    /// What has not come of it.
    absent: Arc<Absent>,
    /// What was written since the last flush is lost.
    flushed: Mutex<Vec<u8>>,
}

impl Ram {
    fn new() -> Arc<Self> {
        let bytes = vec![0; SECTORS as usize * SECTOR];
        Arc::new(Self {
            clears: AtomicBool::new(false),
            flushed: Mutex::new(bytes.clone()),
            log: WriteLog::new(bytes.len()),
            absent: Arc::new(Absent::new(bytes.len() as u64)),
            bytes: Mutex::new(bytes),
        })
    }

    /// As its guest does it, who waits for what has not come; none if that is lost.
    fn wait_for(&self, what: Use, offset: u64, len: usize) -> Option<Entry> {
        let range = offset..offset + len as u64;
        let mut asked = false;
        loop {
            match self.absent.enter(what, &range, asked) {
                Entry::Wait => self.absent.wait(),
                Entry::Lost => return None,
                entry => return Some(entry),
            }
            asked = true;
        }
    }

    fn store(&self, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl Disk for Ram {
    fn capacity(&self) -> u64 {
        SECTORS * SECTOR as u64
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let bytes = self.bytes.lock().unwrap();
        let mut sectors = bytes
            .chunks(SECTOR)
            .enumerate()
            .skip(offset as usize / SECTOR);
        let data = |(_, sector): &(usize, &[u8])| sector.iter().any(|byte| *byte != 0);
        let Some((start, _)) = sectors.find(data) else {
            return Ok(None);
        };
        let end = sectors.find(|sector| !data(sector));
        let end = end.map_or(SECTORS, |(end, _)| end as u64);
        Ok(Some((start * SECTOR) as u64..end * SECTOR as u64))
    }

    fn absent(&self) -> Option<Arc<Absent>> {
        Some(Arc::clone(&self.absent))
    }

    fn watch(&self) -> io::Result<()> {
        self.log.start()
    }

    fn written(&self, most: usize) -> Vec<(u64, usize)> {
        if self.clears.swap(false, Ordering::SeqCst) {
            self.store(0, &[0; SECTOR]);
            self.log.mark_dirty(0, SECTOR);
        }
        self.log.take_runs(most)
    }

    fn unwatch(&self) {
        self.log.stop();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.store(offset, bytes);
        Ok(())
    }

    fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        self.store(offset, &vec![0; len as usize]);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flushed
            .lock()
            .unwrap()
            .clone_from(&self.bytes.lock().unwrap());
        Ok(())
    }
}

/// A guest that counts in its memory and on its disks, all over the place, as
/// long as it runs.
struct Counter {
    ram: GuestRam,
    disks: [Arc<Ram>; 2],
    runs: Arc<AtomicBool>,
    resting: Arc<Mutex<()>>,
    over: Arc<AtomicBool>,
    /// Percent.
    slowed: Arc<AtomicU64>,
    given_up: bool,
    /// Frames that have come for it.
    frames: VecDeque<Place>,
}

impl Counter {
    fn new(pause: Duration) -> Self {
        let this = Self {
            ram: ram(),
            disks: [Ram::new(), Ram::new()],
            runs: Arc::new(AtomicBool::new(true)),
            resting: Arc::default(),
            over: Arc::default(),
            slowed: Arc::default(),
            given_up: false,
            frames: waiting(),
        };
        for page in 0..PAGES / 2 {
            let at = GuestAddress(page * 2 * PAGE as u64);
            this.ram.write_obj(page + 1, at).unwrap();
        }
        // The last sector, too.
        for sector in (0..SECTORS).step_by(100) {
            this.disks[0].store(sector * SECTOR as u64, &[sector as u8 | 1; SECTOR]);
        }
        let disks = this.disks.clone();
        let (ram, slowed, runs, resting, over) = (
            this.ram.clone(),
            Arc::clone(&this.slowed),
            Arc::clone(&this.runs),
            Arc::clone(&this.resting),
            Arc::clone(&this.over),
        );
        thread::spawn(move || {
            let (mut i, mut next) = (0u64, Instant::now());
            while !over.load(Ordering::SeqCst) {
                {
                    let _busy = resting.lock().unwrap();
                    if runs.load(Ordering::SeqCst) {
                        i += 1;
                        let at = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (PAGES * PAGE as u64 - 8);
                        let at = if i.is_multiple_of(2) { HIGH + at } else { at };
                        let value = if i.is_multiple_of(5) { 0 } else { i };
                        ram.write_obj(value, GuestAddress(at)).unwrap();
                        if i.is_multiple_of(7) {
                            let disk = &disks[i as usize % 2];
                            let at = (i * 31 % SECTORS) as usize * SECTOR;
                            disk.store(at as u64, &[value as u8; SECTOR]);
                            disk.log.mark_dirty(at, SECTOR);
                        }
                    }
                }
                if !pause.is_zero() {
                    let share = 100 - slowed.load(Ordering::SeqCst) as u32;
                    next += pause * 100 / share;
                    // Where processors are busy it is late, and catches up.
                    let now = Instant::now();
                    next = next.max(now - Duration::from_millis(100));
                    if next > now + Duration::from_millis(1) {
                        thread::sleep(next - now);
                    }
                }
            }
        });
        this
    }

    fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Guest for Counter {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn disks(&self) -> Arc<Disks> {
        Arc::new(self.disks.clone().map(|disk| disk as Arc<dyn Disk>))
    }

    fn begin(&mut self) -> Result<Pages, String> {
        dirty::start(&self.ram).map_err(|error| error.to_string())?;
        let mut all = Pages::none(&self.ram);
        for page in 0..PAGES as usize {
            all.insert(0, page);
            all.insert(1, page);
        }
        Ok(all)
    }

    fn dirty(&mut self) -> Result<Pages, String> {
        Ok(dirty::take(&self.ram))
    }

    fn end(&mut self) {
        dirty::stop(&self.ram);
    }

    fn throttle(&mut self, percent: u8) -> Result<(), String> {
        self.slowed.store(percent.into(), Ordering::SeqCst);
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<u8>, String> {
        self.runs.store(false, Ordering::SeqCst);
        let _at_rest = self.resting.lock().unwrap();
        Ok(b"its state".to_vec())
    }

    fn resume(&mut self) -> Result<(), String> {
        assert!(!self.given_up);
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn give_up(&mut self) {
        self.given_up = true;
    }

    fn frame(&mut self, into: &mut Vec<u8>) -> Option<Place> {
        assert!(self.given_up);
        let place = self.frames.pop_front()?;
        *into = [place.interface, place.queue].map(|n| n as u8).to_vec();
        Some(place)
    }

    fn is_found(&self) -> bool {
        true
    }
}

struct Other {
    ram: GuestRam,
    own: [Arc<Ram>; 2],
    disks: [Arc<dyn Disk>; 2],
    runs: Arc<AtomicBool>,
    takes: bool,
    /// Memory can follow.
    follows: bool,
    /// The guest's, once it rests.
    was: GuestRam,
    old: [Arc<Ram>; 2],
    /// The guest uses its disks.
    works: bool,
    /// What it has asked of a disk has failed.
    failed: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    /// The guest has found other memory there.
    wrong: Arc<AtomicBool>,
    /// Frames that were sent on, before those of its own.
    frames: Mutex<Vec<Place>>,
    released: AtomicBool,
}

impl Drop for Other {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// What the guest writes to its first disk there.
const WRITTEN: Range<usize> = 20 * PAGE..23 * PAGE;

impl Other {
    /// Has the guest use its disks: it writes whole blocks, and reads what else
    /// there is.
    fn work(&self) {
        let [here, there] = [&self.old, &self.own].map(Clone::clone);
        let (over, wrong) = (Arc::clone(&self.over), Arc::clone(&self.wrong));
        let failed = Arc::clone(&self.failed);
        let at = WRITTEN.start as u64;
        let Some(entry) = there[0].wait_for(Use::Write, at, WRITTEN.len()) else {
            return failed.store(true, Ordering::SeqCst);
        };
        there[0].store(at, &[0xee; WRITTEN.end - WRITTEN.start]);
        if let Entry::Claimed(claim) = entry {
            there[0].absent.written(&claim, true);
        }
        there[0].flush().unwrap();
        thread::spawn(move || {
            let mut i = 0u64;
            while !over.load(Ordering::SeqCst) {
                i = i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let disk = (i >> 40) as usize % 2;
                let at = (i >> 16) % (SECTORS - 8) * SECTOR as u64;
                let mut bytes = [[0; PAGE]; 2];
                if there[disk].wait_for(Use::Read, at, PAGE).is_none() {
                    return failed.store(true, Ordering::SeqCst);
                }
                here[disk].read(at, &mut bytes[0]).unwrap();
                there[disk].read(at, &mut bytes[1]).unwrap();
                let own = disk == 0 && at + PAGE as u64 > WRITTEN.start as u64;
                let own = own && at < WRITTEN.end as u64;
                if bytes[0] != bytes[1] && !own {
                    wrong.store(true, Ordering::SeqCst);
                }
                thread::sleep(Duration::from_micros(200));
            }
        });
    }
}

impl Machine for Other {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn disks(&self) -> &Disks {
        &self.disks
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        assert_eq!(state, b"its state");
        if self.takes {
            Ok(())
        } else {
            Err("no such processor".to_owned())
        }
    }

    fn can_follow(&self) -> Result<(), String> {
        match self.follows {
            true => Ok(()),
            false => Err("it cannot".to_owned()),
        }
    }

    fn follow(&self, remote: Remote) -> Result<(), String> {
        let uffd = Uffd::open().map_err(|error| error.to_string())?;
        let ram = self.ram.clone();
        remote.arm(&uffd, &ram).map_err(|error| error.to_string())?;
        // Who waits goes on when the descriptor is closed.
        thread::spawn(move || remote.run(&uffd, &ram));
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.store(true, Ordering::SeqCst);
        let (ram, was) = (self.ram.clone(), self.was.clone());
        let (over, wrong) = (Arc::clone(&self.over), Arc::clone(&self.wrong));
        if self.follows {
            thread::spawn(move || {
                let mut i = 0u64;
                while !over.load(Ordering::SeqCst) {
                    i = i.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = GuestAddress(HIGH + (i >> 16) % (PAGES * PAGE as u64 - 8));
                    let [here, there] = [&was, &ram].map(|ram| ram.read_obj::<u64>(at).unwrap());
                    if here != there {
                        wrong.store(true, Ordering::SeqCst);
                    }
                    thread::sleep(Duration::from_micros(200));
                }
            });
        }
        if self.works {
            self.work();
        }
        Ok(())
    }

    fn frame(&self, place: Place, frame: &[u8]) {
        assert!(self.runs.load(Ordering::SeqCst) && !self.released.load(Ordering::SeqCst));
        assert_eq!(frame, [place.interface as u8, place.queue as u8]);
        self.frames.lock().unwrap().push(place);
    }

    fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
    }
}

/// Frames for the guest, in this order.
fn waiting() -> VecDeque<Place> {
    let places = [(0, 0), (1, 3), (0, 1), (0, 0)];
    let place = |(interface, queue)| Place { interface, queue };
    places.map(place).into()
}

struct Outcome {
    here: bool,
    there: bool,
    moved: Result<(), Error>,
    arrived: Result<(), DestinationError>,
    status: Status,
    /// What the guest has asked of a disk there has failed.
    failed: bool,
}

fn migrate(guest: &mut Counter, takes: bool, options: &Options, fault: Fault) -> Outcome {
    migrate_to(guest, takes, Uffd::open().is_ok(), options, fault)
}

fn migrate_to(
    guest: &mut Counter,
    takes: bool,
    follows: bool,
    options: &Options,
    fault: Fault,
) -> Outcome {
    let own = [Ram::new(), Ram::new()];
    // One that is not blank: what is there has to go.
    own[1].store(512, &[0x55; SECTOR]);
    migrate_onto(guest, own, [takes, follows], options, fault)
}

fn migrate_onto(
    guest: &mut Counter,
    own: [Arc<Ram>; 2],
    [takes, follows]: [bool; 2],
    options: &Options,
    fault: Fault,
) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source");
    let near = folder.path().join("near");
    let listener = UnixListener::bind(&path).unwrap();
    let runs: Arc<AtomicBool> = Arc::default();
    relay(&near, path, fault, &runs);
    let other = Arc::new(Other {
        ram: ram(),
        disks: own.clone().map(|disk| disk as Arc<dyn Disk>),
        own,
        runs,
        takes,
        follows,
        was: guest.ram.clone(),
        old: guest.disks.clone(),
        works: options.lazy_disks,
        failed: Arc::default(),
        over: Arc::default(),
        wrong: Arc::default(),
        frames: Mutex::default(),
        released: AtomicBool::default(),
    });
    let there = Arc::clone(&other);
    let destination = thread::spawn(move || {
        let (met, _) = Destination::meet(&near)?;
        assert_eq!(met.machine(), b"like this");
        met.run(&*there, &Arc::default())
    });
    let progress = Arc::new(Progress::default());
    let terms = Terms {
        session: [7; 16],
        machine: b"like this".to_vec(),
        disks: guest.disks.iter().map(|disk| disk.capacity()).collect(),
        descriptors: &[],
    };
    let ram = guest.ram.clone();
    let moved = Source::meet(&listener, terms, &ram, options, &progress)
        .and_then(|source| source.run(guest, options, &progress, &listener));
    // Nobody answers any more.
    drop(listener);
    let arrived = destination.join().unwrap();
    if moved.is_ok() {
        // What the guest has made durable here is durable there.
        for (here, there) in guest.disks.iter().zip(&other.own) {
            let mut here = here.bytes.lock().unwrap().clone();
            let there = there.flushed.lock().unwrap();
            if options.lazy_disks && there[WRITTEN].iter().all(|byte| *byte == 0xee) {
                here[WRITTEN].fill(0xee);
            }
            assert!(here == *there || other.failed.load(Ordering::SeqCst));
        }
    }
    if arrived.is_ok() {
        assert!(other.released.load(Ordering::SeqCst));
    }
    if moved.is_ok() && arrived.is_ok() {
        // In their order; a cut connection may have ended them.
        let sent_on = other.frames.lock().unwrap();
        assert!(waiting().make_contiguous().starts_with(&sent_on));
        if fault == Fault::None {
            assert_eq!(sent_on.len(), waiting().len());
            assert_eq!(progress.status().forwarded, 4);
        }
        assert!(!other.wrong.load(Ordering::SeqCst));
        let mut pages = [[0u8; PAGE]; 2];
        for at in (0..PAGES * PAGE as u64).step_by(PAGE) {
            for at in [at, HIGH + at] {
                for (page, ram) in pages.iter_mut().zip([&guest.ram, &other.ram]) {
                    ram.read_slice(page, GuestAddress(at)).unwrap();
                }
                assert!(pages[0] == pages[1], "{at:#x}");
            }
        }
    }
    Outcome {
        here: guest.runs(),
        there: other.runs.load(Ordering::SeqCst),
        moved,
        arrived,
        status: progress.status(),
        failed: other.failed.load(Ordering::SeqCst),
    }
}

fn options() -> Options {
    Options {
        streams: 2,
        verify: true,
        downtime_ms: 1000,
        ..Options::default()
    }
}

#[test]
fn a_guest_that_writes_all_the_time_arrives_with_all_its_memory() {
    for streams in [1, 2, 5] {
        let mut guest = Counter::new(Duration::ZERO);
        let options = Options {
            streams,
            ..options()
        };
        let outcome = migrate(&mut guest, true, &options, Fault::None);
        outcome.moved.unwrap();
        outcome.arrived.unwrap();
        assert!(outcome.there && !outcome.here && guest.given_up);
        let status = outcome.status;
        assert_eq!((status.phase, status.streams), (Phase::Moved, streams));
        let steps: u64 = status.pause.iter().map(|step| step.us).sum();
        assert!(steps <= status.downtime_us && status.downtime_us <= status.total_us);
        assert_eq!(status.disks, 2 * SECTORS * SECTOR as u64);
    }
}

#[test]
fn a_guest_arrives_over_connections_that_come_late() {
    let mut guest = Counter::new(Duration::from_micros(200));
    let outcome = migrate(&mut guest, true, &options(), Fault::Late);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    assert!(outcome.there && !outcome.here);
}

#[test]
fn what_a_guest_clears_on_a_disk_that_has_been_copied_is_cleared_there() {
    let mut guest = Counter::new(Duration::from_millis(10));
    guest.disks[0].clears.store(true, Ordering::SeqCst);
    let outcome = migrate(&mut guest, true, &options(), Fault::None);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    assert!(outcome.there && !outcome.here);
}

#[test]
fn a_guest_whose_state_is_refused_runs_on() {
    let mut guest = Counter::new(Duration::from_micros(100));
    let outcome = migrate(&mut guest, false, &options(), Fault::None);
    let error = outcome.moved.unwrap_err().to_string();
    assert!(error.contains("no such processor"), "{error}");
    // Zeros are not sent.
    let mut rounds = outcome.status.rounds.iter();
    let memory = rounds.find(|round| round.pages > 0).unwrap();
    assert!(memory.bytes < PAGES * 3 / 2 * PAGE as u64);
    assert!(outcome.here && !outcome.there && outcome.arrived.is_err());
}

/// Too slow for a guest that writes all the time.
fn slow() -> Options {
    Options {
        bandwidth: 20 << 20,
        downtime_ms: 1,
        verify: false,
        ..options()
    }
}

/// Bytes that a migration without a fault sends (to the source, to the destination).
fn wherever(count: u64, options: &Options, of: impl Fn(bool, u64) -> Fault) {
    for to_destination in [true, false] {
        // What goes to the source is short, and so is what is said at the end.
        let most = if to_destination { 9_000_000 } else { 1000 };
        for i in 0..count {
            let fault = of(to_destination, most * i / count);
            let mut guest = Counter::new(Duration::from_micros(200));
            let outcome = migrate(&mut guest, true, options, fault);
            assert!(
                outcome.here != outcome.there,
                "{fault:?}: {} {} {:?} {:?}",
                outcome.here,
                outcome.there,
                outcome.moved,
                outcome.arrived
            );
            assert_eq!(outcome.moved.is_ok(), outcome.there, "{fault:?}");
            // Memory has followed, too.
            assert_eq!(outcome.arrived.is_ok(), outcome.there, "{fault:?}");
            if outcome.there && options.mode == Mode::PostCopy {
                assert_eq!(outcome.status.phase, Phase::Moved, "{fault:?}");
            }
        }
    }
}

#[test]
fn wherever_the_connection_is_cut_exactly_one_end_runs_the_guest() {
    wherever(24, &options(), |to_destination, after| Fault::Cut {
        to_destination,
        after,
    });
}

#[test]
fn wherever_a_bit_changes_exactly_one_end_runs_the_guest() {
    wherever(16, &options(), |to_destination, at| Fault::Flip {
        to_destination,
        at,
    });
}
