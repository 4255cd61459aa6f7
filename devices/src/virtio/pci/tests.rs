use std::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;

use super::*;
use crate::lifecycle::Lifecycle;
use crate::pci::{Function, MsiMessage, Wiring};
use crate::virtio::queue::{Buffers, watch};
use crate::virtio::testing::{Driver, ram, until};
use crate::worker::Worker;
use vm_memory::{Bytes, GuestAddress};

/// A device that answers each request with its own bytes.
struct Echo {
    sizes: Vec<u16>,
    features: u64,
    /// The last byte of its configuration space, which drivers may write.
    scratch: u8,
}

struct EchoHandler {
    queues: Vec<VirtQueue>,
    buffers: Buffers,
}

impl Device for Echo {
    fn kind(&self) -> u16 {
        4
    }
    fn name(&self) -> &str {
        "echo0"
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, self.scratch]
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (3, [value]) = (offset, data) {
            self.scratch = *value;
        }
    }
    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        Ok(vec![Box::new(EchoHandler {
            queues: activation.queues,
            buffers: Buffers::default(),
        })])
    }
    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        drop(handlers);
        self.scratch = 4;
    }
}

impl EchoHandler {
    fn serve(&mut self) {
        for queue in &mut self.queues {
            queue.take_kick();
            while let Some(head) = queue.pop(&mut self.buffers) {
                let mut bytes = [0; 16];
                let n = blanket_memory::iovec::read_bytes(&self.buffers.readable, &mut bytes);
                let n = blanket_memory::iovec::write_bytes(&self.buffers.writable, &bytes[..n]);
                queue.push(head, n as u32);
            }
            queue.enable_kicks();
            queue.notify();
        }
    }
}

impl MutEventSubscriber for EchoHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in &self.queues {
            watch(ops, &queue.kick, 0).unwrap();
        }
    }
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.serve();
    }
}

impl Handler for EchoHandler {
    fn kick(&mut self) {
        self.serve();
    }
}

impl QueueHandler for EchoHandler {
    fn queues(&self) -> &[VirtQueue] {
        &self.queues
    }
}

/// Hands out interrupts and keeps the other end of each.
#[derive(Default)]
struct Machine {
    interrupts: Mutex<Vec<EventFd>>,
    doorbells: Mutex<Vec<u64>>,
}

