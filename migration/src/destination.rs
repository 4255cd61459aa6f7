//! The end that gets the guest.

pub(crate) mod standby;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::compare::{Compare, Unanswered};
use crate::descriptors;
use crate::disk::{self, Disks};
use crate::follow::{self, Follower, Lost, Remote, SPARES, Way, What};
use crate::frames::{self, Place};
use crate::squeeze;
use crate::status::{Following, MOST_STREAMS, Phase, Progress, micros};
use crate::sum::sum;
use crate::way::{self, Stream};
use crate::wire::{self, Accepted, Hello, Join, Kind, Offer, Restored, Running};

/// How long a destination that could run the guest asks whether it may, when
/// the connection is gone.
const INQUIRY: Duration = Duration::from_secs(if cfg!(test) { 6 } else { 20 });
/// How long it waits for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the handshake may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the guest does not run here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source, or the connection to it.
    #[error("the migration failed before the guest was handed over: {0}; it is where it was")]
    Wire(#[from] wire::Error),
    /// The source speaks another version.
    #[error(
        "the source speaks version {found} of the migration protocol, this one {}: use the same version of Blanket at both ends",
        wire::VERSION
    )]
    Version {
        /// The source's.
        found: u32,
    },
    /// The memory here is not the guest's.
    #[error("the guest has other memory; configure this machine like the guest's")]
    Memory,
    /// The disks here are not the guest's.
    #[error("the guest's disks have other sizes; configure this machine like the guest's")]
    Disks,
    /// A disk here fails.
    #[error("a disk cannot be read or written: {0}")]
    Disk(io::Error),
    /// A write was lost on the way.
    #[error("the memory or a disk that arrived is not the guest's")]
    Differs,
    /// The machine did not take the state.
    #[error("{0}")]
    Machine(String),
    /// Nobody tells whether the guest was handed over.
    #[error(
        "the source does not say whether the guest was handed over: it waits here, paused; if the source is gone for good, resume it"
    )]
    Undecided,
    /// The same where not all memory is here: it can never run.
    #[error(
        "the source does not say whether the guest was handed over, and not all of its memory is here: it cannot run here"
    )]
    Stranded,
    /// Memory or disks have not followed.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Wire(error.into())
    }
}

impl From<Unanswered> for Error {
    fn from(error: Unanswered) -> Self {
        match error {
            Unanswered::Wire(error) => Self::Wire(error),
            Unanswered::Disk(error) => Self::Disk(error),
        }
    }
}

/// What the engine needs of the monitor here.
pub trait Machine: Sync {
    /// All memory, which holds nothing but zeros.
    fn ram(&self) -> &GuestRam;

    /// The disks whose content comes.
    fn disks(&self) -> &Disks;

    /// Whether memory can follow the guest here.
    ///
    /// # Errors
    /// It cannot: why.
    fn can_follow(&self) -> Result<(), String>;

    /// Arms `remote`, and runs it on another thread.
    ///
    /// # Errors
    /// The kernel refuses.
    fn follow(&self, remote: Remote) -> Result<(), String>;

    /// Takes the state over, with the memory in place, or on its way: who needs
    /// it waits for it.
    ///
    /// # Errors
    /// The machine cannot.
    fn restore(&self, state: &[u8]) -> Result<(), String>;

    /// Has the guest run: it is this machine's now.
    ///
    /// # Errors
    /// A device does not go on.
    fn run(&self) -> Result<(), String>;

    /// Has the guest, which runs, receive a frame before all that its networks
    /// send here.
    fn frame(&self, place: Place, frame: &[u8]);

    /// Lets what its networks send here to the guest.
    fn release(&self);
}

/// A source that has been met.
pub struct Destination {
    path: PathBuf,
    offer: Offer,
    control: UnixStream,
    data: Vec<Stream>,
    /// For a question at the end: a monitor that has given up its privileges
    /// may not connect any more.
    spare: UnixStream,
    /// For what follows the guest.
    spares: Vec<UnixStream>,
    /// Its memory, and its disks, if they follow.
    followers: Vec<Arc<Follower>>,
    /// Something of the disks follows.
    lazy: bool,
}

