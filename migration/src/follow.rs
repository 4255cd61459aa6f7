//! Memory and disks that follow their guest, at the end that has the guest.
//!
//! Whoever touches a page or a block that is not there yet waits; [`Remote::run`]
//! asks the source for that, beside the others that it asks for all the time, on
//! a stream of its own. What is asked for on a stream that ends is asked for again
//! on another one. Pages that come are put where nothing is yet, in one step
//! with letting those go on that wait for them; blocks, where neither the guest
//! has written meanwhile nor it does now.

mod blocks;
mod fetch;
mod pages;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use blanket_memory::dirty::Pages;
use blanket_memory::uffd::{Mode, Uffd};
use blanket_memory::{GuestRam, discard};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::disk::Disks;
use crate::status::Progress;
use blocks::Blocks;
use fetch::Fetch;
use pages::Memory;

/// Streams that are opened before they are needed: a monitor that has given up
/// its privileges may not connect any more. Nothing is sent on them until then,
/// so what carries them needs no way to the source before.
pub(crate) const SPARES: usize = 16;

/// What the report of a guest that has lost its memory begins with.
pub const MEMORY_LOST: &str = "the guest's memory is lost";

/// What the report of a guest whose disks have not all followed it begins with.
pub const DISKS_LOST: &str = "a part of the guest's disks is lost";

/// What follows a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its memory.
    Memory,
    /// Its disks' content.
    Disks,
}

/// Not all memory, or not all of the disks, has followed its guest.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}", self.text())]
pub struct Lost {
    /// What it is about.
    pub what: What,
    /// Whether the guest was this end's.
    pub owned: bool,
    /// Bytes.
    pub left: u64,
    /// Where the first of them are, in the guest's physical address space or on
    /// the disks.
    pub places: String,
    /// What the last try came to.
    pub reason: String,
}

impl Lost {
    fn text(&self) -> String {
        let Self {
            what,
            owned,
            left,
            places,
            reason,
        } = self;
        match (owned, what) {
            (true, What::Disks) => format!(
                "{DISKS_LOST}: {left} bytes had not come from the source of its migration when the way there was lost ({reason}): {places}; whatever needs them fails. What had not come is on the disks where the guest was: keep those, and do not start the VM anew on these"
            ),
            (true, What::Memory) => format!(
                "{MEMORY_LOST}: {left} bytes of it had not come from the source of its migration when the way there was lost ({reason}): {places}; it cannot go on, and its disks are as it left them"
            ),
            (false, _) => format!(
                "the migration failed before the guest was handed over: the way to what follows it was lost ({reason}); it is where it was"
            ),
        }
    }
}

/// Who has the guest whose memory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The source, which has not heard that this end is ready.
    Source,
    /// One of both.
    Either,
    /// This end.
    Here,
    /// The source: no memory is needed here.
    Nobody,
}

struct State {
    owner: Owner,
    over: Option<Result<(), Lost>>,
}

/// What the thread that migrates and the one that sees to memory share.
pub(crate) struct Follower {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
    pub(crate) progress: Arc<Progress>,
}

impl Follower {
    pub(crate) fn new(progress: &Arc<Progress>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                owner: Owner::Source,
                over: None,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            progress: Arc::clone(progress),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owner(&self) -> Owner {
        self.lock().owner
    }

    fn set(&self, owner: Owner) {
        self.lock().owner = owner;
        let _ = self.wake.write(1);
    }

    /// The source is about to hear that this end is ready: from now on the guest
    /// may be this end's, and it goes on to ask for its memory.
    pub(crate) fn ready(&self) -> Result<(), Lost> {
        let mut state = self.lock();
        state.owner = Owner::Either;
        state.over.clone().unwrap_or(Ok(()))
    }

    /// The guest is this end's.
    pub(crate) fn own(&self) {
        self.set(Owner::Here);
    }

    /// The guest does not come: who waits for memory finds zeros.
    pub(crate) fn abandon(&self) {
        self.set(Owner::Nobody);
    }

    fn end(&self, how: Result<(), Lost>) {
        self.lock().over = Some(how);
        self.changed.notify_all();
    }

    /// Waits until all memory is here, or none comes any more.
    pub(crate) fn wait(&self) -> Result<(), Lost> {
        let mut state = self.lock();
        loop {
            if let Some(over) = &state.over {
                return over.clone();
            }
            let woken = self.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The way to what a guest has left at its source.
pub(crate) struct Way {
    pub(crate) what: What,
    pub(crate) path: PathBuf,
    pub(crate) session: [u8; 16],
    pub(crate) spares: Vec<UnixStream>,
    pub(crate) follower: Arc<Follower>,
}

/// The memory that a guest has left at its source.
pub struct Remote {
    pub(crate) way: Way,
    pub(crate) missing: Pages,
}

impl Remote {
    /// Sees to it that whoever touches memory that is missing waits; what was
    /// there of it goes. Nobody has references into guest memory.
    ///
    /// # Errors
    /// The kernel refuses, for this kind of memory or at all.
    pub fn arm(&self, uffd: &Uffd, ram: &GuestRam) -> io::Result<()> {
        for region in ram.iter() {
            uffd.register(region.as_ptr() as u64, region.len(), Mode::Missing)?;
        }
        for (at, len) in self.missing.runs(ram, usize::MAX) {
            discard(ram, at, len)?;
        }
        Ok(())
    }

    /// Brings all memory that is missing, first what somebody waits for. To be
    /// called once it is [armed](Remote::arm), on a thread that touches no guest
    /// memory and that nobody waits for. It returns when all is there, or the
    /// guest does not come.
    ///
    /// # Errors
    /// There is no way to the source any more: whoever waits for memory would
    /// wait for ever.
    pub fn run(self, uffd: &Uffd, ram: &GuestRam) -> Result<(), Lost> {
        let follower = Arc::clone(&self.way.follower);
        let mut fetch = Fetch::new(self.way, Memory::new(self.missing, uffd, ram));
        let brought = fetch.run();
        follower.end(brought.clone());
        brought
    }
}

/// Begins to bring what has not come of `disks`, on a thread of its own, until all
/// of it is there, or the guest does not come, or there is no way to the source.
pub(crate) fn bring_disks(way: Way, disks: &Disks) -> io::Result<()> {
    let blocks = Blocks::new(disks)?;
    let thread = std::thread::Builder::new().name("disks".to_owned());
    thread.spawn(move || {
        let follower = Arc::clone(&way.follower);
        let mut fetch = Fetch::new(way, blocks);
        let brought = fetch.run();
        // What never comes is told before anybody hears of it.
        drop(fetch);
        follower.end(brought);
    })?;
    Ok(())
}
