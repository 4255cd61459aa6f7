//! The thread that migrates.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use blanket_devices::worker::STACK;
use blanket_migration::{
    Destination, DestinationError, Disks, Lacking, Mode, Options, Phase, Progress, Source, Terms,
};
use tokio::sync::mpsc::UnboundedSender;

use super::guest::{Coming, Leaving, Tracked, order};
use super::{Frames, Order, What};
use crate::jail::Class;
use crate::machine::setup;
use crate::snapshot::pager::Pager;
use crate::vcpu::Brake;

/// How long a monitor whose guest has left can be asked how it went.
const LINGER: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Migrates, one guest at a time. Its thread is made before the process confines
/// itself, as it makes others.
pub struct Migrator {
    jobs: Sender<Job>,
    orders: UnboundedSender<Order>,
    progress: Arc<Progress>,
    /// Streams for who does not ask for a number: a confined thread cannot count
    /// the processors.
    streams: u32,
    /// The job at work has it, too.
    busy: Arc<()>,
    /// That job keeps a replica.
    replicating: bool,
}

/// What a guest leaves with.
pub(crate) struct Departure {
    /// Where its destination comes.
    pub(crate) listener: Arc<UnixListener>,
    /// See [`Terms::machine`].
    pub(crate) machine: Vec<u8>,
    /// What is handed over; open as long as the process lives.
    pub(crate) descriptors: Vec<RawFd>,
    /// What is copied with it.
    pub(crate) disks: Arc<Disks>,
    /// What comes for it when it has left.
    pub(crate) frames: Frames,
    /// What the guest can be slowed down with.
    pub(crate) brakes: Arc<[Brake]>,
    pub(crate) options: Options,
}

impl Migrator {
    /// Starts the thread. What it wants of the machine comes as `orders`.
    ///
    /// # Errors
    /// There is none to be had.
    pub(crate) fn spawn(orders: UnboundedSender<Order>) -> io::Result<Self> {
        let (jobs, work) = channel::<Job>();
        let confine = setup(Class::Migrate);
        std::thread::Builder::new()
            .name("migrate".to_owned())
            .stack_size(STACK)
            .spawn(move || match confine() {
                Ok(()) => work.into_iter().for_each(|job| job()),
                Err(error) => tracing::error!(%error, "no guest can be migrated"),
            })?;
        Ok(Self {
            jobs,
            orders,
            progress: Arc::default(),
            streams: Options::default().streams(),
            busy: Arc::default(),
            replicating: false,
        })
    }

    /// Whether it is at work.
    pub(crate) fn is_busy(&self) -> bool {
        Arc::strong_count(&self.busy) > 1
    }

    /// Whether it keeps a replica up to date.
    pub(crate) fn is_replicating(&self) -> bool {
        self.replicating && self.is_busy()
    }

    /// Bytes of memory and disks that have not followed the guest yet, from or to
    /// another monitor.
    pub(crate) fn following(&self) -> Option<u64> {
        let status = self.progress.status();
        let left = status.left_behind();
        let follows = status.phase == Phase::Following && self.is_busy();
        left.filter(|_| follows)
    }

    /// Whether disks follow the guest.
    pub(crate) fn awaits_disks(&self) -> bool {
        let status = self.progress.status();
        let follows = status.phase == Phase::Following && self.is_busy();
        follows && status.following_disks.is_some()
    }

    /// How far it is, or how the last one went.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Keeps a replica of the guest's disks up to date, for a destination that
    /// comes, until that is cancelled.
    pub(crate) fn replicate(&mut self, memory: Tracked, mut how: Departure, interval: Duration) {
        how.options.mode = Mode::PreCopy;
        if how.options.streams == 0 {
            how.options.streams = self.streams;
        }
        self.progress = Arc::default();
        self.replicating = true;
        let (progress, orders) = (Arc::clone(&self.progress), self.orders.clone());
        self.start(move || {
            let ended = meet(memory, &how, &progress, &orders).and_then(|(source, mut guest)| {
                let listener = &how.listener;
                source
                    .replicate(&mut guest, interval, &how.options, &progress, listener)
                    .map_err(|error| error.to_string())
            });
            if let Err(error) = ended {
                tracing::warn!(%error, "the replica is not kept up to date any more");
                progress.fail(error);
            }
        });
    }

