//! The PCI side: configuration space and the BAR.

use std::sync::atomic::Ordering;

use super::{
    BAR_SIZE, DEVICE_CONFIG, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER, REGION,
    VirtioPci,
};
use crate::pci::Function;
use crate::pci::config::ConfigSpace;

/// Offset of the PCI configuration access capability (virtio 1.2, 4.1.4.9):
/// behind the four others, whose sizes are fixed.
const PCI_ACCESS: usize = 0x40 + 3 * 16 + 20;

/// Adds the capability by which a driver reaches the BAR through configuration
/// space. Every device must have it.
pub(super) fn add_pci_access_capability(config: &mut ConfigSpace) {
    let mut body = [0u8; 18];
    body[0] = 20;
    body[1] = 5;
    let mut writable = [0u8; 18];
    // bar, offset, length, data.
    writable[2] = 0xff;
    writable[6..18].fill(0xff);
    let at = config.add_capability(0x09, &body, &writable);
    debug_assert_eq!(at, PCI_ACCESS);
}

impl VirtioPci {
    /// The (offset, length) in the BAR that the access capability points at,
    /// if it is a legal one.
    fn pci_access(&self) -> Option<(u64, usize)> {
        let mut cap = [0u8; 16];
        self.config.read(PCI_ACCESS, &mut cap);
        let offset = u64::from(u32::from_le_bytes([cap[8], cap[9], cap[10], cap[11]]));
        let len = u32::from_le_bytes([cap[12], cap[13], cap[14], cap[15]]) as usize;
        let legal = cap[4] == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset < BAR_SIZE;
        legal.then_some((offset, len))
    }

    /// Whether an access touches the data field of that capability.
    fn touches_pci_access(offset: usize, len: usize) -> bool {
        offset < PCI_ACCESS + 20 && PCI_ACCESS + 16 < offset + len
    }

    fn move_doorbells(&mut self, base: Option<u64>) {
        if self.doorbells == base {
            return;
        }
        let wiring = &self.context.wiring;
        let address =
            |base: u64, queue: usize| base + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        for (i, slot) in self.queues.iter().enumerate() {
            if let Some(old) = self.doorbells {
                wiring.remove_doorbell(address(old, i), &slot.kick);
            }
            if let Some(new) = base {
                wiring.add_doorbell(address(new, i), &slot.kick);
            }
        }
        self.doorbells = base;
    }

    fn read_device_config(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.device.config();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn write_device_config(&mut self, offset: usize, data: &[u8]) {
        if offset + data.len() <= self.device.config().len() {
            self.device.write_config(offset, data);
        }
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let control = self.msix_capability + 2;
        if offset < control + 2 && control < offset + data.len() {
            let mut value = [0; 2];
            self.config.read(control, &mut value);
            self.interrupts
                .msix()
                .set_control(u16::from_le_bytes(value));
        }
        if Self::touches_pci_access(offset, data.len())
            && let Some((at, len)) = self.pci_access()
        {
            let mut value = [0; 4];
            self.config.read(PCI_ACCESS + 16, &mut value);
            self.write_bar(at, &value[..len]);
        }
    }

    fn before_read_config(&mut self, offset: usize, len: usize) {
        if Self::touches_pci_access(offset, len)
            && let Some((at, len)) = self.pci_access()
        {
            let mut value = [0; 4];
            self.read_bar(at, &mut value[..len]);
            self.config.write(PCI_ACCESS + 16, &value);
        }
    }

    fn window(&self) -> Option<(u64, u64)> {
        self.config.bar64().map(|base| (base, BAR_SIZE))
    }

    fn window_moved(&mut self, granted: bool) {
        let base = self.config.bar64().filter(|_| granted);
        self.move_doorbells(base);
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % REGION) as usize;
        match offset - offset % REGION {
            0 => {
                let bytes = self.common_bytes();
                if let Some(source) = bytes.get(within..within + data.len()) {
                    data.copy_from_slice(source);
                }
            }
            // Reading acknowledges (4.1.4.5).
            ISR if within == 0 && !data.is_empty() => {
                data[0] = self.interrupts.isr.swap(0, Ordering::AcqRel);
            }
            DEVICE_CONFIG => self.read_device_config(within, data),
            MSIX_TABLE => self.interrupts.msix().read_table(within, data),
            MSIX_PENDING => self.interrupts.msix().read_pending(within, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let within = (offset % REGION) as usize;
        match offset - offset % REGION {
            0 => self.write_common(within as u64, data),
            DEVICE_CONFIG => self.write_device_config(within, data),
            NOTIFY => self.notify(within / NOTIFY_MULTIPLIER as usize),
            MSIX_TABLE => self.interrupts.msix().write_table(within, data),
            _ => {}
        }
    }
}
