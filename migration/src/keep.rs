//! Who comes to the source once it has handed its guest over, or is about to: to
//! ask what became of it, or for the memory and the disks that follow it.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::PAGE;
use vm_memory::{Bytes, GuestAddress};

use crate::batch::Batch;
use crate::disk::Disks;
use crate::source::{How, is_readable};
use crate::squeeze::{Packer, Squeeze};
use crate::status::{Pace, Progress, micros};
use crate::wire::{self, Completed, FOLLOWS, Join, Kind, MEMORY, Want};

/// How long one looks for something to read before one looks for something else.
const LOOK: Duration = Duration::from_millis(50);
/// How long a destination may take to say the rest of what it has begun to say.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 30 });
/// Most streams at a time: no destination has as many.
const MOST: usize = 128;

/// Serves whoever comes, as long as it is held.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    ram: GuestRam,
    disks: Arc<Disks>,
    session: [u8; 16],
    pace: Arc<Pace>,
    squeeze: Arc<Squeeze>,
    progress: Arc<Progress>,
    /// From when on it is counted how long memory takes.
    began: Instant,
    over: AtomicBool,
    /// The destination has said that it has all memory.
    memory: AtomicBool,
    /// It has said that it has all of the disks.
    all_disks: AtomicBool,
    /// Streams that have been used for what follows, and are still there.
    streams: AtomicUsize,
    /// On which it was asked what became of the guest.
    asked: Mutex<Vec<UnixStream>>,
}

