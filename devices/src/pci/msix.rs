//! MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages, masks and pending
//! bits in front of the machine's interrupt sources.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::SharedWiring;

/// A write that raises an interrupt in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Means "no vector" wherever a vector is chosen (virtio 1.2, 4.1.5.1.2.1).
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of a table entry.
pub const ENTRY_SIZE: usize = 16;
/// Message control: the function's vectors are enabled.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    fn masked(&self) -> bool {
        self.control & 1 != 0
    }

    fn message(&self) -> MsiMessage {
        MsiMessage {
            address: self.address & !3,
            data: self.data,
        }
    }
}

/// What a snapshot carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    control: u16,
}

struct Source {
    gsi: u32,
    event: EventFd,
    /// The message that the machine sends for this source now.
    routed: Option<MsiMessage>,
}

/// The MSI-X state of one function.
pub struct Msix {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    control: u16,
    sources: Vec<Source>,
    wiring: SharedWiring,
}

impl Msix {
    /// A table of `vectors` entries, all masked.
    ///
    /// # Errors
    /// The machine has no more interrupt sources.
    pub fn new(vectors: u16, wiring: SharedWiring) -> std::io::Result<Self> {
        let sources = (0..vectors)
            .map(|_| {
                let (gsi, event) = wiring.add_interrupt()?;
                Ok(Source {
                    gsi,
                    event,
                    routed: None,
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let mut msix = Self {
            entries: Vec::new(),
            pending: Vec::new(),
            control: 0,
            sources,
            wiring,
        };
        msix.reset();
        Ok(msix)
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.sources.len() as u16
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        let masked = Entry {
            address: 0,
            data: 0,
            control: 1,
        };
        self.entries = vec![masked; self.sources.len()];
        self.pending = vec![false; self.sources.len()];
        self.control = 0;
        self.update_all();
    }

    /// The guest wrote message control (offset 2 of the capability).
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLE | FUNCTION_MASK);
        self.update_all();
    }

    /// Reads from the table, in 4 or 8 byte accesses; others read as zero.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let (index, within) = (offset / ENTRY_SIZE, offset % ENTRY_SIZE);
        let Some(entry) = self.entries.get(index) else {
            return;
        };
        let mut bytes = [0u8; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        if let Some(source) = bytes.get(within..within + data.len()) {
            data.copy_from_slice(source);
        }
    }

    /// Writes to the table, in aligned 4 or 8 byte accesses; others are ignored.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        for (i, word) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i;
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let Some(entry) = self.entries.get_mut(at / ENTRY_SIZE) else {
                return;
            };
            match at % ENTRY_SIZE {
                0 => entry.address = (entry.address & !0xffff_ffff) | u64::from(value),
                4 => entry.address = (entry.address & 0xffff_ffff) | (u64::from(value) << 32),
                8 => entry.data = value,
                _ => entry.control = value & 1,
            }
            self.update(at / ENTRY_SIZE);
        }
    }

    /// Reads pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (0..8).fold(0, |bits, bit| {
                let set = self.pending.get((offset + i) * 8 + bit) == Some(&true);
                bits | (u8::from(set) << bit)
            });
        }
    }

    /// Raises `vector` in the guest, or remembers it while masked.
    pub fn raise(&mut self, vector: u16) {
        let index = usize::from(vector);
        if self.control & ENABLE == 0 || index >= self.entries.len() {
            return;
        }
        if self.control & FUNCTION_MASK != 0 || self.entries[index].masked() {
            self.pending[index] = true;
        } else if let Err(error) = self.sources[index].event.write(1) {
            tracing::warn!(vector, %error, "interrupt lost");
        }
    }

    fn update_all(&mut self) {
        for index in 0..self.entries.len() {
            self.update(index);
        }
    }

    /// Brings a source's route in line with its entry and delivers what was
    /// held back.
    fn update(&mut self, index: usize) {
        let live = self.control & ENABLE != 0
            && self.control & FUNCTION_MASK == 0
            && !self.entries[index].masked();
        if !live {
            // The route stays: it is costly to change, and `raise` holds back.
            return;
        }
        let message = self.entries[index].message();
        let source = &mut self.sources[index];
        if source.routed != Some(message) {
            match self.wiring.route(source.gsi, Some(message)) {
                Ok(()) => source.routed = Some(message),
                Err(error) => {
                    tracing::warn!(index, ?message, %error, "the guest's MSI message is refused");
                }
            }
        }
        if std::mem::take(&mut self.pending[index])
            && let Err(error) = self.sources[index].event.write(1)
        {
            tracing::warn!(index, %error, "interrupt lost");
        }
    }

    /// What a snapshot carries.
    #[must_use]
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: self.entries.clone(),
            pending: self.pending.clone(),
            control: self.control,
        }
    }

    /// Takes over a saved state. False (and no change) if it has another
    /// number of vectors.
    #[must_use]
    pub fn restore(&mut self, state: &MsixState) -> bool {
        let fits =
            state.entries.len() == self.entries.len() && state.pending.len() == self.pending.len();
        if fits {
            self.entries.clone_from(&state.entries);
            self.pending.clone_from(&state.pending);
            self.control = state.control;
            self.update_all();
        }
        fits
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for source in &self.sources {
            // Nothing to be done about a machine that is going away too.
            let _ = self.wiring.route(source.gsi, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Wiring;
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Recorder {
        events: Mutex<Vec<EventFd>>,
        routes: Mutex<HashMap<u32, MsiMessage>>,
    }

    impl Wiring for Recorder {
        fn add_interrupt(&self) -> std::io::Result<(u32, EventFd)> {
            let event = EventFd::new(libc::EFD_NONBLOCK)?;
            let mut events = self.events.lock().unwrap();
            events.push(event.try_clone()?);
            Ok((events.len() as u32 - 1, event))
        }
        fn route(&self, gsi: u32, message: Option<MsiMessage>) -> std::io::Result<()> {
            if let Some(message) = message {
                self.routes.lock().unwrap().insert(gsi, message);
            }
            Ok(())
        }
        fn add_doorbell(&self, _: u64, _: &EventFd) {}
        fn remove_doorbell(&self, _: u64, _: &EventFd) {}
    }

    fn fired(recorder: &Recorder, vector: usize) -> bool {
        recorder.events.lock().unwrap()[vector].read().is_ok()
    }

    #[test]
    fn a_masked_vector_is_delivered_when_it_is_unmasked() {
        let recorder = Arc::new(Recorder::default());
        let mut msix = Msix::new(2, recorder.clone()).unwrap();
        msix.raise(1);
        assert!(!fired(&recorder, 1), "disabled: nothing is kept");
        msix.set_control(ENABLE);
        msix.write_table(16, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix.raise(1);
        assert!(!fired(&recorder, 1));
        let mut pending = [0];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2]);
        let saved = msix.save();
        msix.write_table(28, &[0; 4]);
        assert!(fired(&recorder, 1));
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        assert_eq!(recorder.routes.lock().unwrap()[&1], message);
        msix.raise(1);
        assert!(fired(&recorder, 1) && !fired(&recorder, 0));
        assert!(msix.restore(&saved));
        assert_eq!(msix.save(), saved);
    }

    #[test]
    fn accesses_of_odd_sizes_and_beyond_the_table_do_nothing() {
        let mut msix = Msix::new(1, Arc::new(Recorder::default())).unwrap();
        let before = msix.save();
        msix.write_table(0, &[0xff; 3]);
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(4096, &[0xff; 8]);
        msix.raise(7);
        assert_eq!(msix.save(), before);
        let mut data = [0xff; 8];
        msix.read_table(12, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
