//! What is missing is asked for, and put where it belongs.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Lost, Owner, Way};
use crate::source::is_readable;
use crate::status::{Following, Status, micros};
use crate::wire::{self, Completed, FOLLOWS, Join, Kind, Want};

/// Streams in use at a time: the first for what somebody waits for.
const STREAMS: usize = 4;
/// If so many spares are left, one stream has to do.
const FEW: usize = 8;
/// Bytes that are on their way on each stream.
const WINDOW: u64 = 512 << 10;
/// How long the source may take to say the rest of what it has begun to say.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// How long there may be no stream to the source.
const ABSENCE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 180 });
/// How long the source may take to hear that all is here.
const FAREWELL: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });

/// What is asked for at once: memory, or a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece {
    /// [`wire::MEMORY`], or a disk's number.
    pub(super) of: u64,
    pub(super) at: u64,
    pub(super) len: u64,
}

/// What is missing.
pub(super) trait Missing {
    /// Where it is told how far it is.
    fn status<'a>(&self, status: &'a mut Status) -> &'a mut Option<Following>;

    /// What is readable when somebody begins to wait.
    fn touched(&self) -> RawFd;

    /// What somebody has begun to wait for.
    fn take_touched(&mut self) -> io::Result<Vec<Piece>>;

    /// Takes the next from what has not been asked for.
    fn next(&mut self) -> Option<Piece>;

    /// It has to be asked for again, as far as it is missing.
    fn again(&mut self, piece: Piece);

    /// Whether something of it is missing.
    ///
    /// # Errors
    /// There is no such place.
    fn lacks(&self, piece: Piece) -> Result<bool, wire::Error>;

    /// Takes a frame of it.
    fn place(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Stop>;

    /// Bytes that are missing.
    fn left(&self) -> u64;

    /// Where the first of them are.
    fn places(&self) -> String;

    /// All of it is there and durable; or not needed.
    fn release(&mut self) -> io::Result<()>;
}

/// A stream to the source.
struct Stream {
    stream: UnixStream,
    /// What it was asked for and has not brought, in this order.
    asked: VecDeque<Piece>,
    bytes: u64,
    /// It has brought something.
    proven: bool,
}

/// Why it does not go on as it should.
pub(super) enum Stop {
    /// This stream has ended.
    Stream(wire::Error),
    /// The kernel or a disk here does not do what it should.
    Kernel(io::Error),
}

impl From<wire::Error> for Stop {
    fn from(error: wire::Error) -> Self {
        Self::Stream(error)
    }
}

pub(super) struct Fetch<M> {
    way: Way,
    missing: M,
    /// What somebody waits for.
    waits: BTreeSet<Piece>,
    faults: u64,
    streams: Vec<Stream>,
    /// Streams in a row that have brought nothing.
    fruitless: u32,
    retry: Instant,
    /// When there was a stream last that brought something.
    seen: Instant,
    reason: String,
    payload: Vec<u8>,
}

impl<M: Missing> Fetch<M> {
    pub(super) fn new(way: Way, missing: M) -> Self {
        let now = Instant::now();
        Self {
            way,
            missing,
            waits: BTreeSet::new(),
            faults: 0,
            streams: Vec::new(),
            fruitless: 0,
            retry: now,
            seen: now,
            reason: "no connection has come about".to_owned(),
            payload: Vec::new(),
        }
    }

    pub(super) fn run(&mut self) -> Result<(), Lost> {
        let began = Instant::now();
        loop {
            match self.way.follower.owner() {
                Owner::Nobody => {
                    let released = self.missing.release();
                    return released.map_err(|error| self.lost(&error));
                }
                Owner::Here if self.missing.left() == 0 => break,
                Owner::Here | Owner::Either | Owner::Source => {}
            }
            if let Err(error) = self.step() {
                return Err(self.lost(&error));
            }
            let mut status = self.way.follower.progress.lock();
            if let Some(following) = self.missing.status(&mut status) {
                following.left = self.missing.left();
                following.faults = self.faults;
                following.us = micros(began.elapsed());
            }
        }
        let released = self.missing.release();
        released.map_err(|error| self.lost(&error))?;
        self.say_complete();
        Ok(())
    }

    fn lost(&self, error: &io::Error) -> Lost {
        Lost {
            what: self.way.what,
            owned: self.way.follower.owner() == Owner::Here,
            left: self.missing.left(),
            places: self.missing.places(),
            reason: error.to_string(),
        }
    }

