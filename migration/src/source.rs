//! The end that has the guest.

mod compare;
mod lazy;
mod points;
mod rounds;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::descriptors;
use crate::disk::{self, Disks};
use crate::frames::{self, Place};
use crate::keep::Keeper;
use crate::squeeze::Squeeze;
use crate::status::{Following, Mode, Options, Pace, Pause, Phase, Progress, micros};
use crate::sum::sum;
use crate::throttle;
use crate::way::{self, Stream};
use crate::wire::{self, Accepted, Hello, Join, Kind, Offer, Restored, Running};

use rounds::{Fresh, Load, note};

/// How long the other end may take for a step of its own.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 30 });
/// How long the destination may ask what became of a guest that was handed over.
const INQUIRY: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });
/// How long a destination that has lost the connection may ask after a failure.
const REMORSE: Duration = Duration::from_secs(3);
/// How long the memory and disks of a guest that runs at the destination are kept for one
/// that has gone away.
const ABSENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 200 });
/// Rounds after which a guest whose memory may follow it is handed over.
const ENOUGH: u32 = 6;
/// How long this end sleeps between two looks at what it waits for.
const LOOK: Duration = Duration::from_millis(2);

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
        "the guest writes memory faster than it can be sent{}: it would stand still for {expected_ms} ms, {target_ms} ms are allowed; allow more with --downtime, {}",
        if *.throttle > 0 { ", slowed down as it is" } else { "" },
        if *.throttle > 0 { "or give it more --bandwidth" } else { "give it more --bandwidth, or slow it down with --auto-converge" },
    )]
    Diverges {
        /// Expected milliseconds.
        expected_ms: u64,
        /// Allowed milliseconds.
        target_ms: u64,
        /// Percent by which it was slowed down.
        throttle: u8,
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

    /// The disks whose content moves along.
    fn disks(&self) -> Arc<Disks>;

    /// Begins to note what is written to memory; the pages that may be other than zeros.
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

    /// Has its processors run so many percent of the time less than they would,
    /// 0 to 99; 0 until it is said.
    ///
    /// # Errors
    /// It cannot be slowed down, and runs as it did.
    fn throttle(&mut self, percent: u8) -> Result<(), String>;

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

    /// The next frame that its networks have sent here since it was stopped, if
    /// there is one. Only once it is another's.
    fn frame(&mut self, into: &mut Vec<u8>) -> Option<Place>;

    /// Whether all its networks know where it is now.
    fn is_found(&self) -> bool;
}

/// How a guest is moved.
pub(crate) struct How<'a> {
    options: &'a Options,
    pub(crate) pace: Arc<Pace>,
    pub(crate) squeeze: Arc<Squeeze>,
    pub(crate) progress: &'a Arc<Progress>,
    /// Where the destination comes.
    pub(crate) listener: &'a UnixListener,
}

impl<'a> How<'a> {
    fn new(options: &'a Options, progress: &'a Arc<Progress>, listener: &'a UnixListener) -> Self {
        Self {
            options,
            pace: Arc::new(Pace::new(options.bandwidth)),
            squeeze: Arc::new(Squeeze::new(options)),
            progress,
            listener,
        }
    }
}

/// A destination that has accepted the guest.
pub struct Source {
    session: [u8; 16],
    control: UnixStream,
    data: Vec<Stream>,
    /// Where it asks if `control` is lost, and for memory that follows the guest.
    spares: Vec<UnixStream>,
    /// Its disks that have nothing but zeros.
    blank: Vec<bool>,
    /// Why memory cannot follow the guest there.
    unable: Option<String>,
    /// Its disks can be used before their content has come.
    late: bool,
    /// They are.
    lazy: bool,
    /// Who serves the destination when it comes again.
    keeper: Option<Keeper>,
    /// Rounds so far.
    rounds: u32,
    /// The destination may be ready.
    at_risk: bool,
}

/// What is offered to the destination.
pub struct Terms<'a> {
    /// Names this attempt; random.
    pub session: [u8; 16],
    /// See [`Offer::machine`].
    pub machine: Vec<u8>,
    /// See [`Offer::disks`].
    pub disks: Vec<u64>,
    /// What is handed over with it.
    pub descriptors: &'a [RawFd],
}