    fn start(&self, job: impl FnOnce() + Send + 'static) {
        let busy = Arc::clone(&self.busy);
        // The thread ends with the process only.
        let _ = self.jobs.send(Box::new(move || {
            let _busy = busy;
            job();
        }));
    }

    /// Finds out how much there is to be moved, and how fast the guest writes.
    pub(crate) fn measure(&mut self, memory: Tracked, disks: Arc<Disks>) {
        self.progress = Arc::default();
        self.replicating = false;
        let (progress, orders) = (Arc::clone(&self.progress), self.orders.clone());
        self.start(move || {
            let mut guest = Leaving {
                memory,
                disks,
                frames: Frames::default(),
                orders,
                brakes: Arc::new([]),
                slowed: None,
            };
            if let Err(error) = blanket_migration::measure(&mut guest, &progress) {
                progress.fail(error.to_string());
            }
        });
    }

    /// Waits for a destination and has the guest move there.
    pub(crate) fn depart(&mut self, memory: Tracked, mut how: Departure) {
        if how.options.streams == 0 {
            how.options.streams = self.streams;
        }
        self.progress = Arc::default();
        self.replicating = false;
        let (progress, orders) = (Arc::clone(&self.progress), self.orders.clone());
        self.start(move || {
            let moved = depart(memory, &how, &progress, &orders);
            match moved {
                Ok(()) => {
                    std::thread::sleep(LINGER);
                    let _ = order(&orders, What::End);
                }
                Err(error) => {
                    tracing::warn!(%error, "the guest has not been migrated");
                    progress.fail(error);
                }
            }
        });
    }

    /// Receives a guest and has it run; else the process ends.
    pub(crate) fn arrive(
        &mut self,
        memory: Tracked,
        disks: Arc<Disks>,
        pager: Result<Arc<Pager>, String>,
        frames: Frames,
        source: Destination,
    ) {
        self.progress = Arc::default();
        let (progress, orders) = (Arc::clone(&self.progress), self.orders.clone());
        self.start(move || {
            let cleared = memory.clear();
            let machine = Coming {
                memory,
                disks,
                pager,
                frames,
                orders: orders.clone(),
            };
            let arrived = match cleared {
                Ok(()) => source.run(&machine, &progress),
                Err(error) => Err(DestinationError::Machine(error)),
            };
            match arrived {
                Ok(()) => {}
                Err(error @ DestinationError::Undecided) => tracing::warn!(%error),
                // The guest runs on with what there is: it gets errors.
                Err(DestinationError::Lost(lost)) if lost.owned && lost.what == Lacking::Disks => {
                    tracing::error!("{lost}");
                }
                Err(error) => {
                    let _ = order(&orders, What::Fail(error.to_string()));
                }
            }
        });
    }
}

fn depart(
    memory: Tracked,
    how: &Departure,
    progress: &Arc<Progress>,
    orders: &UnboundedSender<Order>,
) -> Result<(), String> {
    let (source, mut guest) = meet(memory, how, progress, orders)?;
    source
        .run(&mut guest, &how.options, progress, &how.listener)
        .map_err(|error| error.to_string())
}

/// Waits for the destination; what it meets.
fn meet(
    memory: Tracked,
    how: &Departure,
    progress: &Progress,
    orders: &UnboundedSender<Order>,
) -> Result<(Source, Leaving), String> {
    let terms = Terms {
        session: random()?,
        machine: how.machine.clone(),
        disks: how.disks.iter().map(|disk| disk.capacity()).collect(),
        descriptors: &how.descriptors,
    };
    let guest = Leaving {
        memory,
        disks: Arc::clone(&how.disks),
        frames: how.frames.clone(),
        orders: orders.clone(),
        brakes: Arc::clone(&how.brakes),
        slowed: None,
    };
    let ram = &guest.memory.ram;
    let met = Source::meet(&how.listener, terms, ram, &how.options, progress);
    let source = met.map_err(|error| error.to_string())?;
    Ok((source, guest))
}

fn random() -> Result<[u8; 16], String> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is ours, and as long as it says.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n == bytes.len() as isize {
        Ok(bytes)
    } else {
        Err(format!("no random numbers: {}", io::Error::last_os_error()))
    }
}