impl Wiring for Machine {
    fn add_interrupt(&self) -> io::Result<(u32, EventFd)> {
        let event = EventFd::new(libc::EFD_NONBLOCK)?;
        let mut interrupts = self.interrupts.lock().unwrap();
        interrupts.push(event.try_clone()?);
        Ok((interrupts.len() as u32 - 1, event))
    }
    fn route(&self, _: u32, _: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
    fn add_doorbell(&self, addr: u64, _: &EventFd) {
        self.doorbells.lock().unwrap().push(addr);
    }
    fn remove_doorbell(&self, addr: u64, _: &EventFd) {
        self.doorbells.lock().unwrap().retain(|a| *a != addr);
    }
}

fn transport(ram: &GuestRam) -> (VirtioPci, Arc<Machine>) {
    transport_of(ram, 16, 1)
}

/// With a queue of so many entries and these features.
fn transport_of(ram: &GuestRam, size: u16, features: u64) -> (VirtioPci, Arc<Machine>) {
    let machine = Arc::new(Machine::default());
    let worker = Worker::spawn("test", Box::new(|| Ok(()))).unwrap();
    let context = Context {
        ram: ram.clone(),
        wiring: machine.clone(),
        workers: vec![worker].into(),
        bar: 0xc000_0000,
        first_worker: 0,
    };
    let device = Box::new(Echo {
        sizes: vec![size],
        features,
        scratch: 4,
    });
    (VirtioPci::new(device, context).unwrap(), machine)
}

fn write(device: &mut VirtioPci, offset: u64, value: u64, len: usize) {
    device.write_bar(offset, &value.to_le_bytes()[..len]);
}

fn read(device: &mut VirtioPci, offset: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    device.read_bar(offset, &mut bytes[..len]);
    u64::from_le_bytes(bytes)
}

/// Goes through the driver's handshake with a queue whose rings are `driver`'s.
fn start(device: &mut VirtioPci, driver: &Driver, features: u64) -> u8 {
    let queue = driver.queue(false).queue;
    write(device, 20, 3, 1);
    for word in 0..2u64 {
        write(device, 8, word, 4);
        write(device, 12, features >> (32 * word), 4);
    }
    write(device, 20, 11, 1);
    write(device, 22, 0, 2);
    write(device, 24, 16, 2);
    write(device, 32, queue.desc_table(), 8);
    write(device, 40, queue.avail_ring(), 8);
    write(device, 48, queue.used_ring(), 8);
    write(device, 26, 1, 2);
    // MSI-X: vector 1 is enabled and unmasked.
    let control = device.msix_capability + 2;
    device.write_config(control, &0x8000u16.to_le_bytes());
    write(device, MSIX_TABLE + 16 + 12, 0, 4);
    write(device, 28, 1, 2);
    write(device, 20, 15, 1);
    read(device, 20, 1) as u8
}

const VERSION_1: u64 = 1 << 32;

#[test]
fn a_driver_sets_the_device_up_and_gets_its_answers_and_interrupts() {
    let ram = ram(1 << 20);
    let (mut device, machine) = transport(&ram);
    let mut driver = Driver::new(&ram, 0, 0x1000, 16);
    assert_eq!(start(&mut device, &driver, VERSION_1 | 1), 15);
    ram.write_slice(b"hello", GuestAddress(0x8000)).unwrap();
    driver.add(&[(0x8000, 5, false), (0x9000, 16, true)]);
    write(&mut device, NOTIFY, 0, 2);
    assert_eq!(driver.wait_used(), (0, 5));
    let interrupts = machine.interrupts.lock().unwrap();
    until("interrupt", || interrupts[1].read().is_ok());
    assert_eq!(read(&mut device, ISR, 1), 1);
    assert_eq!(read(&mut device, ISR, 1), 0, "reading acknowledges");
}

#[test]
fn features_that_were_not_offered_and_drivers_without_version_1_are_refused() {
    let ram = ram(1 << 20);
    for features in [VERSION_1 | 2, 1] {
        let (mut device, _) = transport(&ram);
        let driver = Driver::new(&ram, 0, 0x1000, 16);
        assert_eq!(start(&mut device, &driver, features) & 12, 0);
    }
}

#[test]
fn a_queue_outside_memory_makes_the_device_ask_for_a_reset() {
    let ram = ram(1 << 20);
    let (mut device, _) = transport(&ram);
    let driver = Driver::new(&blanket_memory_at(1 << 30), 0, 1 << 30, 16);
    assert_eq!(start(&mut device, &driver, VERSION_1) & 0x40, 0x40);
    write(&mut device, 20, 0, 1);
    assert_eq!(read(&mut device, 20, 1), 0);
    let driver = Driver::new(&ram, 0, 0x1000, 16);
    assert_eq!(
        start(&mut device, &driver, VERSION_1),
        15,
        "and works after it"
    );
}

fn blanket_memory_at(start: u64) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(start), 1 << 20)]).unwrap()
}

#[test]
fn a_paused_device_is_silent_and_goes_on_elsewhere_from_its_saved_state() {
    let ram = ram(1 << 20);
    let (mut device, _) = transport(&ram);
    let mut driver = Driver::new(&ram, 0, 0x1000, 16);
    start(&mut device, &driver, VERSION_1);
    driver.add(&[(0x8000, 5, false), (0x9000, 16, true)]);
    write(&mut device, NOTIFY, 0, 2);
    driver.wait_used();
    assert!(device.save().is_err(), "running");
    device.pause().unwrap();
    let second = driver.add(&[(0x8000, 7, false), (0x9000, 16, true)]);
    write(&mut device, NOTIFY, 0, 2);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.used(), None);
    let state = device.save().unwrap();
    drop(device);

    let (mut other, machine) = transport(&ram);
    other.restore(&state).unwrap();
    assert_eq!(other.save().unwrap(), state);
    other.resume().unwrap();
    assert_eq!(driver.wait_used(), (second, 7));
    let interrupts = machine.interrupts.lock().unwrap();
    until("interrupt", || interrupts[1].read().is_ok());
}

