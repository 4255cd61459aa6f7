//! A machine without a processor: nobody takes its interrupts.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use blanket_devices::pci::{MsiMessage, Wiring};
use blanket_devices::virtio::Device;
use blanket_devices::virtio::blk::Block;
use blanket_devices::virtio::pci::{Context, VirtioPci};
use blanket_devices::worker::{Worker, Workers};
use blanket_drivers::store::{Engine, Format, Image, Spec};
use blanket_memory::GuestRam;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::file::MemFile;

/// Interrupts and doorbells that lead nowhere.
#[derive(Debug, Default)]
pub struct Nowhere {
    sources: AtomicU32,
}

impl Wiring for Nowhere {
    fn add_interrupt(&self) -> io::Result<(u32, EventFd)> {
        let gsi = self.sources.fetch_add(1, Ordering::Relaxed);
        Ok((gsi, EventFd::new(EFD_NONBLOCK)?))
    }
    fn route(&self, _: u32, message: Option<MsiMessage>) -> io::Result<()> {
        // As KVM does: a message goes to the local APICs or nowhere.
        match message {
            Some(message) if message.address >> 20 != 0xfee => {
                Err(io::Error::from(io::ErrorKind::InvalidInput))
            }
            _ => Ok(()),
        }
    }
    fn add_doorbell(&self, _: u64, _: &EventFd) {}
    fn remove_doorbell(&self, _: u64, _: &EventFd) {}
}

/// Two worker threads that all runs share.
///
/// # Panics
/// There are no threads.
#[must_use]
pub fn workers() -> Workers {
    static WORKERS: OnceLock<Workers> = OnceLock::new();
    let start = || -> Workers {
        (0..2)
            .map(|_| Worker::spawn("worker", Box::new(|| Ok(()))).expect("a thread"))
            .collect()
    };
    Arc::clone(WORKERS.get_or_init(start))
}

/// Where the first BAR lies.
pub const BARS: u64 = blanket_devices::platform::PCI_WINDOW_START;
/// From one BAR to the next.
pub const BAR_SIZE: u64 = blanket_devices::virtio::pci::BAR_SIZE;

/// A device behind its transport, with its BAR in place `index`.
///
/// # Panics
/// There are no descriptors.
#[must_use]
pub fn virtio(device: Box<dyn Device>, ram: &GuestRam, index: usize) -> VirtioPci {
    let context = Context {
        ram: ram.clone(),
        wiring: Arc::new(Nowhere::default()),
        workers: workers(),
        bar: BARS + index as u64 * BAR_SIZE,
        first_worker: index,
    };
    VirtioPci::new(device, context).expect("eventfds")
}

/// A disk of `capacity` bytes in memory, with what I/O engine there is.
///
/// # Panics
/// There is no memory.
#[must_use]
pub fn disk(capacity: u64) -> Block {
    let file = MemFile::new(&[], capacity);
    let image = Image::open(&Spec {
        path: file.path(),
        readonly: false,
        format: Some(Format::Raw),
        direct: false,
        backing: false,
        engine: Engine::Auto,
        stripe: Vec::new(),
    });
    let image = image.expect("an image");
    Block::new("disk0", image, None, 1, || Box::new(|| Ok(()))).expect("a disk")
}
