//! The thread that moves frames: it owns the switch and its ports, and runs
//! each frame from where it came in to where it goes out.
//!
//! While there is work it polls the ports that have some; when there is none
//! it polls those that cost no system call a little longer, then asks all for
//! notifications, looks for them a little longer still if that has paid lately
//! ([`Patience`]), and sleeps. A switch that nothing goes through uses no CPU,
//! however many ports it has.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Switch;
use crate::frame::PortId;
use crate::jail;

/// Something to do with the switch, by its own thread; none: to end.
type Order = Option<Box<dyn FnOnce(&mut Switch) + Send>>;

/// Rounds over the active ports between two looks at the others, and at
/// orders.
const ROUNDS: u32 = 8;

/// The token of the orders' descriptor; ports have their numbers, which are
/// less.
const ORDERS: u64 = u64::MAX;

/// The token of the uplinks' descriptors.
const UPLINK: u64 = u64::MAX - 1;

/// How often what time asks for is done at least while there is work.
const BUSY_TICK: Duration = Duration::from_millis(10);

/// The longest sleep: clocks of the tables are in seconds.
const NAP: Duration = Duration::from_secs(1);

/// How the other threads reach the switch. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
}

/// The switch's thread has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the switch has stopped")]
pub struct Stopped;

impl Handle {
    /// Has the switch's thread do something, between two bursts of frames, and
    /// waits for what comes of it.
    ///
    /// # Errors
    ///
    /// The thread has ended.
    pub async fn with<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Switch) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        let (tell, told) = oneshot::channel();
        self.tell(move |switch| {
            // Nobody waits any more: it is done all the same.
            let _ = tell.send(act(switch));
        })?;
        told.await.map_err(|_| Stopped)
    }

    /// Has the switch's thread do something, and does not wait for it.
    ///
    /// # Errors
    ///
    /// The thread has ended.
    pub fn tell(&self, act: impl FnOnce(&mut Switch) + Send + 'static) -> Result<(), Stopped> {
        self.send(Some(Box::new(act)))
    }

    /// Ends the switch's thread, whoever else has a handle. It may have ended.
    pub fn stop(&self) {
        let _ = self.send(None);
    }

    fn send(&self, order: Order) -> Result<(), Stopped> {
        self.orders.send(order).map_err(|_| Stopped)?;
        // The counter is far from its end: it is read whenever it is not 0.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// See the module.
pub struct Worker {
    switch: Switch,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    /// What epoll knows, by token.
    watched: BTreeSet<(u64, RawFd)>,
    /// Ports that may have frames.
    active: Vec<Active>,
    spin: Duration,
    patience: Patience,
    /// There were frames since it looked for some the last time.
    worked: bool,
}

/// Whether to look for what comes next before sleeping: to be woken takes
/// longer than to see, but to look takes time of whoever else could run. It
/// pays where an answer comes soon after each question.
#[derive(Default)]
struct Patience {
    /// How often nothing has come, since something has.
    misses: u32,
}

impl Patience {
    /// So often in a row it is tried again all the same...
    const MISSES: u32 = 4;
    /// ... and then only each time of so many.
    const RARELY: u32 = 32;

    fn pays(&self) -> bool {
        self.misses < Self::MISSES || self.misses.is_multiple_of(Self::RARELY)
    }

    fn learn(&mut self, came: bool) {
        self.misses = if came {
            0
        } else {
            self.misses.wrapping_add(1).max(1)
        };
    }

    /// It was not even tried.
    fn skip(&mut self) {
        self.learn(false);
    }
}

/// A port that is polled.
struct Active {
    token: u64,
    /// When it last had something.
    busy: Instant,
}

impl Worker {
    /// Starts the thread with an empty switch. `spin` is how long ports that
    /// can be polled cheaply are polled after their last frame.
    ///
    /// # Errors
    ///
    /// The node is out of descriptors or threads.
    pub fn start(
        switch: Switch,
        spin: Duration,
    ) -> io::Result<(Handle, JoinHandle<io::Result<()>>)> {
        let (sender, orders) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, ORDERS);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let mut worker = Self {
            switch,
            orders,
            wake: Arc::clone(&wake),
            epoll,
            watched: BTreeSet::new(),
            active: Vec::new(),
            spin,
            patience: Patience::default(),
            worked: false,
        };
        let thread = std::thread::Builder::new().name("switch".to_owned());
        let thread = thread.spawn(move || {
            jail::enter(jail::Class::Worker)?;
            worker.run()
        })?;
        let handle = Handle {
            orders: sender,
            wake,
        };
        Ok((handle, thread))
    }

    /// Runs until it is stopped, or the last handle is gone.
    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let mut due = Instant::now();
        loop {
            if !self.obey()? {
                return Ok(());
            }
            for _ in 0..ROUNDS {
                if !self.round()? {
                    break;
                }
            }
            let now = Instant::now();
            if self.active.is_empty() || now >= due {
                due = self.switch.tick(now).unwrap_or(now + NAP);
                if !self.active.is_empty() {
                    due = due.min(now + BUSY_TICK);
                }
            }
            let timeout = if self.active.is_empty() {
                let nap = due.saturating_duration_since(now).min(NAP);
                // Rounded up: not to wake before there is something to do.
                i32::try_from(nap.as_millis() + 1).unwrap_or(i32::MAX)
            } else {
                0
            };
            let mut count = 0;
            if self.active.is_empty() {
                count = self.look(now, due, &mut events)?;
            }
            if count == 0 {
                count = self.wait(timeout, &mut events)?;
            }
            for event in &events[..count] {
                self.wake_up(event.data());
            }
        }
    }

    /// Looks for a notification for a moment, if it pays; how many there are.
    fn look(&mut self, now: Instant, due: Instant, events: &mut [EpollEvent]) -> io::Result<usize> {
        if !self.worked || self.spin.is_zero() {
            return Ok(0);
        }
        self.worked = false;
        if !self.patience.pays() {
            self.patience.skip();
            return Ok(0);
        }
        let end = due.min(now + self.spin);
        loop {
            let count = self.wait(0, events)?;
            if count > 0 || Instant::now() >= end {
                self.patience.learn(count > 0);
                return Ok(count);
            }
            std::hint::spin_loop();
        }
    }

    fn wait(&mut self, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
        match self.epoll.wait(timeout, events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            waited => waited,
        }
    }

    /// Carries orders out; false: there will be no more.
    fn obey(&mut self) -> io::Result<bool> {
        let mut changed = false;
        loop {
            match self.orders.try_recv() {
                Ok(Some(order)) => {
                    order(&mut self.switch);
                    changed = true;
                }
                Err(TryRecvError::Empty) => break,
                Ok(None) | Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
        if changed {
            self.watch()?;
        }
        Ok(true)
    }

    /// Has epoll know of all ports, and of no others.
    fn watch(&mut self) -> io::Result<()> {
        let token = |id: PortId| u64::from(id.0);
        let ports = self
            .switch
            .wakers()
            .map(|(id, fd)| (token(id), fd.as_raw_fd()));
        let uplinks = self.switch.uplink_wakers();
        let uplinks = uplinks.map(|fd| (UPLINK, fd.as_raw_fd()));
        let wanted: BTreeSet<_> = ports.chain(uplinks).collect();
        let watched = std::mem::replace(&mut self.watched, wanted.clone());
        for (_, fd) in watched.difference(&wanted) {
            // It may be closed already, with its port: epoll has forgotten it.
            let event = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, *fd, event);
        }
        for (token, fd) in wanted.difference(&watched) {
            let event = EpollEvent::new(EventSet::IN, *token);
            self.epoll.ctl(ControlOperation::Add, *fd, event)?;
            self.wake_up(*token);
        }
        Ok(())
    }

    fn wake_up(&mut self, token: u64) {
        if token == ORDERS {
            let _ = self.wake.read();
            return;
        }
        let busy = Instant::now();
        match self.active.iter_mut().find(|active| active.token == token) {
            Some(active) => active.busy = busy,
            None => {
                self.switch.disarm(Self::port(token));
                self.active.push(Active { token, busy });
            }
        }
    }

    /// None: it is the uplinks'.
    fn port(token: u64) -> Option<PortId> {
        u32::try_from(token).ok().map(PortId)
    }

    /// Gives every active port its turn; whether one had something.
    fn round(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        self.switch.set_now(now);
        let mut worked = false;
        let mut index = 0;
        while let Some(active) = self.active.get_mut(index) {
            let port = Self::port(active.token);
            if self.switch.service(port) > 0 {
                active.busy = now;
                worked = true;
            } else if !self.switch.polls_cheaply(port)
                || now.duration_since(active.busy) > self.spin
            {
                if self.switch.arm(port) {
                    self.active.swap_remove(index);
                    continue;
                }
                active.busy = now;
                worked = true;
            }
            index += 1;
        }
        self.worked |= worked;
        self.switch.flush();
        Ok(worked || !self.active.is_empty())
    }
}

/// What wakes a port's worker.
pub(super) type Waker<'a> = (PortId, BorrowedFd<'a>);