impl Destination {
    /// Connects to the source at `path`; what it hands over.
    ///
    /// # Errors
    /// Nobody is there, or it speaks another protocol.
    pub fn meet(path: &Path) -> Result<(Self, Vec<OwnedFd>), Error> {
        let mut control = connect(path)?;
        let hello = Hello {
            version: wire::VERSION,
        };
        wire::send_value(&mut control, Kind::Hello, &hello)?;
        let offer: Offer = wire::decode(&wire::expect(&mut control, Kind::Offer)?)?;
        if offer.version != wire::VERSION {
            return Err(Error::Version {
                found: offer.version,
            });
        }
        let descriptors = descriptors::receive(&control, offer.descriptors)?;
        let data = (0..offer.streams.min(MOST_STREAMS))
            .map(|index| join(way::ask(connect(path)?)?, offer.session, index))
            .collect::<Result<_, _>>()?;
        // After the data streams.
        let spare = connect(path)?;
        let spare = join(spare.into(), offer.session, offer.streams.min(MOST_STREAMS))?;
        let spare = spare.into_socket().ok_or(wire::Error::Cut)?;
        // Last, as the source hears nothing of them for now.
        let parts = usize::from(offer.follows) + usize::from(offer.lazy);
        let spares = (0..parts * SPARES)
            .map(|_| UnixStream::connect(path))
            .collect::<Result<_, _>>()?;
        let met = Self {
            spare,
            spares,
            followers: Vec::new(),
            lazy: false,
            path: path.to_owned(),
            offer,
            control,
            data,
        };
        Ok((met, descriptors))
    }

    /// What the source's monitor says of its machine.
    #[must_use]
    pub fn machine(&self) -> &[u8] {
        &self.offer.machine
    }

    /// Whether the disks' content is to follow the guest, if the disks here can do
    /// with that.
    #[must_use]
    pub fn is_lazy(&self) -> bool {
        self.offer.lazy
    }

    /// Tells the source that it does not work here.
    pub fn refuse(mut self, reason: &str) {
        let _ = wire::send(&mut self.control, Kind::Abort, reason.as_bytes());
    }

    /// Receives the guest and has it run; returns when all its memory is here, and
    /// all of its disks.
    ///
    /// # Errors
    /// It does not run here, and never will, unless it is [`Error::Undecided`], or
    /// a part of its disks is [lost](Error::Lost).
    pub fn run(mut self, machine: &dyn Machine, progress: &Arc<Progress>) -> Result<(), Error> {
        progress.lock().phase = Phase::Copying;
        let arrived = self.arrive(machine, progress);
        let mut followers = self.followers.iter();
        let arrived = match arrived {
            Ok(()) => followers.try_for_each(|it| it.wait().map_err(Error::from)),
            Err(error) => {
                let stranded = matches!(error, Error::Undecided) && followers.len() > 0;
                followers.for_each(|follower| follower.abandon());
                Err(if stranded { Error::Stranded } else { error })
            }
        };
        match &arrived {
            Ok(()) => progress.lock().phase = Phase::Moved,
            Err(error) => progress.fail(error.to_string()),
        }
        arrived
    }

    fn arrive(&mut self, machine: &dyn Machine, progress: &Arc<Progress>) -> Result<(), Error> {
        let restored = self.receive(machine, progress);
        self.tell_failure(&restored);
        let restored = restored?;
        let mut followers = self.followers.iter();
        followers.try_for_each(|follower| follower.ready())?;
        // A source that never hears that it is ready does not hand over.
        wire::send_value(&mut self.control, Kind::Ready, &restored)?;
        let mut other = match self.committed() {
            Ok(()) => None,
            Err(wire::Error::Aborted(reason)) => return Err(wire::Error::Aborted(reason).into()),
            Err(_) => Some(self.inquire()?),
        };
        let start = Instant::now();
        self.followers.iter().for_each(|follower| follower.own());
        if !self.followers.is_empty() {
            // Before anybody can see that it runs.
            progress.lock().phase = Phase::Following;
        }
        machine.run().map_err(Error::Machine)?;
        let running = Running {
            resume_us: micros(start.elapsed()),
        };
        // It runs, whether or not the source hears of it.
        let control = other.as_mut().unwrap_or(&mut self.control);
        let told = wire::send_value(control, Kind::Running, &running);
        // A source that is gone sends no frames on.
        if other.is_none()
            && let Err(error) = told.and_then(|()| frames::take(machine, &mut self.control))
        {
            tracing::warn!(%error, "frames to the guest's old place may be lost");
        }
        machine.release();
        Ok(())
    }

