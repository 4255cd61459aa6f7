//! Who comes to the source once it has handed its guest over, or is about to: to
//! ask what became of it, or for the memory that follows it.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::batch::Batch;
use crate::source::{How, is_readable};
use crate::squeeze::{Packer, Squeeze};
use crate::status::{Pace, Progress, micros};
use crate::wire::{self, Completed, FOLLOWS, Join, Kind, Want};

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
    session: [u8; 16],
    pace: Arc<Pace>,
    squeeze: Arc<Squeeze>,
    progress: Arc<Progress>,
    /// From when on it is counted how long memory takes.
    began: Instant,
    over: AtomicBool,
    /// The destination has said that it has all memory.
    complete: AtomicBool,
    /// Streams that have been used for memory, and are still there.
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
        ram: &GuestRam,
        session: [u8; 16],
        began: Instant,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            ram: ram.clone(),
            session,
            pace: Arc::clone(&how.pace),
            squeeze: Arc::clone(&how.squeeze),
            progress: Arc::clone(how.progress),
            began,
            over: AtomicBool::new(false),
            complete: AtomicBool::new(false),
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

    /// Waits until the destination has said that it has all memory: whether it
    /// did, before it was away for as long as `patience`.
    pub(crate) fn completed(&self, patience: Duration) -> bool {
        let mut seen = Instant::now();
        while !self.shared.complete.load(Ordering::SeqCst) {
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
                    self.note(want.left, want.faults);
                    self.answer(&mut stream, want, kind == Kind::Need, &mut answer)?;
                }
                Kind::Complete if *joined => {
                    let completed: Completed = wire::decode(&payload)?;
                    self.note(0, completed.faults);
                    self.complete.store(true, Ordering::SeqCst);
                    wire::send(&mut stream, Kind::Complete, &payload)?;
                }
                _ => return Err(wire::Error::Damaged("its parts are not in order")),
            }
        }
        Ok(())
    }

    fn note(&self, left: u64, faults: u64) {
        let mut status = self.progress.lock();
        status.packed = self.squeeze.packed();
        if let Some(following) = &mut status.following {
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
        self.ram
            .read_slice(memory, GuestAddress(want.at))
            .map_err(|_| wire::Error::Damaged("a wish is for what is no memory"))?;
        if urgent {
            batch.pack(None, want.at, memory);
        } else {
            packer.pack(want.at, memory, batch);
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
        if !urgent {
            packer.sent(bytes.len(), waited + began.elapsed());
            *last = Some(Instant::now());
        }
        batch.clear();
        Ok(())
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
