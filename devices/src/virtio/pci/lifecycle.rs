//! The life of a virtio device, the same for every model.

use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_config as status;
use virtio_queue::{Queue, QueueState, QueueT};

use super::common::Registers;
use super::{Handlers, VirtioPci};
use crate::lifecycle::{Error, Lifecycle, SavedState};
use crate::pci::config::ConfigState;
use crate::pci::msix::MsixState;

/// Version of [`State`].
const VERSION: u32 = 1;

/// A queue's state (virtio-queue's own struct has no serde).
#[derive(Debug, Serialize, Deserialize)]
struct QueueRecord {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    vector: u16,
}

/// Everything of a device that a snapshot carries.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    config: ConfigState,
    registers: Registers,
    msix: MsixState,
    config_vector: u16,
    isr: u8,
    broken: bool,
    queues: Vec<QueueRecord>,
    device: SavedState,
}

impl VirtioPci {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::Device {
            device: self.name().to_owned(),
            message: message.into(),
        }
    }

    fn kind_name(&self) -> String {
        format!("virtio-pci/{}", self.name())
    }

    /// The queues as they are now: a handler's copy is ahead of the set-up one.
    fn queue_states(&self) -> Vec<QueueState> {
        let mut states: Vec<_> = self.queues.iter().map(|slot| slot.setup.state()).collect();
        if let Handlers::Parked(handlers) = &self.handlers {
            for queue in handlers.iter().flat_map(|handler| handler.queues()) {
                states[usize::from(queue.index)] = queue.queue.state();
            }
        }
        states
    }

    fn record(&self, index: usize, state: &QueueState) -> QueueRecord {
        QueueRecord {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            vector: self.interrupts.vector(Some(index as u16)),
        }
    }

    fn restore_queue(&mut self, index: usize, record: &QueueRecord) -> Result<(), Error> {
        let most = self.queues[index].setup.max_size();
        if record.max_size != most {
            return Err(self.error(format!(
                "queue {index} has up to {} entries in the state, {most} here",
                record.max_size
            )));
        }
        let state = QueueState {
            max_size: record.max_size,
            next_avail: record.next_avail,
            next_used: record.next_used,
            event_idx_enabled: record.event_idx_enabled,
            size: record.size,
            ready: record.ready,
            desc_table: record.desc_table,
            avail_ring: record.avail_ring,
            used_ring: record.used_ring,
        };
        self.queues[index].setup = Queue::try_from(state)
            .map_err(|error| self.error(format!("queue {index}: {error}")))?;
        self.interrupts
            .set_vector(Some(index as u16), record.vector);
        Ok(())
    }
}

impl Lifecycle for VirtioPci {
    fn pause(&mut self) -> Result<(), Error> {
        self.park().map_err(|error| self.error(error.to_string()))
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.unpark().map_err(|error| self.error(error.to_string()))
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.reset_device();
        self.interrupts.msix().reset();
        // The bus has to route anew: see `PciBus::reroute`.
        self.config = self.power_on.clone();
        Ok(())
    }

    fn halt(&mut self) {
        self.reset_device();
        self.device.halt();
    }

    fn save(&self) -> Result<SavedState, Error> {
        let parked: &[_] = match &self.handlers {
            Handlers::Running(_) => return Err(self.error("it must be paused first")),
            Handlers::Parked(handlers) => handlers,
            Handlers::None => &[],
        };
        let queues = self.queue_states();
        let state = State {
            config: self.config.save(),
            registers: self.registers.clone(),
            msix: self.interrupts.msix().save(),
            config_vector: self.interrupts.vector(None),
            isr: self.interrupts.isr.load(Ordering::Acquire),
            broken: self.interrupts.broken.load(Ordering::Acquire),
            queues: queues
                .iter()
                .enumerate()
                .map(|(i, queue)| self.record(i, queue))
                .collect(),
            device: self.device.save(parked)?,
        };
        SavedState::pack(&self.kind_name(), VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), Error> {
        let state: State = saved.unpack(&self.kind_name(), VERSION)?;
        self.reset()?;
        if state.queues.len() != self.queues.len() {
            return Err(self.error(format!(
                "the state has {} queues, the device {}",
                state.queues.len(),
                self.queues.len()
            )));
        }
        if !self.config.restore(&state.config) || !self.interrupts.msix().restore(&state.msix) {
            return Err(self.error("the state is of another PCI function"));
        }
        // Until they are settled, a driver may try what it likes.
        let settled = status::VIRTIO_CONFIG_S_FEATURES_OK | status::VIRTIO_CONFIG_S_DRIVER_OK;
        let lacking = state.registers.driver_features & !self.features();
        if lacking != 0 && state.registers.status & settled as u8 != 0 {
            return Err(self.error(format!(
                "the driver uses features that the device lacks here: {lacking:#x}"
            )));
        }
        self.registers = state.registers;
        self.interrupts.set_vector(None, state.config_vector);
        self.interrupts.isr.store(state.isr, Ordering::Release);
        self.interrupts
            .broken
            .store(state.broken, Ordering::Release);
        for (index, record) in state.queues.iter().enumerate() {
            self.restore_queue(index, record)?;
        }
        self.device.restore(&state.device)?;
        let running = status::VIRTIO_CONFIG_S_DRIVER_OK as u8;
        if self.registers.status & running != 0 && !state.broken {
            self.activate()
                .map_err(|error| self.error(error.to_string()))?;
        }
        Ok(())
    }
}
