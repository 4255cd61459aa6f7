//! A vCPU: a thread that runs guest code until somebody wants it to stop.
//!
//! ```text
//!            resume()                 exit that ends the guest
//!   paused ───────────▶ running ──────────────────────────┐
//!     ▲ ▲                  │                               │
//!     │ └──── pause() ─────┘                               ▼
//!     └──────────────────────── (the machine decides) ◀─ paused
//!   any ── drop ──▶ ended
//! ```
//!
//! A signal takes the vCPU out of the guest. It is blocked except while
//! `KVM_RUN` waits (`KVM_SET_SIGNAL_MASK`), so that one that comes early is not
//! lost but ends the next `KVM_RUN` at once.

mod brake;
mod bus;
pub mod exits;
mod nested;
mod signal;
pub mod state;

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use blanket_devices::worker::{STACK, ThreadSetup};
use blanket_drivers::rings::Rings;
use brake::Shoe;
use kvm_ioctls::VcpuFd;

pub use brake::Brake;
pub use bus::{Bus, OnBus};
pub use exits::Counters;
pub use signal::{KICK_SYSCALLS, kick_signal, wait_for_kick};

/// What a machine does with a vCPU, on the vCPU's own thread.
pub trait Processor: Send {
    /// Runs the guest to its next exit and answers that.
    fn step(&mut self, fd: &mut VcpuFd, counters: &Counters) -> Outcome;

    /// The vCPU stops: brings its registers to where another can go on from.
    fn stop(&mut self, fd: &mut VcpuFd);
}

/// What becomes of the vCPU after an access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs on.
    Continue,
    /// Its dirty ring is full: there has to be room before it runs on.
    RingFull,
    /// It waits: the machine has something to do.
    Event(Event),
}

/// What a guest does to its whole machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset, or ended in a triple fault.
    Reset,
    /// It has suspended itself: it goes on when the machine does, here or
    /// elsewhere.
    Suspended,
    /// There is no room on the node for what it writes to a disk: its write
    /// waits.
    DiskFull,
    /// The vCPU cannot go on; the message says why.
    Failed(String),
}

/// Takes events to whoever runs the machine.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

const PAUSED: u8 = 0;
const RUNNING: u8 = 1;
const ENDED: u8 = 2;

/// What the thread shares with its owner.
#[derive(Default)]
struct Control {
    /// What the owner wants.
    wanted: AtomicU8,
    /// Percent of the time that it is to sleep.
    slowed: AtomicU8,
    /// The thread, as long as it is there.
    thread: Mutex<Option<libc::pthread_t>>,
    /// Whether the thread rests (it does not touch the vCPU then).
    resting: Mutex<bool>,
    changed: Condvar,
    counters: Counters,
}

impl Control {
    fn resting(&self) -> MutexGuard<'_, bool> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread can be kicked from now on, until the guard goes.
    fn enter_thread(&self) -> Entered<'_> {
        // SAFETY: the call has no conditions.
        *self.thread() = Some(unsafe { libc::pthread_self() });
        Entered(self)
    }

    /// Takes the vCPU out of the guest, or out of its sleep.
    fn kick(&self) {
        if let Some(thread) = *self.thread() {
            // SAFETY: the thread is there: it takes its handle away before it
            // ends, for which it needs the lock. The signal has a handler.
            unsafe {
                libc::pthread_kill(thread, kick_signal());
            }
        }
    }

    fn want(&self, what: u8) {
        let _guard = self.resting();
        self.wanted.store(what, Ordering::Release);
        self.changed.notify_all();
    }

    /// Rests until there is something to do; false when the vCPU is to end.
    fn rest(&self) -> bool {
        let mut resting = self.resting();
        *resting = true;
        self.changed.notify_all();
        while self.wanted.load(Ordering::Acquire) == PAUSED {
            resting = self
                .changed
                .wait(resting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *resting = false;
        self.wanted.load(Ordering::Acquire) == RUNNING
    }
}

/// A thread that can be kicked.
struct Entered<'a>(&'a Control);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.0.thread() = None;
    }
}