    /// Takes what has come, asks for more, and waits for what is next. An error
    /// is the end.
    fn step(&mut self) -> io::Result<()> {
        self.take_touched()?;
        self.open_streams()?;
        self.ask_on()?;
        let ready = self.wait()?;
        // From the last one on, as streams that end are removed.
        for index in ready.into_iter().rev() {
            match self.take_frame(index) {
                Ok(()) => {}
                Err(Stop::Kernel(error)) => return Err(error),
                // What is there cannot be read.
                Err(Stop::Stream(error @ wire::Error::Aborted(_))) => {
                    return Err(io::Error::other(error));
                }
                Err(Stop::Stream(error)) => self.drop_stream(index, &error),
            }
        }
        Ok(())
    }

    /// Asks for what somebody has begun to wait for.
    fn take_touched(&mut self) -> io::Result<()> {
        for piece in self.missing.take_touched()? {
            if self.waits.insert(piece) {
                self.faults += 1;
                self.need(piece);
            }
        }
        Ok(())
    }

    /// Asks for what somebody waits for, if there is a stream.
    fn need(&mut self, piece: Piece) {
        if !self.streams.is_empty() {
            self.ask(0, Kind::Need, piece);
        }
    }

    fn ask(&mut self, index: usize, kind: Kind, piece: Piece) {
        let Piece { of, at, len } = piece;
        let want = Want {
            of,
            at,
            len,
            left: self.missing.left(),
            faults: self.faults,
        };
        let stream = &mut self.streams[index];
        // If it cannot be sent, that is seen when the stream is read.
        let _ = wire::send(&mut stream.stream, kind, &want.to_bytes());
        stream.asked.push_back(piece);
        stream.bytes += len;
    }

    /// Asks for more of what nobody waits for.
    fn ask_on(&mut self) -> io::Result<()> {
        if self.way.follower.owner() != Owner::Here {
            return Ok(());
        }
        // The first one is for what somebody waits for, if there is another.
        let from = usize::from(self.streams.len() > 1);
        for index in from..self.streams.len() {
            while self.streams[index].bytes < WINDOW {
                let Some(piece) = self.missing.next() else {
                    return Ok(());
                };
                self.ask(index, Kind::Want, piece);
                self.take_touched()?;
            }
        }
        Ok(())
    }