#[test]
fn a_reset_by_the_machine_brings_back_the_bar_and_all_else() {
    let (mut device, _) = transport(&ram(1 << 20));
    let built = device.save().unwrap();
    device.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    device.write_config(device.msix_capability + 2, &0x8000u16.to_le_bytes());
    assert_ne!(device.save().unwrap(), built);
    device.reset().unwrap();
    assert_eq!(device.save().unwrap(), built);
    assert_eq!(device.window(), Some((0xc000_0000, BAR_SIZE)));
}

#[test]
fn a_reset_reaches_the_model_although_no_driver_has_started_it() {
    let (mut device, _) = transport(&ram(1 << 20));
    write(&mut device, DEVICE_CONFIG + 3, 9, 1);
    assert_eq!(read(&mut device, DEVICE_CONFIG + 3, 1), 9);
    write(&mut device, 20, 0, 1);
    assert_eq!(read(&mut device, DEVICE_CONFIG + 3, 1), 4);
}

#[test]
fn a_state_of_other_features_or_queue_sizes_is_refused_and_a_reset_helps() {
    let ram = ram(1 << 20);
    for (size, features) in [(32, 1), (16, 3)] {
        let (mut other, _) = transport_of(&ram, size, features);
        let driver = Driver::new(&ram, 0, 0x1000, 16);
        assert_eq!(start(&mut other, &driver, VERSION_1 | features), 15);
        other.pause().unwrap();
        let state = other.save().unwrap();
        let (mut device, _) = transport(&ram);
        let built = device.save().unwrap();
        assert!(device.restore(&state).is_err());
        device.reset().unwrap();
        assert_eq!(device.save().unwrap(), built);
        assert_eq!(start(&mut device, &driver, VERSION_1), 15);
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let (mut device, machine) = transport(&ram(1 << 20));
    device.window_moved(true);
    assert_eq!(*machine.doorbells.lock().unwrap(), [0xc000_3000]);
    device.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    device.window_moved(true);
    assert_eq!(*machine.doorbells.lock().unwrap(), [0xd000_3000]);
    device.window_moved(false);
    assert!(machine.doorbells.lock().unwrap().is_empty());
}

#[test]
fn the_bar_is_reached_through_configuration_space_too() {
    let (mut device, _) = transport(&ram(1 << 20));
    let access = 0x84;
    device.write_config(access + 8, &(DEVICE_CONFIG as u32).to_le_bytes());
    device.write_config(access + 12, &4u32.to_le_bytes());
    let mut data = [0; 4];
    device.before_read_config(access + 16, 4);
    device.read_config(access + 16, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
}

proptest! {
    #[test]
    fn no_access_panics_and_a_reset_always_helps(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..BAR_SIZE, any::<u64>(), prop::sample::select(vec![1usize, 2, 4, 8])),
            0..200,
        )
    ) {
        let ram = ram(1 << 20);
        let (mut device, _) = transport(&ram);
        for (bar, offset, value, len) in accesses {
            let data = &value.to_le_bytes()[..len];
            if bar {
                // Most of the BAR is empty: half of the writes go to the front.
                let offset = if value & 1 == 0 { offset % 64 } else { offset };
                device.write_bar(offset, data);
                read(&mut device, offset, len);
            } else {
                device.write_config((offset % 256) as usize, data);
            }
        }
        write(&mut device, 20, 0, 1);
        device.config.enable_memory(true);
        let driver = Driver::new(&ram, 0, 0x1000, 16);
        prop_assert_eq!(start(&mut device, &driver, VERSION_1), 15);
    }
}
