//! The end that has the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::descriptors;
use crate::destination::memory_sum;
use crate::status::{Options, Pace, Pause, Phase, Progress, Round, micros};
use crate::wire::{self, Frames, Hello, Join, Kind, MOST_MEMORY, Offer, Restored, Running};

/// How long the other end may take for a step of its own.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 30 });
/// How long the destination may ask what became of a guest that was handed over.
const INQUIRY: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });
/// How long a destination that has lost the connection may ask after a failure.
const REMORSE: Duration = Duration::from_secs(3);
/// How long this end sleeps between two looks at what it waits for.
const LOOK: Duration = Duration::from_millis(2);
/// Bytes that are sent at once.
const BATCH: usize = 256 << 10;
/// Pages that one stream sends alone: more threads would take longer.
const FEW: u64 = 256;
/// A round of so many bytes tells the rate.
const TELLING: u64 = 1 << 20;

/// Why the guest stays here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// No destination came, or it went silent.
    #[error("the destination did not {0} within {secs} s", secs = PATIENCE.as_secs())]
    Silent(&'static str),
    /// The two versions cannot work together.
    #[error(
        "the destination speaks version {found} of the migration protocol, this one {}: use the same version of Blanket at both ends",
        wire::VERSION
    )]
    Version {
        /// The destination's.
        found: u32,
    },
    /// The guest writes faster than memory can be sent.
    #[error(
        "the guest writes memory faster than it can be sent: it would stand still for {expected_ms} ms, {target_ms} ms are allowed; allow more with --downtime, or give it more --bandwidth"
    )]
    Diverges {
        /// Expected milliseconds.
        expected_ms: u64,
        /// Allowed milliseconds.
        target_ms: u64,
    },
    /// The guest's machine failed a step.
    #[error("{0}")]
    Guest(String),
    /// The connection or the destination failed.
    #[error("{0}")]
    Wire(#[from] wire::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Wire(error.into())
    }
}

/// What the engine needs of the guest's monitor.
pub trait Guest {
    /// All its memory.
    fn ram(&self) -> &GuestRam;

    /// Begins to note what is written; the pages that may be other than zeros.
    ///
    /// # Errors
    /// It cannot be noted.
    fn begin(&mut self) -> Result<Pages, String>;

    /// Takes the pages that were written since the last time.
    ///
    /// # Errors
    /// They are not known.
    fn dirty(&mut self) -> Result<Pages, String>;

    /// Notes no more.
    fn end(&mut self);

    /// Stops the guest and its devices; their state.
    ///
    /// # Errors
    /// It could not be stopped, and runs.
    fn stop(&mut self) -> Result<Vec<u8>, String>;

    /// Lets the stopped guest run on.
    ///
    /// # Errors
    /// It cannot go on.
    fn resume(&mut self) -> Result<(), String>;

    /// It is another's now and must never run here again.
    fn give_up(&mut self);
}

/// How a guest is moved.
struct How<'a> {
    options: &'a Options,
    pace: &'a Pace,
    progress: &'a Progress,
}

/// A destination that has accepted the guest.
pub struct Source {
    session: [u8; 16],
    control: UnixStream,
    data: Vec<UnixStream>,
    /// The destination may be ready.
    at_risk: bool,
}

/// What is offered to the destination.
pub struct Terms<'a> {
    /// Names this attempt; random.
    pub session: [u8; 16],
    /// See [`Offer::machine`].
    pub machine: Vec<u8>,
    /// What is handed over with it.
    pub descriptors: &'a [RawFd],
}

/// The next connection; none if something comes on `control` first.
fn accept(
    listener: &UnixListener,
    control: Option<&UnixStream>,
    progress: &Progress,
    end: Instant,
) -> Result<Option<UnixStream>, Error> {
    listener.set_nonblocking(true)?;
    while Instant::now() < end {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(Some(stream));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if control.is_some_and(is_readable) {
                    return Ok(None);
                }
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::Silent("connect"))
}