    /// All memory and the state.
    fn receive(
        &mut self,
        machine: &dyn Machine,
        progress: &Arc<Progress>,
    ) -> Result<Restored, Error> {
        let ram = machine.ram();
        let regions = ram.iter().map(|it| (it.start_addr().0, it.len()));
        if !regions.eq(self.offer.regions.iter().copied()) {
            return Err(Error::Memory);
        }
        let disks = machine.disks();
        let accepted = Accepted {
            blank: self.blank(disks)?,
            unable: machine.can_follow().err(),
            late: disks.iter().all(|disk| disk.absent().is_some()),
        };
        let take = |kind, payload: &[u8]| match kind {
            Kind::Pages | Kind::Lz4 | Kind::Change | Kind::Zeros => place(kind, payload, ram),
            Kind::Blocks | Kind::Holes => store(kind, payload, disks),
            _ => Err(wire::Error::Damaged("memory is not what came").into()),
        };
        let state = self.take(&accepted, take, |this| this.state(machine, progress))?;
        let start = Instant::now();
        machine.restore(&state).map_err(Error::Machine)?;
        Ok(Restored {
            restore_us: micros(start.elapsed()),
        })
    }

    /// Which of `disks`, which have to be like the source's, have nothing but zeros.
    fn blank(&self, disks: &Disks) -> Result<Vec<bool>, Error> {
        let capacities = disks.iter().map(|disk| disk.capacity());
        if !capacities.eq(self.offer.disks.iter().copied()) {
            return Err(Error::Disks);
        }
        Ok(disks.iter().map(|disk| disk::is_blank(&**disk)).collect())
    }

