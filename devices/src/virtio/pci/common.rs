//! The common configuration structure (virtio 1.2, 4.1.4.3).

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::VirtioPci;

/// The registers that are not a queue's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    queue_select: u16,
    pub(super) status: u8,
}

impl VirtioPci {
    fn selected(&mut self) -> Option<&mut virtio_queue::Queue> {
        let index = usize::from(self.registers.queue_select);
        self.queues.get_mut(index).map(|slot| &mut slot.setup)
    }

    /// The 64 bytes of the structure as they read now.
    pub(super) fn common_bytes(&mut self) -> [u8; 64] {
        let registers = self.registers.clone();
        let feature_word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut bytes = [0u8; 64];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let offered = feature_word(self.features(), registers.device_feature_select);
        let accepted = feature_word(registers.driver_features, registers.driver_feature_select);
        let generation = self.interrupts.generation.load(Ordering::Acquire);
        put(0, &registers.device_feature_select.to_le_bytes());
        put(4, &offered.to_le_bytes());
        put(8, &registers.driver_feature_select.to_le_bytes());
        put(12, &accepted.to_le_bytes());
        put(16, &self.interrupts.vector(None).to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[self.status(), generation]);
        put(22, &registers.queue_select.to_le_bytes());
        let vector = self.interrupts.vector(Some(registers.queue_select));
        if let Some(queue) = self.selected() {
            put(24, &queue.size().to_le_bytes());
            put(26, &vector.to_le_bytes());
            put(28, &u16::from(queue.ready()).to_le_bytes());
            put(30, &registers.queue_select.to_le_bytes());
            put(32, &queue.desc_table().to_le_bytes());
            put(40, &queue.avail_ring().to_le_bytes());
            put(48, &queue.used_ring().to_le_bytes());
        }
        bytes
    }

    /// A write of 1, 2, 4 or 8 bytes; one that is not a register's is ignored.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        let value = match data {
            [a] => u64::from(*a),
            [a, b] => u64::from(u16::from_le_bytes([*a, *b])),
            [a, b, c, d] => u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
            [low @ .., e, f, g, h] if low.len() == 4 => {
                let high = [*e, *f, *g, *h];
                self.write_common(offset, low);
                self.write_common(offset + 4, &high);
                return;
            }
            _ => return,
        };
        let select = self.registers.queue_select;
        match (offset, data.len()) {
            (0, 4) => self.registers.device_feature_select = value as u32,
            (8, 4) => self.registers.driver_feature_select = value as u32,
            (12, 4) => self.accept_features(value as u32),
            (16, 2) => self.interrupts.set_vector(None, value as u16),
            (20, 1) => self.set_status(value as u8),
            (22, 2) => self.registers.queue_select = value as u16,
            (26, 2) => self.interrupts.set_vector(Some(select), value as u16),
            (24 | 28 | 32..56, _) => self.write_queue(offset, value, data.len()),
            _ => {}
        }
    }

    /// Features are settled once the driver has said `FEATURES_OK`.
    fn accept_features(&mut self, word: u32) {
        let settled = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK as u8;
        if self.registers.status & settled != 0 {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_feature_select {
            0 => *features = (*features & !0xffff_ffff) | u64::from(word),
            1 => *features = (*features & 0xffff_ffff) | (u64::from(word) << 32),
            _ => {}
        }
    }

    /// The driver sets up the selected queue; once the device runs, it may not.
    fn write_queue(&mut self, offset: u64, value: u64, len: usize) {
        let running = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK as u8;
        if self.registers.status & running != 0 {
            return;
        }
        let Some(queue) = self.selected() else {
            return;
        };
        let word = Some(value as u32);
        match (offset, len) {
            (24, 2) => queue.set_size(value as u16),
            // Only a reset disables a queue again (4.1.4.3.2).
            (28, 2) if value == 1 => queue.set_ready(true),
            (32, 4) => queue.set_desc_table_address(word, None),
            (36, 4) => queue.set_desc_table_address(None, word),
            (40, 4) => queue.set_avail_ring_address(word, None),
            (44, 4) => queue.set_avail_ring_address(None, word),
            (48, 4) => queue.set_used_ring_address(word, None),
            (52, 4) => queue.set_used_ring_address(None, word),
            _ => {}
        }
    }
}
