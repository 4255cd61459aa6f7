//! virtio-blk: a disk (virtio 1.2, 5.2).
//!
//! Each virtqueue has a [`Store`] of its own into the image, so queues share
//! no lock. Writes complete when the node has them; a flush makes whatever
//! completed before it durable. A driver that knows no flush, or turns the
//! write cache off, gets every write flushed before it completes.

mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blanket_drivers::store::{self, Image, SECTOR, Store, ThreadSetup};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::handler::{BlockHandler, Shared};
use self::request::{Accepted, ID_BYTES, MAX_FREED_SECTORS};
use super::{Activation, Device, QueueHandler, downcast};
pub use crate::disk::Metrics;
use crate::disk::{self, DEPTH, Identity};
use crate::lifecycle::{self, SavedState};

/// Entries of each virtqueue, and requests that its store takes.
pub const QUEUE_SIZE: u16 = DEPTH;

/// Most pieces of a request's data: the ring less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Bytes of the configuration space, up to `write_zeroes_may_unmap` and its
/// padding (5.2.4).
const CONFIG_LEN: usize = 60;

/// Where `writeback` is in it: the only field that drivers write.
const WRITEBACK: usize = 32;

/// Version of [`State`].
const STATE_VERSION: u32 = 1;

/// What a migration carries besides the queues.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The driver's choice of the write cache.
    writeback: bool,
    /// Bytes: the other side's image must be as large.
    capacity: u64,
}

/// A disk.
pub struct Block {
    image: Image,
    features: u64,
    queue_sizes: Vec<u16>,
    /// By queue; a running queue has taken its own.
    stores: Vec<Option<Box<dyn Store>>>,
    shared: Arc<Shared>,
}

impl Block {
    /// A disk named `name` on `image` with `queues` virtqueues (at least one).
    /// Its serial is `serial`, or the image's if absent; 20 bytes of it count.
    ///
    /// Rings and threads are made now, before the process confines itself;
    /// each thread first runs a `setup()`.
    ///
    /// # Errors
    /// A ring or a thread cannot be had.
    pub fn new(
        name: &str,
        image: Image,
        serial: Option<&str>,
        queues: u16,
        setup: impl Fn() -> ThreadSetup,
    ) -> Result<Self, store::Error> {
        let queues = queues.max(1);
        let stores = (0..queues)
            .map(|_| image.queue(QUEUE_SIZE, &setup).map(Some))
            .collect::<Result<_, _>>()?;
        let mut id = [0; ID_BYTES];
        let serial = serial.map_or_else(|| image.default_serial(), str::to_owned);
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let log = image.log();
        Ok(Self {
            features: features(&image, queues),
            image,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            stores,
            shared: Arc::new(Shared {
                id,
                writeback: AtomicBool::new(true),
                identity: Arc::new(Identity {
                    name: name.to_owned(),
                    metrics: Arc::default(),
                    log,
                }),
            }),
        })
    }

    /// The disk's counters; they outlive it.
    #[must_use]
    pub fn counters(&self) -> Arc<Metrics> {
        Arc::clone(&self.shared.identity.metrics)
    }
}

fn features(image: &Image, queues: u16) -> u64 {
    let mut features =
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
    if image.readonly() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    }
    if image.discard() {
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    }
    if queues > 1 {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    features
}

impl Device for Block {
    fn kind(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn name(&self) -> &str {
        &self.shared.identity.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Vec<u8> {
        let block = self.image.block_size();
        let exponent = (self.image.physical_block_size() / block).ilog2();
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX);
        let mut config = vec![0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.image.capacity() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &block.to_le_bytes());
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        // The smallest and the best I/O, in logical blocks: a physical block.
        put(
            26,
            &u16::try_from(1u32 << exponent).unwrap_or(1).to_le_bytes(),
        );
        put(28, &(1u32 << exponent).to_le_bytes());
        put(
            WRITEBACK,
            &[self.shared.writeback.load(Ordering::Relaxed).into()],
        );
        put(34, &queues.to_le_bytes());
        if self.image.discard() {
            put(36, &MAX_FREED_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            // In sectors: any block will do.
            put(44, &(block / SECTOR as u32).to_le_bytes());
            put(48, &MAX_FREED_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (WRITEBACK, [writeback]) = (offset, data) {
            self.shared
                .writeback
                .store(*writeback != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>> {
        let has = |feature: u32| activation.features & 1 << feature != 0;
        let accepted = Accepted {
            discard: has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
        };
        let write_through = !has(VIRTIO_BLK_F_FLUSH);
        let store = |index: u16| self.stores.get(usize::from(index));
        if let Some(queue) = activation
            .queues
            .iter()
            .find(|queue| !matches!(store(queue.index), Some(Some(_))))
        {
            let message = format!("no store for queue {}", queue.index);
            return Err(io::Error::other(message));
        }
        let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::new();
        for queue in activation.queues {
            if let Some(store) = self.stores[usize::from(queue.index)].take() {
                let shared = Arc::clone(&self.shared);
                handlers.push(Box::new(BlockHandler::new(
                    queue,
                    store,
                    accepted,
                    write_through,
                    shared,
                )));
            }
        }
        Ok(handlers)
    }

    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>) {
        for handler in handlers {
            if let Some(handler) = downcast::<BlockHandler>(handler) {
                let (index, store) = handler.into_store();
                self.stores[usize::from(index)] = Some(store);
            }
        }
        self.shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self, _: &[Box<dyn QueueHandler>]) -> Result<SavedState, lifecycle::Error> {
        let settled = disk::check_settled(&self.shared.identity.metrics);
        settled.map_err(|message| lifecycle::Error::Device {
            device: self.name().to_owned(),
            message,
        })?;
        let state = State {
            writeback: self.shared.writeback.load(Ordering::Relaxed),
            capacity: self.image.capacity(),
        };
        SavedState::pack(self.name(), STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let state: State = state.unpack(self.name(), STATE_VERSION)?;
        disk::check_capacity(state.capacity, &self.image).map_err(|message| {
            lifecycle::Error::Device {
                device: self.name().to_owned(),
                message,
            }
        })?;
        self.shared
            .writeback
            .store(state.writeback, Ordering::Relaxed);
        Ok(())
    }

    fn halt(&mut self) {
        self.stores.clear();
        if let Err(error) = self.image.flush() {
            tracing::error!(disk = self.shared.identity.name, %error, "the disk could not be flushed");
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.shared.identity.metrics.list()
    }
}
