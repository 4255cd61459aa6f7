//! A device model whose handlers run on the caller's thread: no transport, no
//! worker, every run of an input the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_devices::lifecycle::SavedState;
use blanket_devices::virtio::{
    Activation, Device, Interrupt, QueueHandler, TRANSPORT_FEATURES, VirtQueue,
};
use blanket_memory::GuestRam;
use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{self, BUFFERS, Buffer, RAM, Rings, STRIDE, Session, Setup, Step};

/// Turns of the event loop in a row: a device that writes into its own rings
/// can have work without end.
const TURNS: usize = 16;
/// How long a well-behaved driver waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// `VIRTIO_F_RING_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
}

struct Running(Box<dyn QueueHandler>);

impl MutEventSubscriber for Running {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.0.process(events, ops);
    }
    fn init(&mut self, ops: &mut EventOps) {
        self.0.init(ops);
    }
}

/// A device, its guest and the loop that serves it.
pub struct Bench<'a> {
    device: &'a mut dyn Device,
    ram: GuestRam,
    features: u64,
    rings: Vec<Rings>,
    kicks: Vec<EventFd>,
    manager: EventManager<Running>,
    running: Vec<SubscriberId>,
}

impl<'a> Bench<'a> {
    /// A device that nobody has set up.
    ///
    /// # Panics
    /// There are no descriptors.
    #[must_use]
    pub fn new(device: &'a mut dyn Device) -> Self {
        let kicks = device.queue_sizes().iter();
        Self {
            kicks: kicks
                .map(|_| EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
                .collect(),
            device,
            ram: guest::ram(),
            features: 0,
            rings: Vec::new(),
            manager: EventManager::new().expect("an epoll"),
            running: Vec::new(),
        }
    }

    /// Lets a guest do what it likes; `peer` is the world outside. The device
    /// is reset at the end.
    pub fn run(&mut self, session: &Session, mut peer: impl FnMut(&[u8])) {
        let setups = &session.queues;
        self.set_up(session.features, |i| {
            let setup = setups.get(i).or(setups.last());
            setup.copied().unwrap_or_default()
        });
        for step in &session.steps {
            match step {
                Step::Peer(bytes) => peer(bytes),
                step => self.step(step),
            }
        }
        self.park_and_reset();
    }

    /// A new driver, which behaves.
    pub fn behave(&mut self, features: u64) {
        self.ram = guest::ram();
        self.set_up(features, |_| Setup {
            size: 4,
            ..Setup::default()
        });
    }

    fn set_up(&mut self, features: u64, setup: impl Fn(usize) -> Setup) {
        self.features = features & (self.device.features() | TRANSPORT_FEATURES);
        let event_idx = self.features & EVENT_IDX != 0;
        let mut queues = Vec::new();
        self.rings.clear();
        for (i, most) in self.device.queue_sizes().iter().enumerate() {
            let setup = setup(i);
            let rings = Rings::new(i, *most, setup);
            rings.begin(&self.ram);
            self.rings.push(rings);
            if !setup.absent
                && let Some(queue) = rings.queue(&self.ram, *most, event_idx)
            {
                queues.push((i, queue));
            }
        }
        self.activate(queues);
    }

    fn activate(&mut self, queues: Vec<(usize, Queue)>) {
        let interrupt: Arc<dyn Interrupt> = Arc::new(Nobody);
        let queues = queues
            .into_iter()
            .map(|(i, queue)| {
                let kick = self.kicks[i].try_clone().expect("an eventfd");
                let interrupt = Arc::clone(&interrupt);
                VirtQueue::new(i as u16, queue, kick, self.ram.clone(), interrupt)
            })
            .collect();
        let activation = Activation {
            ram: self.ram.clone(),
            features: self.features,
            queues,
            interrupt,
        };
        // A device may refuse what the driver chose.
        for handler in self.device.activate(activation).unwrap_or_default() {
            let id = self.manager.add_subscriber(Running(handler));
            if let Ok(running) = self.manager.subscriber_mut(id) {
                running.0.kick();
            }
            self.running.push(id);
        }
    }

    fn park(&mut self) -> Vec<Box<dyn QueueHandler>> {
        let mut parked = Vec::new();
        for id in self.running.drain(..) {
            if let Ok(running) = self.manager.subscriber_mut(id) {
                running.0.quiesce();
            }
            parked.extend(self.manager.remove_subscriber(id).map(|running| running.0));
        }
        parked
    }

    fn park_and_reset(&mut self) {
        let parked = self.park();
        self.device.reset(parked);
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }

    /// Pause, save, restore and resume, as the transport does them.
    fn carry_over(&mut self) {
        let parked = self.park();
        let states: Vec<(usize, QueueState)> = parked
            .iter()
            .flat_map(|handler| handler.queues())
            .map(|queue| (queue.index.into(), queue.queue.state()))
            .collect();
        let saved: SavedState = self.device.save(&parked).expect("a state to save");
        self.device.reset(parked);
        self.device.restore(&saved).expect("its own state");
        let queues = states.into_iter().map(|(i, state)| {
            let queue = Queue::try_from(state).expect("a queue's own state");
            (i, queue)
        });
        self.activate(queues.collect());
    }

    fn step(&mut self, step: &Step) {
        let ram = &self.ram;
        let count = self.rings.len();
        let rings = |queue: u8| usize::from(queue) % count;
        match step {
            Step::Request {
                queue,
                indirect,
                buffers,
            } => self.request(rings(*queue), buffers, *indirect),
            Step::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let at = self.rings[rings(*queue)].descriptor_at((*index).into());
                // Three in four lie in memory.
                let address = match address >> 30 {
                    3 => u64::from(*address) << 32,
                    _ => u64::from(*address) % RAM,
                };
                let rest = (u16::from(*flags), u16::from(*next));
                Rings::descriptor(ram, at, (address, *len, rest.0, rest.1));
            }
            Step::Available { queue, value } => {
                self.rings[rings(*queue)].announce(ram, *value);
            }
            Step::Memory { at, bytes } => Rings::write(ram, u64::from(*at) * 4, bytes),
            Step::Kick(queue) => {
                self.kick(rings(*queue));
                self.turn();
            }
            Step::Turn => self.turn(),
            Step::Config { offset, bytes } => {
                let offset = usize::from(*offset);
                if offset + bytes.len() <= self.device.config().len() {
                    self.device.write_config(offset, bytes);
                    self.device.write_config(offset, &bytes[..1]);
                }
            }
            Step::Peer(_) => {}
            Step::Move => self.carry_over(),
            Step::Reset => {
                self.park_and_reset();
                self.set_up(self.features, |_| Setup::default());
            }
        }
    }