impl Keeper {
    /// Begins. `first` is there already.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn spawn(
        how: &How<'_>,
        first: Vec<UnixStream>,
        (ram, disks): (&GuestRam, Arc<Disks>),
        session: [u8; 16],
        began: Instant,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            ram: ram.clone(),
            disks,
            session,
            pace: Arc::clone(&how.pace),
            squeeze: Arc::clone(&how.squeeze),
            progress: Arc::clone(how.progress),
            began,
            over: AtomicBool::new(false),
            memory: AtomicBool::new(false),
            all_disks: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            asked: Mutex::default(),
        });
        let listener = how.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        let all = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("keep".to_owned())
            .spawn(move || all.accept(&listener, first))?;
        Ok(Self {
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// A stream on which it was asked what became of the guest.
    pub(crate) fn asked(&self, end: Instant) -> Option<UnixStream> {
        loop {
            let mut asked = self
                .shared
                .asked
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(stream) = asked.pop() {
                return Some(stream);
            }
            drop(asked);
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(LOOK.min(Duration::from_millis(5)));
        }
    }

    /// Waits until the destination has said that it has all memory, and all of the
    /// disks, as far as they follow: whether it did, before it was away for as long
    /// as `patience`.
    pub(crate) fn completed(&self, [memory, disks]: [bool; 2], patience: Duration) -> bool {
        let mut seen = Instant::now();
        let has = |all: &AtomicBool| all.load(Ordering::SeqCst);
        while memory && !has(&self.shared.memory) || disks && !has(&self.shared.all_disks) {
            if self.shared.streams.load(Ordering::SeqCst) > 0 {
                seen = Instant::now();
            } else if seen.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener, mut first: Vec<UnixStream>) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !self.is_over() {
            threads.retain(|thread| !thread.is_finished());
            let stream = match first.pop() {
                Some(stream) => stream,
                None if threads.len() >= MOST || !is_readable(listener, LOOK) => {
                    if threads.len() >= MOST {
                        std::thread::sleep(LOOK);
                    }
                    continue;
                }
                None => match listener.accept() {
                    Ok((stream, _)) => stream,
                    Err(_) => continue,
                },
            };
            let this = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name("keep".to_owned())
                .spawn(move || this.serve(stream));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%error, "a destination is not heard"),
            }
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Serves a stream until it ends.
    fn serve(&self, stream: UnixStream) {
        let mut joined = false;
        let served = self.serve_frames(stream, &mut joined);
        if joined {
            self.streams.fetch_sub(1, Ordering::SeqCst);
        }
        match served {
            Ok(()) | Err(wire::Error::Cut) => {}
            Err(error) => tracing::warn!(%error, "a stream for memory has ended"),
        }
    }

    fn serve_frames(&self, mut stream: UnixStream, joined: &mut bool) -> Result<(), wire::Error> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut payload = Vec::new();
        let mut answer = Answer::new(&self.squeeze);
        while !self.is_over() {
            if !is_readable(&stream, LOOK) {
                continue;
            }
            let kind = wire::receive(&mut stream, &mut payload)?;
            match kind {
                Kind::Ask if payload == self.session => {
                    let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
                    asked.push(stream);
                    return Ok(());
                }
                Kind::Join if !*joined => {
                    let join: Join = wire::decode(&payload)?;
                    if join.session != self.session || join.index != FOLLOWS {
                        return Err(wire::Error::Damaged("a stream of another session"));
                    }
                    *joined = true;
                    self.streams.fetch_add(1, Ordering::SeqCst);
                }
                Kind::Want | Kind::Need if *joined => {
                    let want = Want::from_bytes(&payload)?;
                    self.note(want.of != MEMORY, want.left, want.faults);
                    let urgent = kind == Kind::Need;
                    let answered = self.answer(&mut stream, want, urgent, &mut answer);
                    if let Err(wire::Error::Aborted(reason)) = &answered {
                        let _ = wire::send(&mut stream, Kind::Abort, reason.as_bytes());
                    }
                    answered?;
                }
                Kind::Complete if *joined => {
                    let completed: Completed = wire::decode(&payload)?;
                    self.note(completed.disks, 0, completed.faults);
                    let all = match completed.disks {
                        true => &self.all_disks,
                        false => &self.memory,
                    };
                    all.store(true, Ordering::SeqCst);
                    wire::send(&mut stream, Kind::Complete, &payload)?;
                }
                _ => return Err(wire::Error::Damaged("its parts are not in order")),
            }
        }
        Ok(())
    }

    fn note(&self, disks: bool, left: u64, faults: u64) {
        let mut status = self.progress.lock();
        status.packed = self.squeeze.packed();
        let following = match disks {
            true => &mut status.following_disks,
            false => &mut status.following,
        };
        if let Some(following) = following {
            following.left = left.min(following.left);
            following.faults = faults.max(following.faults);
            following.us = micros(self.began.elapsed());
        }
    }

    fn answer(
        &self,
        stream: &mut UnixStream,
        want: Want,
        urgent: bool,
        answer: &mut Answer<'_>,
    ) -> Result<(), wire::Error> {
        let Answer {
            batch,
            memory,
            packer,
            last,
        } = answer;
        // Who asks has asked for more than one: what it takes until the next one
        // comes, the link takes.
        let waited = last.map_or(Duration::ZERO, |last| last.elapsed());
        memory.resize(want.len as usize, 0);
        if want.of == MEMORY {
            self.ram
                .read_slice(memory, GuestAddress(want.at))
                .map_err(|_| wire::Error::Damaged("a wish is for what is no memory"))?;
        } else {
            self.read(want, memory)?;
        }
        match want.of {
            MEMORY if urgent => batch.pack(None, want.at, memory),
            MEMORY => packer.pack(want.at, memory, batch),
            disk => batch.pack(Some(disk), want.at, memory),
        }
        batch.add_zeros();
        batch.frames.begin();
        batch.frames.end(Kind::Sync);
        let bytes = batch.frames.bytes();
        let began = Instant::now();
        if urgent {
            self.pace.take(bytes.len());
        } else {
            self.pace.wait(bytes.len());
        }
        stream.write_all(bytes)?;
        self.progress.sent(bytes.len() as u64);
        if !urgent && want.of == MEMORY {
            packer.sent(bytes.len(), waited + began.elapsed());
            *last = Some(Instant::now());
        }
        batch.clear();
        Ok(())
    }

    /// Reads what is wanted of a disk.
    fn read(&self, want: Want, into: &mut [u8]) -> Result<(), wire::Error> {
        let disk = usize::try_from(want.of).ok();
        let disk = disk.and_then(|disk| self.disks.get(disk));
        let end = want.at.saturating_add(want.len);
        let fits = |capacity: u64| {
            end < capacity && want.len.is_multiple_of(PAGE as u64) || end == capacity
        };
        let disk = disk.filter(|disk| fits(disk.capacity()));
        let disk = disk.ok_or(wire::Error::Damaged("a wish is for what is on no disk"))?;
        disk.read(want.at, into)
            .map_err(|error| wire::Error::Aborted(format!("a disk cannot be read there: {error}")))
    }
}

/// What answers are made with.
struct Answer<'a> {
    batch: Batch,
    memory: Vec<u8>,
    packer: Packer<'a>,
    /// When one had been sent that nobody waits for.
    last: Option<Instant>,
}

impl<'a> Answer<'a> {
    fn new(squeeze: &'a Squeeze) -> Self {
        Self {
            batch: Batch::default(),
            memory: Vec::new(),
            packer: squeeze.packer(None),
            last: None,
        }
    }
}
