//! The thread that moves guest memory while the guest runs: into the machine
//! when it is needed, from a snapshot ([lazy]) or from where the guest was
//! ([`Remote`]), and out of it before it is changed ([live]).
//!
//! All work with userfaultfd: whoever touches a page (a vCPU, KVM, a device)
//! waits until this thread has dealt with it. So the thread touches no guest
//! memory itself but to read what is there, and waits for no other thread.

mod lazy;
mod live;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};

use blanket_devices::worker::{STACK, ThreadSetup};
use blanket_memory::GuestRam;
use blanket_memory::uffd::Uffd;
use blanket_migration::Remote;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Geometry, Reader, Regions, Touched};

pub use lazy::WorkingSet;
pub use live::Live;

/// The system calls of the thread, beside every thread's.
pub const SYSCALLS: &[libc::c_long] = &[
    libc::SYS_connect,
    libc::SYS_fstat,
    libc::SYS_poll,
    libc::SYS_pread64,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_statx,
];

/// What the thread is asked for. Each is answered.
enum Job {
    /// Let memory come from a file when it is needed.
    Restore(Arc<Reader>, WorkingSet, SyncSender<io::Result<()>>),
    /// Have all of it come now.
    Complete(SyncSender<io::Result<()>>),
    /// Let memory come from where its guest was.
    Follow(Box<Remote>, SyncSender<io::Result<()>>),
    /// Hold all of it as it is now, and send it.
    Save(Box<live::Order>, SyncSender<io::Result<()>>),
}

/// The thread, seen by its owner.
pub struct Pager {
    jobs: Sender<Job>,
    wake: EventFd,
    protects: bool,
}

impl Pager {
    /// Starts it for a machine's memory, which is private to this process and
    /// in ordinary pages. The thread runs `setup` first.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn spawn(uffd: Uffd, ram: &GuestRam, setup: ThreadSetup) -> io::Result<Self> {
        let geometry = Geometry::new(&Regions::of(ram)).map_err(io::Error::other)?;
        let (jobs, receiver) = channel();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let protects = uffd.protects();
        let thread = Thread {
            uffd,
            ram: ram.clone(),
            geometry,
            jobs: receiver,
            wake: wake.try_clone()?,
        };
        let (ready, started) = sync_channel(1);
        std::thread::Builder::new()
            .name("pager".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let confined = setup();
                let run = confined.is_ok();
                // The owner waits for it.
                let _ = ready.send(confined);
                if run {
                    thread.run();
                }
            })?;
        started.recv().map_err(io::Error::other)??;
        Ok(Self {
            jobs,
            wake,
            protects,
        })
    }

    /// Whether memory can be saved while the guest runs.
    #[must_use]
    pub fn protects(&self) -> bool {
        self.protects
    }

    fn ask(&self, job: impl FnOnce(SyncSender<io::Result<()>>) -> Job) -> io::Result<()> {
        let (answer, answered) = sync_channel(1);
        let gone = || io::Error::other("the pager has ended");
        self.jobs.send(job(answer)).map_err(|_| gone())?;
        self.wake.write(1)?;
        answered.recv().map_err(|_| gone())?
    }

    /// From now on memory has what `reader` has, which is read when somebody
    /// touches it. What was in it goes.
    ///
    /// Memory that turns out to be damaged ends the process: the guest cannot
    /// go on, not even to its end.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn restore(&self, reader: Arc<Reader>, set: WorkingSet) -> io::Result<()> {
        self.ask(|answer| Job::Restore(reader, set, answer))
    }

    /// From now on memory that is missing comes from `remote`, first what
    /// somebody waits for. Memory that can never come ends the process, as
    /// [`Pager::restore`] does.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn follow(&self, remote: Remote) -> io::Result<()> {
        self.ask(|answer| Job::Follow(Box::new(remote), answer))
    }

    /// Reads what has not been needed yet, for as long as that takes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn complete(&self) -> io::Result<()> {
        self.ask(Job::Complete)
    }

    /// Holds the memory of a machine at rest as it is now, and begins to send
    /// it; the machine may go on then. `start` is sent before.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn save(&self, start: Vec<u8>, touched: Touched) -> io::Result<Live> {
        let (order, live) = live::order(start, touched);
        self.ask(|answer| Job::Save(Box::new(order), answer))?;
        Ok(live)
    }
}

/// The thread itself.
struct Thread {
    uffd: Uffd,
    ram: GuestRam,
    geometry: Geometry,
    jobs: Receiver<Job>,
    wake: EventFd,
}

impl Thread {
    fn run(self) {
        while let Ok(job) = self.jobs.recv() {
            let _ = self.wake.read();
            match job {
                Job::Restore(reader, set, answer) => self.lazy(&reader, set, &answer),
                // All is there.
                Job::Complete(answer) => drop(answer.send(Ok(()))),
                Job::Follow(remote, answer) => self.follow(*remote, &answer),
                Job::Save(order, answer) => self.live(*order, &answer),
            }
        }
    }

    /// Lets memory come from where its guest was, until all of it is there.
    fn follow(&self, remote: Remote, answer: &SyncSender<io::Result<()>>) {
        let armed = remote.arm(&self.uffd, &self.ram);
        let run = armed.is_ok();
        // The owner waits for it.
        let _ = answer.send(armed);
        if run {
            remote
                .run(&self.uffd, &self.ram)
                .unwrap_or_else(|error| give_up(&error));
        }
    }

    /// Where a guest-physical range is in this process; it lies in one region.
    fn host(&self, address: u64) -> Option<u64> {
        let region = self.ram.find_region(vm_memory::GuestAddress(address))?;
        Some(region.as_ptr() as u64 + (address - region.start_addr().0))
    }

    /// The chunk that has the memory at `host`, an address of this process.
    fn chunk_at(&self, host: u64) -> Option<u64> {
        let region = self.ram.iter().find(|region| {
            let start = region.as_ptr() as u64;
            (start..start + region.len()).contains(&host)
        })?;
        let offset = host - region.as_ptr() as u64;
        Some(self.geometry.chunk(region.start_addr().0 + offset)?.0)
    }

    /// Waits for a fault or a job; so many milliseconds at most, or for ever.
    fn wait(&self, timeout: i32) -> io::Result<()> {
        let mut fds =
            [self.uffd.as_fd().as_raw_fd(), self.wake.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
        // SAFETY: the array has as many elements as is said.
        let done = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, timeout) };
        if done < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// The next job, if there is one: an error if the owner is gone.
    fn job(&self) -> Result<Option<Job>, ()> {
        match self.jobs.try_recv() {
            Ok(job) => {
                let _ = self.wake.read();
                Ok(Some(job))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(()),
        }
    }
}

/// The guest cannot go on, and whoever waits for its memory waits for ever: its
/// vCPUs cannot be stopped in good order.
fn give_up(error: &dyn std::fmt::Display) -> ! {
    eprintln!("blanket-vmm: {error}");
    // SAFETY: ends the process; nothing is expected afterwards.
    unsafe { libc::_exit(1) }
}

#[cfg(test)]
mod tests;