    /// Accepts, and has `put` put in place what comes on the data streams, for as
    /// long as `control` takes.
    fn take<T>(
        &mut self,
        accepted: &Accepted,
        put: impl Fn(Kind, &[u8]) -> Result<(), Error> + Sync,
        control: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let streams = std::mem::take(&mut self.data);
        wire::send_value(&mut self.control, Kind::Accept, accepted)?;
        // From here on the source says when it is over.
        self.control.set_read_timeout(None)?;
        let endings: Vec<_> = streams
            .iter()
            .map(|stream| stream.socket().try_clone())
            .collect::<io::Result<_>>()?;
        std::thread::scope(|scope| {
            let takers: Vec<_> = streams
                .into_iter()
                .map(|stream| scope.spawn(|| take_all(stream, &put)))
                .collect();
            let mut result = control(self);
            // What is to come has come, or never will.
            for stream in &endings {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            for taker in takers {
                if let Ok(Err(error)) = taker.join() {
                    result = Err(error);
                }
            }
            result
        })
    }

    /// Tells the source what went wrong here, if it does not know.
    fn tell_failure<T>(&mut self, result: &Result<T, Error>) {
        if let Err(error) = result
            && !matches!(
                error,
                Error::Wire(wire::Error::Cut | wire::Error::Aborted(_))
            )
        {
            let _ = wire::send(&mut self.control, Kind::Abort, error.to_string().as_bytes());
        }
    }

    /// The state, which comes when all memory is in place.
    fn state(&mut self, machine: &dyn Machine, progress: &Arc<Progress>) -> Result<Vec<u8>, Error> {
        let (ram, disks) = (machine.ram(), machine.disks());
        let mut payload = Vec::new();
        loop {
            match wire::receive(&mut self.control, &mut payload)? {
                Kind::State => {
                    self.follow_disks(disks, progress)?;
                    return Ok(payload);
                }
                Kind::Absent if self.offer.lazy => {
                    self.lazy = true;
                    expect(&payload, disks)?;
                }
                Kind::Compare => {
                    let hashes = Compare::from_bytes(&payload)?.answer(disks)?;
                    wire::send(&mut self.control, Kind::Hashes, &hashes)?;
                }
                Kind::Flush => {
                    let mut all = disks.iter();
                    all.try_for_each(|disk| disk.flush()).map_err(Error::Disk)?;
                    wire::send(&mut self.control, Kind::Flush, &[])?;
                }
                Kind::Missing if self.followers.is_empty() && self.offer.follows => {
                    self.follow(machine, &payload, progress)?;
                }
                Kind::Verify => {
                    let disks = if self.lazy { &[] } else { disks };
                    if payload != sum(ram, disks)?.to_le_bytes() {
                        return Err(Error::Differs);
                    }
                }
                _ => return Err(wire::Error::Damaged("its parts are not in order").into()),
            }
        }
    }

    /// Has the memory of these pages follow the guest.
    fn follow(
        &mut self,
        machine: &dyn Machine,
        missing: &[u8],
        progress: &Arc<Progress>,
    ) -> Result<(), Error> {
        machine.can_follow().map_err(Error::Machine)?;
        let missing = Pages::from_bytes(machine.ram(), missing);
        let missing = missing.ok_or(wire::Error::Damaged("other memory is missing"))?;
        let bytes = missing.count() * PAGE as u64;
        progress.lock().following = Some(Following {
            missing: bytes,
            left: bytes,
            ..Following::default()
        });
        let way = self.way(What::Memory, progress)?;
        let follower = Arc::clone(&way.follower);
        let remote = Remote { way, missing };
        machine.follow(remote).map_err(Error::Machine)?;
        self.followers.push(follower);
        Ok(())
    }

    /// Has what is missing of the disks follow the guest.
    fn follow_disks(&mut self, disks: &Disks, progress: &Arc<Progress>) -> Result<(), Error> {
        if !self.lazy {
            return Ok(());
        }
        let late = disks.iter().filter_map(|disk| disk.absent());
        let bytes = late.map(|absent| absent.left()).sum();
        progress.lock().following_disks = Some(Following {
            missing: bytes,
            left: bytes,
            ..Following::default()
        });
        let way = self.way(What::Disks, progress)?;
        let follower = Arc::clone(&way.follower);
        follow::bring_disks(way, disks).map_err(Error::Disk)?;
        self.followers.push(follower);
        Ok(())
    }

    /// The way to what follows the guest.
    fn way(&mut self, what: What, progress: &Arc<Progress>) -> Result<Way, Error> {
        let rest = self.spares.len().saturating_sub(SPARES);
        Ok(Way {
            what,
            path: self.path.clone(),
            session: self.offer.session,
            spares: self.spares.split_off(rest),
            follower: Follower::new(progress)?,
        })
    }

    fn committed(&mut self) -> Result<(), wire::Error> {
        let session = wire::expect(&mut self.control, Kind::Commit)?;
        if session == self.offer.session {
            Ok(())
        } else {
            Err(wire::Error::Damaged("another session's commit"))
        }
    }

    /// Asks the source whether the guest was handed over, as the connection
    /// broke when it may have been.
    fn inquire(&self) -> Result<UnixStream, Error> {
        let end = Instant::now() + INQUIRY;
        let mut spare = self.spare.try_clone().ok();
        while Instant::now() < end {
            let answer = match spare.take() {
                Some(stream) => self.ask(stream),
                None => UnixStream::connect(&self.path)
                    .map_err(wire::Error::from)
                    .and_then(|stream| self.ask(stream)),
            };
            match answer {
                Ok(stream) => return Ok(stream),
                Err(wire::Error::Aborted(reason)) => {
                    return Err(wire::Error::Aborted(reason).into());
                }
                Err(error) => {
                    tracing::warn!(%error, "no word on whether the guest was handed over");
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(Error::Undecided)
    }

    fn ask(&self, mut stream: UnixStream) -> Result<UnixStream, wire::Error> {
        stream.set_read_timeout(Some(ANSWER))?;
        wire::send(&mut stream, Kind::Ask, &self.offer.session)?;
        if wire::expect(&mut stream, Kind::Commit)? != self.offer.session {
            return Err(wire::Error::Damaged("another session's commit"));
        }
        Ok(stream)
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Says what a stream is for.
fn join(mut stream: Stream, session: [u8; 16], index: u32) -> Result<Stream, Error> {
    stream.socket().set_read_timeout(None)?;
    wire::send_value(&mut stream, Kind::Join, &Join { session, index })?;
    Ok(stream)
}

/// Has `put` put what comes on a data stream in its place, until the stream ends.
fn take_all(
    mut stream: Stream,
    put: impl Fn(Kind, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let taken = take_frames(&mut stream, put);
    if let Err(error) = &taken {
        // The source waits for the round's end on this stream.
        let _ = wire::send(&mut stream, Kind::Abort, error.to_string().as_bytes());
        // Nobody reads on: it need not write on.
        let _ = stream.socket().shutdown(std::net::Shutdown::Read);
    }
    taken
}

fn take_frames(
    stream: &mut Stream,
    put: impl Fn(Kind, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut room = Vec::new();
    loop {
        let (kind, payload) = match stream.receive(&mut room) {
            // It ends between two frames when all is done, and when the source
            // is gone: the control stream tells which.
            Err(wire::Error::Cut) => return Ok(()),
            other => other?,
        };
        match kind {
            Kind::Sync => {
                let number = payload.to_vec();
                wire::send(stream, Kind::Sync, &number)?;
            }
            kind => put(kind, payload)?,
        }
    }
}

/// Notes what has not come of the disks. For the fuzzer, too.
///
/// # Errors
/// It does not fit the disks, or they cannot do with that.
pub fn expect(payload: &[u8], disks: &Disks) -> Result<(), Error> {
    let damaged = wire::Error::Damaged;
    let (ranges, rest) = payload.as_chunks::<24>();
    if !rest.is_empty() {
        return Err(damaged("a part of a range").into());
    }
    for range in ranges {
        let (numbers, _) = range.as_chunks::<8>();
        let [disk, at, len] = [0, 1, 2].map(|i: usize| u64::from_le_bytes(numbers[i]));
        let disk = usize::try_from(disk).ok().and_then(|disk| disks.get(disk));
        let end = at.checked_add(len);
        let fits = disk.zip(end).filter(|(disk, end)| *end <= disk.capacity());
        let (disk, end) = fits.ok_or(damaged("blocks outside the disks"))?;
        let absent = disk.absent().ok_or(damaged("a disk that cannot wait"))?;
        absent.expect(at..end);
    }
    Ok(())
}

/// Carries out one frame of a disk. For the fuzzer, too.
///
/// # Errors
/// It does not fit the disks, or one cannot be written.
pub fn store(kind: Kind, payload: &[u8], disks: &Disks) -> Result<(), Error> {
    let damaged = wire::Error::Damaged;
    // A disk that has the range.
    let find = |disk: u64, at: u64, len: u64| {
        let disk = usize::try_from(disk).ok().and_then(|disk| disks.get(disk));
        let end = at.checked_add(len);
        disk.filter(|disk| end.is_some_and(|end| end <= disk.capacity()))
            .ok_or(damaged("blocks outside the disks"))
    };
    if kind == Kind::Blocks {
        let (head, bytes) = payload
            .split_first_chunk::<16>()
            .ok_or(damaged("blocks without a place"))?;
        let (numbers, _) = head.as_chunks::<8>();
        let (disk, at) = (
            u64::from_le_bytes(numbers[0]),
            u64::from_le_bytes(numbers[1]),
        );
        let disk = find(disk, at, bytes.len() as u64)?;
        return disk.write(at, bytes).map_err(Error::Disk);
    }
    let (ranges, rest) = payload.as_chunks::<24>();
    if !rest.is_empty() {
        return Err(damaged("a part of a range").into());
    }
    for range in ranges {
        let (numbers, _) = range.as_chunks::<8>();
        let [disk, at, len] = [0, 1, 2].map(|i: usize| u64::from_le_bytes(numbers[i]));
        let disk = find(disk, at, len)?;
        disk.clear(at, len).map_err(Error::Disk)?;
    }
    Ok(())
}

/// Carries out one frame of memory. For the fuzzer, too.
///
/// # Errors
/// It does not fit the memory.
pub fn place(kind: Kind, payload: &[u8], ram: &GuestRam) -> Result<(), Error> {
    let whole = |at: u64, len: usize| at.is_multiple_of(PAGE as u64) && len.is_multiple_of(PAGE);
    let (head, rest) = payload.as_chunks::<8>();
    match kind {
        Kind::Lz4 => {
            let (at, pages) = squeeze::unpack(payload)?;
            if !whole(at, pages.len()) {
                return Err(wire::Error::Damaged("a part of a page").into());
            }
            let placed = ram.write_slice(&pages, GuestAddress(at));
            placed.map_err(|_| Error::Memory)
        }
        Kind::Change => Ok(squeeze::change(payload, ram)?),
        Kind::Pages => {
            let (at, bytes) = payload
                .split_first_chunk()
                .ok_or(wire::Error::Damaged("memory without a place"))?;
            let at = u64::from_le_bytes(*at);
            if !whole(at, bytes.len()) {
                return Err(wire::Error::Damaged("a part of a page").into());
            }
            let placed = ram.write_slice(bytes, GuestAddress(at));
            placed.map_err(|_| Error::Memory)
        }
        Kind::Zeros if rest.is_empty() && head.len().is_multiple_of(2) => {
            for range in head.as_chunks::<2>().0 {
                let [at, len] = range.map(u64::from_le_bytes);
                if !whole(at, len as usize) || !ram.check_range(GuestAddress(at), len as usize) {
                    return Err(wire::Error::Damaged("zeros outside memory").into());
                }
                for page in 0..len / PAGE as u64 {
                    clear(ram, GuestAddress(at + page * PAGE as u64))?;
                }
            }
            Ok(())
        }
        _ => Err(wire::Error::Damaged("memory is not what came").into()),
    }
}

/// Makes a page zeros, without touching one that is.
fn clear(ram: &GuestRam, at: GuestAddress) -> Result<(), Error> {
    let mut page = [0; PAGE];
    ram.read_slice(&mut page, at).map_err(|_| Error::Memory)?;
    if page != [0; PAGE] {
        ram.write_slice(&[0; PAGE], at).map_err(|_| Error::Memory)?;
    }
    Ok(())
}
