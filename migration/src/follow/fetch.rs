//! What is missing is asked for, and put where it belongs.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use blanket_memory::uffd::Uffd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Lost, Owner, Remote};
use crate::source::is_readable;
use crate::squeeze;
use crate::status::micros;
use crate::wire::{self, Completed, FOLLOWS, Join, Kind, Want};

/// Streams in use at a time: the first for memory that somebody waits for.
const STREAMS: usize = 4;
/// If so many spares are left, one stream has to do.
const FEW: usize = 8;
/// Bytes that are asked for at once.
const PIECE: usize = 64 << 10;
/// Bytes that are on their way on each stream.
const WINDOW: u64 = 512 << 10;
/// How long the source may take to say the rest of what it has begun to say.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// How long there may be no stream to the source.
const ABSENCE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 180 });
/// How long the source may take to hear that all memory is here.
const FAREWELL: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });
/// Runs of pages that a report names.
const NAMED: usize = 4;

/// A stream to the source.
struct Stream {
    stream: UnixStream,
    /// What it was asked for and has not brought, in this order.
    asked: VecDeque<(u64, u64)>,
    bytes: u64,
    /// It has brought something.
    proven: bool,
}

/// A region of memory.
struct Region {
    start: u64,
    len: u64,
    host: u64,
}

/// Why it does not go on as it should.
enum Stop {
    /// This stream has ended.
    Stream(wire::Error),
    /// The kernel does not do what it should.
    Kernel(io::Error),
}

impl From<wire::Error> for Stop {
    fn from(error: wire::Error) -> Self {
        Self::Stream(error)
    }
}