    /// Waits for faults, answers, orders, or the time for another try: the streams
    /// on which something has come.
    fn wait(&mut self) -> io::Result<Vec<usize>> {
        let entry = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let wake = &self.way.follower.wake;
        let mut fds = vec![entry(self.missing.touched()), entry(wake.as_raw_fd())];
        fds.extend(self.streams.iter().map(|it| entry(it.stream.as_raw_fd())));
        let timeout = match self.streams.is_empty() {
            true => self.retry.saturating_duration_since(Instant::now()),
            false => Duration::from_secs(1),
        };
        let timeout = timeout.as_millis() as libc::c_int + 1;
        // SAFETY: the array has as many elements as is said.
        let done = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if done < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(Vec::new()),
                _ => Err(error),
            };
        }
        if fds[1].revents != 0 {
            let _ = wake.read();
        }
        let streams = fds.iter().skip(2).enumerate();
        Ok(streams
            .filter_map(|(index, fd)| (fd.revents != 0).then_some(index))
            .collect())
    }

    /// Takes one frame that has come on a stream.
    fn take_frame(&mut self, index: usize) -> Result<(), Stop> {
        let mut payload = std::mem::take(&mut self.payload);
        let received = wire::receive(&mut self.streams[index].stream, &mut payload);
        let taken = match received {
            Ok(kind) => self.take(index, kind, &payload),
            Err(error) => Err(error.into()),
        };
        self.payload = payload;
        taken
    }

    fn take(&mut self, index: usize, kind: Kind, payload: &[u8]) -> Result<(), Stop> {
        let damaged = |what| Stop::Stream(wire::Error::Damaged(what));
        if kind != Kind::Sync {
            return self.missing.place(kind, payload);
        }
        let stream = &mut self.streams[index];
        let piece = stream
            .asked
            .pop_front()
            .ok_or(damaged("an answer to no question"))?;
        stream.bytes -= piece.len;
        stream.proven = true;
        self.fruitless = 0;
        if self.missing.lacks(piece)? {
            // It is asked for again.
            self.missing.again(piece);
            return Err(damaged("an answer without what was asked for"));
        }
        let missing = &self.missing;
        self.waits
            .retain(|piece| missing.lacks(*piece).unwrap_or(false));
        Ok(())
    }

    /// A stream has ended: what it was to bring is asked for anew.
    fn drop_stream(&mut self, index: usize, error: &wire::Error) {
        let gone = self.streams.remove(index);
        tracing::warn!(%error, left = self.missing.left(), "a stream for what follows the guest has ended");
        self.reason = error.to_string();
        if gone.proven {
            self.seen = Instant::now();
        } else {
            self.fruitless += 1;
            let pause = Duration::from_millis(100 << self.fruitless.min(6));
            self.retry = Instant::now() + pause.min(PATIENCE);
        }
        for piece in gone.asked {
            self.missing.again(piece);
        }
        self.need_all();
    }

    /// Asks anew for everything that somebody waits for.
    fn need_all(&mut self) {
        let waits: Vec<Piece> = self.waits.iter().copied().collect();
        for piece in waits {
            self.need(piece);
        }
    }

    /// Opens streams if there are too few. An error is the end.
    fn open_streams(&mut self) -> io::Result<()> {
        while self.streams.len() < STREAMS && Instant::now() >= self.retry {
            let first = self.streams.is_empty();
            if !first && (self.fruitless > 0 || self.way.spares.len() <= FEW) {
                break;
            }
            match self.open() {
                Ok(stream) => {
                    self.streams.push(stream);
                    if first {
                        self.need_all();
                    }
                }
                // One has to do.
                Err(_) if !first => break,
                Err(error) => {
                    self.retry = Instant::now() + Duration::from_millis(200);
                    let never = matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied
                            | io::ErrorKind::NotFound
                            | io::ErrorKind::ConnectionRefused
                    );
                    let away = self.seen.elapsed() > ABSENCE;
                    // It is told what became of the guest.
                    if (never || away) && self.way.follower.owner() != Owner::Either {
                        let reason = format!("{}; another one: {error}", self.reason);
                        return Err(io::Error::other(reason));
                    }
                    break;
                }
            }
        }
        if self.streams.is_empty()
            && self.seen.elapsed() > ABSENCE
            && self.way.follower.owner() != Owner::Either
        {
            return Err(io::Error::other(self.reason.clone()));
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<Stream> {
        // Nothing comes on one that was not used, unless the source is gone.
        let mut spares = std::iter::from_fn(|| self.way.spares.pop());
        let spare = spares.find(|spare| !is_readable(spare, Duration::ZERO));
        let mut stream = match spare {
            Some(spare) => spare,
            None => UnixStream::connect(&self.way.path)?,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let join = Join {
            session: self.way.session,
            index: FOLLOWS,
        };
        // If it cannot be sent, that is seen when the stream is read.
        let _ = wire::send_value(&mut stream, Kind::Join, &join);
        Ok(Stream {
            stream,
            asked: VecDeque::new(),
            bytes: 0,
            proven: false,
        })
    }

    /// Tells the source that it can go, as long as it takes within reason.
    fn say_complete(&mut self) {
        let end = Instant::now() + FAREWELL;
        let completed = Completed {
            disks: !matches!(self.way.what, super::What::Memory),
            faults: self.faults,
        };
        while Instant::now() < end {
            let Some(stream) = self.streams.last_mut() else {
                match self.open() {
                    Ok(stream) => self.streams.push(stream),
                    Err(_) => std::thread::sleep(Duration::from_millis(200)),
                }
                continue;
            };
            let sent = wire::send_value(&mut stream.stream, Kind::Complete, &completed);
            let heard = sent.and_then(|()| {
                loop {
                    match wire::receive(&mut stream.stream, &mut self.payload)? {
                        Kind::Complete => return Ok(()),
                        // What was asked for twice.
                        Kind::Pages | Kind::Lz4 | Kind::Zeros => {}
                        Kind::Blocks | Kind::Holes | Kind::Sync => {}
                        _ => return Err(wire::Error::Damaged("its parts are not in order")),
                    }
                }
            });
            match heard {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%error, "the source does not hear that all is here");
                    self.streams.pop();
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
}