/// The next connection on which something comes; none if something comes on
/// `control` first. Those that have nothing to say yet wait in `silent`.
fn accept(
    listener: &UnixListener,
    silent: &mut Vec<Stream>,
    control: Option<&UnixStream>,
    progress: &Progress,
    end: Instant,
) -> Result<Option<Stream>, Error> {
    listener.set_nonblocking(true)?;
    while Instant::now() < end {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let speaks = |stream: &Stream| is_readable(stream, Duration::ZERO);
        if let Some(index) = silent.iter().position(speaks) {
            let mut stream = silent.swap_remove(index);
            match way::answer(&mut stream)? {
                Some(stream) => silent.push(patient(stream)?),
                None => return Ok(Some(stream)),
            }
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                silent.push(patient(stream.into())?);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if control.is_some_and(|control| is_readable(control, Duration::ZERO)) {
                    return Ok(None);
                }
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::Silent("connect"))
}

fn patient(stream: Stream) -> io::Result<Stream> {
    let socket = stream.socket();
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Whether there is something to read, or to accept, or the end, within a time.
pub(crate) fn is_readable(socket: &impl AsRawFd, within: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let timeout = within.as_millis() as libc::c_int;
    // SAFETY: it is one entry, and outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, timeout) > 0 }
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
        let mut silent = Vec::new();
        let (mut control, hello) = loop {
            let stream = accept(listener, &mut silent, None, progress, deadline)?;
            let stream = stream.and_then(Stream::into_socket);
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
            follows: options.mode != Mode::PreCopy,
            lazy: options.lazy_disks && !terms.disks.is_empty(),
            regions: regions.collect(),
            disks: terms.disks,
            machine: terms.machine,
            descriptors: terms.descriptors.len() as u32,
        };
        wire::send_value(&mut control, Kind::Offer, &offer)?;
        descriptors::send(&control, terms.descriptors)?;
        // The last one is for questions.
        let mut data: Vec<Option<Stream>> = (0..=streams).map(|_| None).collect();
        let mut accepted = None;
        while data.iter().any(Option::is_none) {
            let control_too = accepted.is_none().then_some(&control);
            let next = accept(listener, &mut silent, control_too, progress, deadline)?;
            let Some(mut stream) = next else {
                // It says why it does not come, or is gone; or its word is here
                // before its other streams, which came another way.
                accepted = Some(wire::expect(&mut control, Kind::Accept)?);
                continue;
            };
            let join: Join = wire::decode(&wire::expect(&mut stream, Kind::Join)?)?;
            let place = data.get_mut(join.index as usize);
            if let Some(place) = place.filter(|_| join.session == terms.session) {
                *place = Some(stream);
            }
        }
        let accepted = match accepted {
            Some(accepted) => accepted,
            None => wire::expect(&mut control, Kind::Accept)?,
        };
        let accepted: Accepted = wire::decode(&accepted)?;
        let mut data: Vec<_> = data.into_iter().flatten().collect();
        silent.extend(data.pop());
        progress.lock().way = data.first().map(Stream::way);
        Ok(Self {
            session: terms.session,
            control,
            spares: silent.into_iter().filter_map(Stream::into_socket).collect(),
            data,
            blank: accepted.blank,
            unable: accepted.unable,
            late: accepted.late,
            lazy: false,
            keeper: None,
            rounds: 0,
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
        let how = How::new(options, progress, listener);
        let moved = self.copy_and_switch(guest, &how);
        guest.end();
        throttle::release(guest, progress);
        guest.disks().iter().for_each(|disk| disk.unwatch());
        let done = match moved {
            Ok(pause) => {
                self.confirm(guest, pause, &how);
                Ok(())
            }
            Err(error) => {
                progress.fail(error.to_string());
                self.tell_failure(guest, &error, &how);
                Err(error)
            }
        };
        progress.lock().total_us = micros(start.elapsed());
        done
    }

    /// Tells the destination that the guest stays here; if the connection is
    /// gone, when it asks.
    fn tell_failure(&mut self, guest: &dyn Guest, error: &Error, how: &How<'_>) {
        let reason = error.to_string();
        if wire::send(&mut self.control, Kind::Abort, reason.as_bytes()).is_ok() || !self.at_risk {
            return;
        }
        if let Some(mut stream) = self.asked(guest, Instant::now() + REMORSE, how) {
            let _ = wire::send(&mut stream, Kind::Abort, reason.as_bytes());
        }
    }

    /// Waits for a destination that has lost the connection and asks.
    fn asked(&mut self, guest: &dyn Guest, end: Instant, how: &How<'_>) -> Option<UnixStream> {
        self.keep(guest, Instant::now(), how).ok()?.asked(end)
    }

    /// Serves the destination from now on when it comes again.
    fn keep(&mut self, guest: &dyn Guest, began: Instant, how: &How<'_>) -> io::Result<&Keeper> {
        let keeper = match self.keeper.take() {
            Some(keeper) => keeper,
            None => {
                let spares = std::mem::take(&mut self.spares);
                let parts = (guest.ram(), guest.disks());
                Keeper::spawn(how, spares, parts, self.session, began)?
            }
        };
        Ok(self.keeper.insert(keeper))
    }

    fn copy_and_switch(&mut self, guest: &mut dyn Guest, how: &How<'_>) -> Result<Pause, Error> {
        let How {
            options, progress, ..
        } = how;
        let mode = self.mode(how);
        self.lazy = how.options.lazy_disks && self.late;
        let extents = match self.lazy {
            true => self.leave_disks(guest, how)?,
            false => self.copy_disks(guest, how)?,
        };
        progress.lock().phase = Phase::Copying;
        let mut load = Load {
            pages: guest.begin().map_err(Error::Guest)?,
            extents,
        };
        // A quarter of it is for stopping and starting the guest, its state, and
        // what it writes until then.
        let target = options.downtime_ms * 1000 / 4 * 3;
        let mut last = u64::MAX;
        let rounds = match mode {
            Mode::PreCopy => options.rounds.max(1),
            Mode::Hybrid => options.rounds.clamp(1, ENOUGH),
            Mode::PostCopy => 0,
        };
        for number in 0..rounds {
            let mut round = self.round(
                guest.ram(),
                &guest.disks(),
                &load,
                Fresh::in_round(number),
                how,
            )?;
            if !load.extents.is_empty() {
                self.flush()?;
            }
            load = self.written(guest)?;
            round.dirty = load.pages.count();
            round.dirty_disk = disk::bytes(&load.extents);
            let expected = note(progress, round);
            if expected <= target {
                return self.switch(guest, load, false, how);
            }
            let shorter = expected <= last / 4 * 3;
            last = expected;
            match mode {
                Mode::Hybrid if !shorter => break,
                Mode::PreCopy if !shorter && options.auto_converge => {
                    throttle::tighten(guest, progress);
                }
                _ => {}
            }
        }
        if mode != Mode::PreCopy {
            // The disks' content does not follow.
            let little = progress.lock().rate / 1_000_000 * target;
            load.extents = self.thin_out(guest, load.extents, little, how)?;
            return self.switch(guest, load, true, how);
        }
        let status = progress.lock();
        Err(Error::Diverges {
            expected_ms: status.expected_downtime_us.div_ceil(1000),
            target_ms: options.downtime_ms,
            throttle: status.throttle,
        })
    }

    /// Stops the guest and hands it over; `follows`: before its memory. Up to the
    /// commit, any error has it run on here.
    fn switch(
        &mut self,
        guest: &mut dyn Guest,
        load: Load,
        follows: bool,
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
        let handed = self.hand_over(guest, load, follows, &state, how, &mut pause);
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
        mut load: Load,
        follows: bool,
        state: &[u8],
        how: &How<'_>,
        pause: &mut Pause,
    ) -> Result<(), Error> {
        let How {
            options, progress, ..
        } = how;
        let last = self.written(guest)?;
        load.pages.merge(&last.pages);
        // What is among them twice is the same: the guest stands still.
        load.extents.extend(last.extents);
        let missing = follows.then(|| {
            let none = Pages::none(guest.ram());
            std::mem::replace(&mut load.pages, none)
        });
        let round = self.round(guest.ram(), &guest.disks(), &load, Fresh::Nothing, how)?;
        progress.lock().rounds.push(round);
        pause.mark("last memory", 0);
        if !load.extents.is_empty() {
            self.flush()?;
            pause.mark("flush disks", 0);
        }
        if let Some(missing) = missing {
            self.leave(guest, &missing, how, pause)?;
        } else if self.lazy {
            self.keep(guest, pause.began(), how)?;
        }
        if options.verify {
            let disks = match self.lazy {
                true => Arc::new([]) as Arc<Disks>,
                false => guest.disks(),
            };
            let sum = sum(guest.ram(), &disks)?.to_le_bytes();
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

    /// Tells which memory follows the guest, and serves who asks for it: the
    /// destination's machine may need some for its state.
    fn leave(
        &mut self,
        guest: &dyn Guest,
        missing: &Pages,
        how: &How<'_>,
        pause: &mut Pause,
    ) -> Result<(), Error> {
        let bytes = missing.count() * PAGE as u64;
        how.progress.lock().following = Some(Following {
            missing: bytes,
            left: bytes,
            ..Following::default()
        });
        self.keep(guest, pause.began(), how)?;
        wire::send(&mut self.control, Kind::Missing, &missing.to_bytes())?;
        pause.mark("send what is missing", 0);
        Ok(())
    }

    /// Waits for the word that the guest runs; or for a destination that has
    /// lost the connection and asks whether it may. Then until it has all of it.
    fn confirm(&mut self, guest: &mut dyn Guest, mut pause: Pause, how: &How<'_>) {
        let progress = how.progress;
        progress.lock().phase = Phase::Handed;
        let mut word = wire::expect(&mut self.control, Kind::Running);
        let here = word.is_ok();
        let end = Instant::now() + INQUIRY;
        while word.is_err()
            && let Some(mut stream) = self.asked(guest, end, how)
        {
            if wire::send(&mut stream, Kind::Commit, &self.session).is_ok() {
                word = wire::expect(&mut stream, Kind::Running);
            }
        }
        let running = word.and_then(|word| wire::decode::<Running>(&word));
        if let Ok(running) = &running {
            pause.mark("commit", running.resume_us);
            pause.add("resume", running.resume_us);
        }
        if here {
            let forwarded = frames::forward(guest, &mut self.control);
            progress.lock().forwarded = forwarded.unwrap_or_default();
        }
        let mut status = progress.lock();
        match running {
            Ok(_) => {
                pause.end(&mut status);
                status.phase = match status.left_behind() {
                    Some(_) => Phase::Following,
                    None => Phase::Moved,
                };
            }
            // Its memory tells, or its disks.
            Err(_) if status.left_behind().is_some() => status.phase = Phase::Following,
            Err(error) => {
                status.error = Some(format!(
                    "the guest was handed over, but the destination does not say that it runs: {error}"
                ));
            }
        }
        if status.left_behind().is_none() {
            return;
        }
        drop(status);
        self.follow(how);
    }

    /// Keeps memory and disks until the destination has all of them.
    fn follow(&mut self, how: &How<'_>) {
        let status = how.progress.lock();
        let parts = [status.following, status.following_disks].map(|it| it.is_some());
        drop(status);
        let keeper = self.keeper.as_ref();
        let all = keeper.is_some_and(|it| it.completed(parts, ABSENCE));
        let mut status = how.progress.lock();
        if all {
            status.phase = Phase::Moved;
            return;
        }
        let parts = [
            (status.following, "memory"),
            (status.following_disks, "disks"),
        ];
        let left = parts.iter().filter_map(|(it, what)| {
            let left = it.map(|it| it.left).filter(|left| *left > 0)?;
            Some(format!("{left} bytes of its {what}"))
        });
        let left: Vec<_> = left.collect();
        status.error = Some(format!(
            "the guest was handed over, but the destination has gone away while {} were still here",
            left.join(" and ")
        ));
    }
}