    fn request(&mut self, queue: usize, buffers: &[Buffer], indirect: bool) {
        let ram = &self.ram;
        let chain: Vec<_> = buffers
            .iter()
            .map(|buffer| {
                let at = BUFFERS + u64::from(buffer.at) * 8 % (RAM - BUFFERS);
                Rings::write(ram, at, &buffer.bytes);
                let len = usize::from(buffer.len).max(buffer.bytes.len());
                (at, len as u32, buffer.writable)
            })
            .collect();
        self.rings[queue].offer(ram, &chain, indirect);
    }

    fn kick(&self, queue: usize) {
        // A full eventfd is a kick as well.
        let _ = self.kicks[queue].write(1);
    }

    fn turn(&mut self) {
        for _ in 0..TURNS {
            if self.manager.run_with_timeout(0).unwrap_or(0) == 0 {
                break;
            }
        }
    }

    /// One request of a driver that behaves: what the device reads, and how
    /// many bytes it may write. How many it says it wrote, and all of them.
    ///
    /// # Panics
    /// There is no answer.
    pub fn ask(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> (u32, Vec<u8>) {
        let place = self.post(queue, readable, writable);
        self.answer(queue, place)
    }

    /// The first half of [`Bench::ask`]; where the second will look: address
    /// and length.
    pub fn post(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> (u64, u32) {
        let mut at = BUFFERS + queue as u64 * STRIDE;
        let mut chain = Vec::new();
        for bytes in readable {
            Rings::write(&self.ram, at, bytes);
            chain.push((at, bytes.len() as u32, false));
            at += bytes.len() as u64;
        }
        let place = (at, writable.iter().sum());
        for len in writable {
            chain.push((at, *len, true));
            at += u64::from(*len);
        }
        self.rings[queue].offer(&self.ram, &chain, false);
        self.kick(queue);
        place
    }

    /// The second half: waits until the queue's last request has its answer.
    ///
    /// # Panics
    /// It does not come.
    pub fn answer(&mut self, queue: usize, (at, len): (u64, u32)) -> (u32, Vec<u8>) {
        let rings = self.rings[queue];
        let deadline = Instant::now() + PATIENCE;
        while rings.used_index(&self.ram) != rings.next() {
            assert!(Instant::now() < deadline, "no answer to a good request");
            let _ = self.manager.run_with_timeout(10);
        }
        let mut bytes = vec![0; len as usize];
        self.ram
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("a buffer in memory");
        (rings.last_used_len(&self.ram), bytes)
    }

    /// Ends the good driver's time.
    pub fn finish(&mut self) {
        self.park_and_reset();
    }
}