pub(super) struct Fetch<'a> {
    remote: Remote,
    uffd: &'a Uffd,
    ram: &'a GuestRam,
    regions: Vec<Region>,
    missing: Pages,
    /// Those that are missing and have not been asked for.
    rest: Pages,
    /// How many are missing.
    left: u64,
    /// Where somebody waits.
    waits: BTreeSet<u64>,
    faults: u64,
    /// Where it is gone on with: region and page.
    next: (usize, usize),
    streams: Vec<Stream>,
    /// Streams in a row that have brought nothing.
    fruitless: u32,
    retry: Instant,
    /// When there was a stream last that brought something.
    seen: Instant,
    reason: String,
    payload: Vec<u8>,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(mut remote: Remote, uffd: &'a Uffd, ram: &'a GuestRam) -> Self {
        let missing = std::mem::replace(&mut remote.missing, Pages::none(ram));
        let now = Instant::now();
        let region = |it: &vm_memory::GuestRegionMmap<_>| Region {
            start: it.start_addr().0,
            len: it.len(),
            host: it.as_ptr() as u64,
        };
        Self {
            remote,
            uffd,
            ram,
            regions: ram.iter().map(region).collect(),
            rest: missing.clone(),
            left: missing.count(),
            missing,
            waits: BTreeSet::new(),
            faults: 0,
            next: (0, 0),
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
            match self.remote.follower.owner() {
                Owner::Nobody => {
                    let released = self.release();
                    return released.map_err(|error| self.lost(&error));
                }
                Owner::Here if self.left == 0 => break,
                Owner::Here | Owner::Either | Owner::Source => {}
            }
            if let Err(error) = self.step() {
                return Err(self.lost(&error));
            }
            let mut status = self.remote.follower.progress.lock();
            if let Some(following) = &mut status.following {
                following.left = self.left * PAGE as u64;
                following.faults = self.faults;
                following.us = micros(began.elapsed());
            }
        }
        let released = self.release();
        released.map_err(|error| self.lost(&error))?;
        self.say_complete();
        Ok(())
    }

    /// Nothing is missing any more; or is not needed.
    fn release(&self) -> io::Result<()> {
        for region in &self.regions {
            self.uffd.unregister(region.host, region.len)?;
        }
        Ok(())
    }

    fn lost(&self, error: &io::Error) -> Lost {
        let runs = self.missing.runs(self.ram, usize::MAX);
        let named = runs.iter().take(NAMED);
        let named: Vec<_> = named
            .map(|(at, len)| format!("{:#x}-{:#x}", at.0, at.0 + *len as u64 - 1))
            .collect();
        let more = runs.len().saturating_sub(NAMED);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more ranges"),
        };
        Lost {
            owned: self.remote.follower.owner() == Owner::Here,
            left: self.left * PAGE as u64,
            places: named.join(", ") + &more,
            reason: error.to_string(),
        }
    }

    /// Takes what has come, asks for more, and waits for what is next. An error
    /// is the end.
    fn step(&mut self) -> io::Result<()> {
        self.take_faults()?;
        self.open_streams()?;
        self.ask_on()?;
        let ready = self.wait()?;
        // From the last one on, as streams that end are removed.
        for index in ready.into_iter().rev() {
            match self.take_frame(index) {
                Ok(()) => {}
                Err(Stop::Kernel(error)) => return Err(error),
                Err(Stop::Stream(error)) => self.drop_stream(index, &error),
            }
        }
        Ok(())
    }

    /// Takes the faults that wait.
    fn take_faults(&mut self) -> io::Result<()> {
        while let Some(fault) = self.uffd.fault()? {
            let host = fault.address & !(PAGE as u64 - 1);
            let region = self
                .regions
                .iter()
                .position(|it| (it.host..it.host + it.len).contains(&host));
            let Some(region) = region else {
                return Err(io::Error::other("a fault where no guest memory is"));
            };
            let offset = host - self.regions[region].host;
            let page = offset as usize / PAGE;
            if !self.missing.contains(region, page) {
                // Nothing was there, or it has come meanwhile.
                self.uffd.fill_zeros(host, PAGE)?;
                continue;
            }
            let at = self.regions[region].start + offset;
            if self.waits.insert(at) {
                self.faults += 1;
                // What is beside it may well be next.
                self.next = (region, page + 1);
                self.need(at);
            }
        }
        Ok(())
    }

    /// Asks for a page that somebody waits for, if there is a stream.
    fn need(&mut self, at: u64) {
        if !self.streams.is_empty() {
            self.ask(0, Kind::Need, at, PAGE as u64);
        }
    }

    fn ask(&mut self, index: usize, kind: Kind, at: u64, len: u64) {
        let want = Want {
            at,
            len,
            left: self.left * PAGE as u64,
            faults: self.faults,
        };
        let stream = &mut self.streams[index];
        // If it cannot be sent, that is seen when the stream is read.
        let _ = wire::send(&mut stream.stream, kind, &want.to_bytes());
        stream.asked.push_back((at, len));
        stream.bytes += len;
    }

    /// Asks for more of what nobody waits for.
    fn ask_on(&mut self) -> io::Result<()> {
        if self.remote.follower.owner() != Owner::Here {
            return Ok(());
        }
        // The first one is for what somebody waits for, if there is another.
        let from = usize::from(self.streams.len() > 1);
        for index in from..self.streams.len() {
            while self.streams[index].bytes < WINDOW {
                let Some((at, len)) = self.next_rest() else {
                    return Ok(());
                };
                self.ask(index, Kind::Want, at, len);
                self.take_faults()?;
            }
        }
        Ok(())
    }

    /// Takes the next pages from those that have not been asked for.
    fn next_rest(&mut self) -> Option<(u64, u64)> {
        let count = self.regions.len();
        // Once around, and the start of the region where it began.
        for _ in 0..=count {
            let (region, page) = self.next;
            if let Some((start, pages)) = self.rest.next_run(region, page, PIECE / PAGE) {
                self.next.1 = start + pages;
                (start..start + pages).for_each(|page| self.rest.remove(region, page));
                let at = self.regions.get(region)?.start + (start * PAGE) as u64;
                return Some((at, (pages * PAGE) as u64));
            }
            self.next = ((region + 1) % count.max(1), 0);
        }
        None
    }

    /// Waits for faults, answers, orders, or the time for another try: the streams
    /// on which something has come.
    fn wait(&mut self) -> io::Result<Vec<usize>> {
        let entry = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let wake = &self.remote.follower.wake;
        let mut fds = vec![
            entry(self.uffd.as_fd().as_raw_fd()),
            entry(wake.as_raw_fd()),
        ];
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
        match kind {
            Kind::Pages => {
                let (at, bytes) = payload
                    .split_first_chunk()
                    .ok_or(damaged("memory without a place"))?;
                self.place(u64::from_le_bytes(*at), bytes.len() as u64, Some(bytes))
            }
            Kind::Lz4 => {
                let (at, bytes) = squeeze::unpack(payload)?;
                self.place(at, bytes.len() as u64, Some(&bytes))
            }
            Kind::Zeros => {
                let (ranges, rest) = payload.as_chunks::<16>();
                if !rest.is_empty() {
                    return Err(damaged("a part of a range"));
                }
                for range in ranges {
                    let number = |bytes: &[u8]| {
                        let chunk = bytes.first_chunk().copied().unwrap_or_default();
                        u64::from_le_bytes(chunk)
                    };
                    self.place(number(&range[..8]), number(&range[8..]), None)?;
                }
                Ok(())
            }
            Kind::Sync => {
                let stream = &mut self.streams[index];
                let (at, len) = stream
                    .asked
                    .pop_front()
                    .ok_or(damaged("an answer to no question"))?;
                stream.bytes -= len;
                stream.proven = true;
                self.fruitless = 0;
                let (region, page) = self
                    .locate(at, len)
                    .ok_or(damaged("memory at another place"))?;
                let pages = page..page + len as usize / PAGE;
                if pages
                    .clone()
                    .any(|page| self.missing.contains(region, page))
                {
                    // They are asked for again.
                    add_missing(&mut self.rest, &self.missing, region, pages);
                    return Err(damaged("an answer without what was asked for"));
                }
                Ok(())
            }
            _ => Err(damaged("its parts are not in order")),
        }
    }

    /// The region and the first page of whole pages in one region.
    fn locate(&self, at: u64, len: u64) -> Option<(usize, usize)> {
        let end = at.checked_add(len)?;
        let holds = |it: &Region| it.start <= at && end <= it.start + it.len;
        let region = self.regions.iter().position(holds)?;
        let whole = len > 0 && (at | len).is_multiple_of(PAGE as u64);
        let page = (at - self.regions[region].start) as usize / PAGE;
        whole.then_some((region, page))
    }

    /// Puts pages where they are missing; `None` for zeros. Those that are there
    /// are the guest's own by now.
    fn place(&mut self, at: u64, len: u64, bytes: Option<&[u8]>) -> Result<(), Stop> {
        let place = self.locate(at, len);
        let (region, first) = place.ok_or(Stop::Stream(wire::Error::Damaged(
            "memory at another place",
        )))?;
        let end = first + len as usize / PAGE;
        let mut page = first;
        while let Some((start, count)) = self
            .missing
            .next_run(region, page, end.saturating_sub(page))
            .filter(|(start, _)| *start < end)
        {
            let count = count.min(end - start);
            let host = self.regions[region].host + (start * PAGE) as u64;
            let filled = match bytes {
                Some(bytes) => {
                    let from = (start - first) * PAGE;
                    self.uffd.fill(host, &bytes[from..from + count * PAGE])
                }
                None => self.uffd.fill_zeros(host, count * PAGE),
            };
            filled.map_err(Stop::Kernel)?;
            for page in start..start + count {
                self.missing.remove(region, page);
                self.rest.remove(region, page);
                let address = self.regions[region].start + (page * PAGE) as u64;
                self.waits.remove(&address);
            }
            self.left -= count as u64;
            page = start + count;
            if page >= end {
                break;
            }
        }
        Ok(())
    }

    /// A stream has ended: what it was to bring is asked for anew.
    fn drop_stream(&mut self, index: usize, error: &wire::Error) {
        let gone = self.streams.remove(index);
        tracing::warn!(%error, left = self.left, "a stream for memory has ended");
        self.reason = error.to_string();
        if gone.proven {
            self.seen = Instant::now();
        } else {
            self.fruitless += 1;
            let pause = Duration::from_millis(100 << self.fruitless.min(6));
            self.retry = Instant::now() + pause.min(PATIENCE);
        }
        for (at, len) in gone.asked {
            if let Some((region, page)) = self.locate(at, len) {
                let pages = page..page + len as usize / PAGE;
                add_missing(&mut self.rest, &self.missing, region, pages);
            }
        }
        self.need_all();
    }

    /// Asks anew for everything that somebody waits for.
    fn need_all(&mut self) {
        let waits: Vec<u64> = self.waits.iter().copied().collect();
        for at in waits {
            self.need(at);
        }
    }

    /// Opens streams if there are too few. An error is the end.
    fn open_streams(&mut self) -> io::Result<()> {
        while self.streams.len() < STREAMS && Instant::now() >= self.retry {
            let first = self.streams.is_empty();
            if !first && (self.fruitless > 0 || self.remote.spares.len() <= FEW) {
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
                    if (never || away) && self.remote.follower.owner() != Owner::Either {
                        let reason = format!("{}; another one: {error}", self.reason);
                        return Err(io::Error::other(reason));
                    }
                    break;
                }
            }
        }
        if self.streams.is_empty()
            && self.seen.elapsed() > ABSENCE
            && self.remote.follower.owner() != Owner::Either
        {
            return Err(io::Error::other(self.reason.clone()));
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<Stream> {
        // Nothing comes on one that was not used, unless the source is gone.
        let mut spares = std::iter::from_fn(|| self.remote.spares.pop());
        let spare = spares.find(|spare| !is_readable(spare, Duration::ZERO));
        let mut stream = match spare {
            Some(spare) => spare,
            None => UnixStream::connect(&self.remote.path)?,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let join = Join {
            session: self.remote.session,
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
                        Kind::Pages | Kind::Lz4 | Kind::Zeros | Kind::Sync => {}
                        _ => return Err(wire::Error::Damaged("its parts are not in order")),
                    }
                }
            });
            match heard {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%error, "the source does not hear that all memory is here");
                    self.streams.pop();
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
}

/// Adds those of `pages` to `rest` that are `missing`.
fn add_missing(rest: &mut Pages, missing: &Pages, region: usize, pages: std::ops::Range<usize>) {
    for page in pages.filter(|page| missing.contains(region, *page)) {
        rest.insert(region, page);
    }
}