/// Whether there is something to read, or the end.
fn is_readable(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: it is one entry, and outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

impl Source {
    /// Waits for a destination at `listener`, and until it has a machine for
    /// the guest. Nothing has been stopped or changed here then.
    ///
    /// # Errors
    /// Nobody comes, or the destination has no such machine: it says why.
    pub fn meet(
        listener: &UnixListener,
        terms: Terms<'_>,
        ram: &GuestRam,
        options: &Options,
        progress: &Progress,
    ) -> Result<Self, Error> {
        let deadline = Instant::now() + PATIENCE;
        let (mut control, hello) = loop {
            let stream = accept(listener, None, progress, deadline)?;
            let mut stream = stream.ok_or(wire::Error::Cut)?;
            match wire::expect(&mut stream, Kind::Hello) {
                Ok(hello) => break (stream, wire::decode::<Hello>(&hello)?),
                // Left by an earlier one that is gone.
                Err(wire::Error::Cut) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if hello.version != wire::VERSION {
            let error = Error::Version {
                found: hello.version,
            };
            let _ = wire::send(&mut control, Kind::Abort, error.to_string().as_bytes());
            return Err(error);
        }
        let streams = options.streams();
        progress.lock().streams = streams;
        let regions = ram.iter().map(|it| (it.start_addr().0, it.len()));
        let offer = Offer {
            version: wire::VERSION,
            session: terms.session,
            streams,
            regions: regions.collect(),
            machine: terms.machine,
            descriptors: terms.descriptors.len() as u32,
        };
        wire::send_value(&mut control, Kind::Offer, &offer)?;
        descriptors::send(&control, terms.descriptors)?;
        let mut data: Vec<Option<UnixStream>> = (0..streams).map(|_| None).collect();
        while data.iter().any(Option::is_none) {
            let Some(mut stream) = accept(listener, Some(&control), progress, deadline)? else {
                // It says why it does not come, or is gone.
                wire::expect(&mut control, Kind::Abort)?;
                continue;
            };
            let join: Join = wire::decode(&wire::expect(&mut stream, Kind::Join)?)?;
            let place = data.get_mut(join.index as usize);
            if let Some(place) = place.filter(|_| join.session == terms.session) {
                *place = Some(stream);
            }
        }
        wire::expect(&mut control, Kind::Accept)?;
        Ok(Self {
            session: terms.session,
            control,
            data: data.into_iter().flatten().collect(),
            at_risk: false,
        })
    }

    /// Moves the guest. On an error it is here, and runs if it ran.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn run(
        mut self,
        guest: &mut dyn Guest,
        options: &Options,
        progress: &Arc<Progress>,
        listener: &UnixListener,
    ) -> Result<(), Error> {
        let start = Instant::now();
        progress.lock().phase = Phase::Copying;
        let moved = self.copy_and_switch(guest, options, progress);
        guest.end();
        let done = match moved {
            Ok(pause) => {
                self.confirm(pause, progress, listener);
                Ok(())
            }
            Err(error) => {
                progress.fail(error.to_string());
                self.tell_failure(&error, listener);
                Err(error)
            }
        };
        progress.lock().total_us = micros(start.elapsed());
        done
    }

    /// Tells the destination that the guest stays here; if the connection is
    /// gone, when it asks.
    fn tell_failure(&mut self, error: &Error, listener: &UnixListener) {
        let reason = error.to_string();
        if wire::send(&mut self.control, Kind::Abort, reason.as_bytes()).is_ok() || !self.at_risk {
            return;
        }
        let unhurried = Progress::default();
        let end = Instant::now() + REMORSE;
        if let Ok(Some(mut stream)) = accept(listener, None, &unhurried, end) {
            let asked = wire::expect(&mut stream, Kind::Ask);
            if asked.is_ok_and(|session| session == self.session) {
                let _ = wire::send(&mut stream, Kind::Abort, reason.as_bytes());
            }
        }
    }

    fn copy_and_switch(
        &mut self,
        guest: &mut dyn Guest,
        options: &Options,
        progress: &Progress,
    ) -> Result<Pause, Error> {
        let how = How {
            options,
            pace: &Pace::new(options.bandwidth),
            progress,
        };
        let mut pages = guest.begin().map_err(Error::Guest)?;
        let target = options.downtime_ms * 1000;
        for number in 0..options.rounds.max(1) {
            let round = self.round(guest.ram(), &pages, number, &how)?;
            pages = guest.dirty().map_err(Error::Guest)?;
            let expected = note(progress, round, pages.count());
            if expected <= target {
                return self.switch(guest, &pages, &how);
            }
        }
        Err(Error::Diverges {
            expected_ms: progress.lock().expected_downtime_us.div_ceil(1000),
            target_ms: options.downtime_ms,
        })
    }

    /// Stops the guest and hands it over. Up to the commit, any error has it run
    /// on here.
    fn switch(
        &mut self,
        guest: &mut dyn Guest,
        pages: &Pages,
        how: &How<'_>,
    ) -> Result<Pause, Error> {
        let progress = how.progress;
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        progress.lock().phase = Phase::Switching;
        let mut pause = Pause::begin();
        let state = guest.stop().map_err(Error::Guest)?;
        pause.mark("stop and save", 0);
        let handed = self.hand_over(guest, pages, &state, how, &mut pause);
        match handed {
            Ok(()) => {
                guest.give_up();
                Ok(pause)
            }
            Err(error) => {
                guest.resume().map_err(Error::Guest)?;
                Err(error)
            }
        }
    }

    fn hand_over(
        &mut self,
        guest: &mut dyn Guest,
        pages: &Pages,
        state: &[u8],
        how: &How<'_>,
        pause: &mut Pause,
    ) -> Result<(), Error> {
        let How {
            options, progress, ..
        } = how;
        let mut pages = pages.clone();
        pages.merge(&guest.dirty().map_err(Error::Guest)?);
        let round = self.round(guest.ram(), &pages, u32::MAX, how)?;
        progress.lock().rounds.push(round);
        pause.mark("last memory", 0);
        if options.verify {
            let sum = memory_sum(guest.ram())?.to_le_bytes();
            wire::send(&mut self.control, Kind::Verify, &sum)?;
            pause.mark("verify", 0);
        }
        self.at_risk = true;
        wire::send(&mut self.control, Kind::State, state)?;
        let ready = wire::expect(&mut self.control, Kind::Ready)?;
        let restored: Restored = wire::decode(&ready)?;
        pause.mark("send state", restored.restore_us);
        pause.add("restore", restored.restore_us);
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // The last message that can fail: when it has gone out, this end never
        // runs the guest again. A Unix socket takes a frame so short whole, or
        // not at all.
        Ok(wire::send(&mut self.control, Kind::Commit, &self.session)?)
    }

    /// Waits for the word that the guest runs; or for a destination that has
    /// lost the connection and asks whether it may.
    fn confirm(&mut self, mut pause: Pause, progress: &Progress, listener: &UnixListener) {
        progress.lock().phase = Phase::Handed;
        let mut word = wire::expect(&mut self.control, Kind::Running);
        let end = Instant::now() + INQUIRY;
        // It cannot be cancelled any more.
        let unhurried = Progress::default();
        while word.is_err() && Instant::now() < end {
            let Ok(Some(mut stream)) = accept(listener, None, &unhurried, end) else {
                break;
            };
            let asked = wire::expect(&mut stream, Kind::Ask);
            if asked.is_ok_and(|session| session == self.session)
                && wire::send(&mut stream, Kind::Commit, &self.session).is_ok()
            {
                word = wire::expect(&mut stream, Kind::Running);
            }
        }
        let running = word.and_then(|word| wire::decode::<Running>(&word));
        let mut status = progress.lock();
        match running {
            Ok(running) => {
                pause.mark("commit", running.resume_us);
                pause.add("resume", running.resume_us);
                pause.end(&mut status);
                status.phase = Phase::Moved;
            }
            Err(error) => {
                status.error = Some(format!(
                    "the guest was handed over, but the destination does not say that it runs: {error}"
                ));
            }
        }
    }

    /// Sends `pages` over all streams, and waits until they are in place.
    fn round(
        &mut self,
        ram: &GuestRam,
        pages: &Pages,
        number: u32,
        how: &How<'_>,
    ) -> Result<Round, Error> {
        let progress = how.progress;
        let start = Instant::now();
        let before = progress.bytes();
        let count = pages.count();
        progress.begin_round(count * PAGE as u64);
        let runs = pages.runs(ram, MOST_MEMORY);
        let work = Work {
            ram,
            runs: &runs,
            next: AtomicUsize::new(0),
            first: number == 0,
            number,
            failed: AtomicBool::new(false),
            pace: how.pace,
            progress,
        };
        let streams = if count <= FEW { 1 } else { self.data.len() };
        let (here, others) = self.data[..streams].split_at_mut(1);
        let result = std::thread::scope(|scope| {
            let others: Vec<_> = others
                .iter_mut()
                .map(|stream| scope.spawn(|| work.send(stream)))
                .collect();
            let mut result = here.iter_mut().try_for_each(|stream| work.send(stream));
            for other in others {
                let sent = other.join();
                let sent = sent.unwrap_or(Err(Error::Guest("a sender died".to_owned())));
                result = result.and(sent);
            }
            result
        });
        result?;
        Ok(Round {
            pages: count,
            bytes: progress.bytes() - before,
            us: micros(start.elapsed()),
            dirty: 0,
        })
    }
}

/// Notes how a round went; the expected downtime in microseconds.
fn note(progress: &Progress, mut round: Round, dirty: u64) -> u64 {
    round.dirty = dirty;
    let mut status = progress.lock();
    let us = round.us.max(1);
    if round.bytes >= TELLING || status.rate == 0 {
        status.rate = (round.bytes * 1_000_000 / us).max(1);
    }
    let dirty = dirty * PAGE as u64;
    status.dirty_rate = dirty * 1_000_000 / us;
    status.expected_downtime_us = dirty * 1_000_000 / status.rate;
    status.rounds.push(round);
    status.expected_downtime_us
}

/// What the streams of a round share.
struct Work<'a> {
    ram: &'a GuestRam,
    runs: &'a [(GuestAddress, usize)],
    next: AtomicUsize,
    /// Where the destination's memory is all zeros.
    first: bool,
    number: u32,
    failed: AtomicBool,
    pace: &'a Pace,
    progress: &'a Progress,
}

impl Work<'_> {
    fn send(&self, stream: &mut UnixStream) -> Result<(), Error> {
        let sent = self.send_runs(stream);
        if sent.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        if let Err(Error::Wire(wire::Error::Cut)) = sent
            && let Err(reason @ wire::Error::Aborted(_)) = wire::receive(stream, &mut Vec::new())
        {
            return Err(reason.into());
        }
        sent
    }

    fn send_runs(&self, stream: &mut UnixStream) -> Result<(), Error> {
        let mut frames = Frames::default();
        let mut zeros = Vec::new();
        let mut memory = vec![0; MOST_MEMORY];
        while let Some((at, len)) = self.runs.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if self.failed.load(Ordering::Relaxed) {
                // Another stream has the reason.
                return Ok(());
            }
            let memory = &mut memory[..*len];
            self.ram
                .read_slice(memory, *at)
                .map_err(|error| Error::Guest(error.to_string()))?;
            pack(*at, memory, &mut frames, &mut zeros);
            self.progress.saw(*len as u64);
            if frames.bytes().len() + zeros.len() >= BATCH {
                self.flush(stream, &mut frames, &mut zeros)?;
            }
        }
        self.flush(stream, &mut frames, &mut zeros)?;
        wire::send(stream, Kind::Sync, &self.number.to_le_bytes())?;
        let back = wire::expect(stream, Kind::Sync)?;
        if back != self.number.to_le_bytes() {
            return Err(wire::Error::Damaged("another round was acknowledged").into());
        }
        Ok(())
    }

    fn flush(
        &self,
        stream: &mut UnixStream,
        frames: &mut Frames,
        zeros: &mut Vec<u8>,
    ) -> Result<(), Error> {
        if !self.first {
            for some in zeros.chunks(MOST_MEMORY) {
                frames.begin();
                frames.push(some);
                frames.end(Kind::Zeros);
            }
        }
        zeros.clear();
        self.pace.wait(frames.bytes().len());
        io::Write::write_all(stream, frames.bytes()).map_err(wire::Error::from)?;
        self.progress.sent(frames.bytes().len() as u64);
        frames.clear();
        Ok(())
    }
}

/// Packs the pages of `memory`, which is at `at`: those that are all zeros into
/// `zeros`, the others into `frames`.
fn pack(at: GuestAddress, memory: &[u8], frames: &mut Frames, zeros: &mut Vec<u8>) {
    let mut place = at.0;
    let same = |a: &[u8], b: &[u8]| is_zero(a) == is_zero(b);
    let pages: Vec<&[u8]> = memory.chunks(PAGE).collect();
    for run in pages.chunk_by(|a, b| same(a, b)) {
        let len = run.len() * PAGE;
        if run.first().is_some_and(|page| is_zero(page)) {
            zeros.extend(place.to_le_bytes());
            zeros.extend((len as u64).to_le_bytes());
        } else {
            frames.begin();
            frames.push(&place.to_le_bytes());
            run.iter().for_each(|page| frames.push(page));
            frames.end(Kind::Pages);
        }
        place += len as u64;
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}