/// A vCPU and its thread.
pub struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread, at rest. `setup` runs on it first. `rings` are those of
    /// its VM, if it has some.
    ///
    /// # Errors
    /// No thread, or `setup` failed.
    pub fn spawn(
        index: u8,
        fd: VcpuFd,
        processor: Box<dyn Processor>,
        events: EventSink,
        setup: ThreadSetup,
        rings: Option<Arc<Rings>>,
    ) -> io::Result<Self> {
        signal::install_handler()?;
        signal::unblock_in_guest(&fd)?;
        let fd = Arc::new(Mutex::new(fd));
        let control = Arc::new(Control::default());
        let (report, outcome) = std::sync::mpsc::sync_channel(1);
        let mut runner = Runner {
            fd: fd.clone(),
            control: control.clone(),
            processor,
            events,
            rings,
            shoe: Shoe::default(),
        };
        let entered = Arc::clone(&control);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || {
                let _here = entered.enter_thread();
                let ready = signal::block().and_then(|()| setup());
                let ok = ready.is_ok();
                // The spawner waits for this; if it is gone, so is the machine.
                let _ = report.send(ready);
                if ok {
                    runner.run();
                }
            })?;
        outcome
            .recv()
            .map_err(|_| io::Error::other("vCPU thread died at its start"))??;
        Ok(Self {
            fd,
            control,
            thread: Some(thread),
        })
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.control.want(RUNNING);
    }

    /// Asks the vCPU to stop; [`Vcpu::wait_paused`] waits for it. (Two steps,
    /// so that many stop at once.)
    pub fn pause(&self) {
        self.control.want(PAUSED);
        self.control.kick();
    }

    /// Waits until the vCPU rests.
    pub fn wait_paused(&self) {
        let mut resting = self.control.resting();
        while !*resting {
            resting = self
                .control
                .changed
                .wait(resting)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The vCPU itself, for whoever has paused it.
    pub fn paused_fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its exits so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.control.counters
    }

    /// What slows it down.
    #[must_use]
    pub fn brake(&self) -> Brake {
        Brake::new(&self.control)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.control.want(ENDED);
        self.control.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread works with.
struct Runner {
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    processor: Box<dyn Processor>,
    events: EventSink,
    rings: Option<Arc<Rings>>,
    shoe: Shoe,
}

impl Runner {
    fn run(&mut self) {
        while self.control.rest() {
            let event = self.run_guest();
            if let Some(event) = event {
                // The machine pauses everything; until then this one rests.
                let _ = self.control.wanted.compare_exchange(
                    RUNNING,
                    PAUSED,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                (self.events)(event);
            }
        }
    }

    /// Runs the guest until the owner or an event wants it to stop.
    fn run_guest(&mut self) -> Option<Event> {
        let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        let mut event = None;
        while event.is_none() && self.control.wanted.load(Ordering::Acquire) == RUNNING {
            let outcome = self.processor.step(&mut fd, &self.control.counters);
            event = match outcome {
                Outcome::Continue => None,
                Outcome::RingFull => self.make_room().err(),
                Outcome::Event(what) => Some(what),
            };
            if event.is_none() {
                self.shoe.rest(&self.control);
            }
        }
        self.processor.stop(&mut fd);
        event
    }

    /// Makes room in the dirty rings.
    fn make_room(&self) -> Result<(), Event> {
        self.control.counters.ring_full.add();
        let room = match &self.rings {
            Some(rings) => rings.make_room(),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        room.map_err(|error| Event::Failed(format!("its dirty ring stays full: {error}")))
    }
}

/// The kick came: takes it away and goes on.
pub(crate) fn interrupted(counters: &Counters) -> Outcome {
    counters.kicks.add();
    signal::consume();
    Outcome::Continue
}

/// Lets KVM finish an access whose answer has been given, without running the
/// guest: the registers are not complete before.
pub(crate) fn complete_access(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(1);
    // It returns EINTR by design.
    let _ = fd.run();
    fd.set_kvm_immediate_exit(0);
}
