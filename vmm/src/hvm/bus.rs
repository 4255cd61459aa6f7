//! Which device answers an access of the `hvm` machine's guest.

use std::sync::{Arc, Mutex, PoisonError};

use blanket_devices::legacy::power::{self, Power, Request};
use blanket_devices::legacy::serial::{self, Uart};
use blanket_devices::pci::PciBus;
use blanket_devices::pci::bus::ECAM_SIZE;
use blanket_devices::platform;

use crate::vcpu::{Bus, Event, Outcome};

/// The devices behind ports and memory.
pub(super) struct HvmBus {
    /// The serial port's registers.
    pub uart: Arc<Mutex<Uart>>,
    /// Sleep, reset and power button.
    pub power: Mutex<Power>,
    /// The PCI bus.
    pub pci: PciBus,
}

/// Who has a port.
enum Port {
    Serial(u8),
    Power(u16),
    Pci(u16),
    Nobody,
}

fn port(port: u16) -> Port {
    let within = |start: u16, len: u16| port.checked_sub(start).filter(|offset| *offset < len);
    if let Some(offset) = within(platform::SERIAL_PORT, serial::PORTS) {
        Port::Serial(offset as u8)
    } else if let Some(offset) = within(platform::POWER_PORT, power::SIZE) {
        Port::Power(offset)
    } else if let Some(offset) = within(platform::PCI_PORT, 8) {
        Port::Pci(offset)
    } else {
        Port::Nobody
    }
}

fn ecam(addr: u64) -> Option<u64> {
    addr.checked_sub(platform::ECAM_START)
        .filter(|offset| *offset < ECAM_SIZE)
}

impl HvmBus {
    fn uart(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn power(&self) -> std::sync::MutexGuard<'_, Power> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus for HvmBus {
    fn read_port(&self, at: u16, data: &mut [u8]) {
        match port(at) {
            // A wide or repeated access reads the same byte register again.
            Port::Serial(offset) => {
                let mut uart = self.uart();
                data.fill_with(|| uart.read(offset));
            }
            Port::Power(offset) => {
                let mut power = self.power();
                data.fill_with(|| power.read(offset));
            }
            Port::Pci(offset) => self.pci.read_port(offset, data),
            Port::Nobody => data.fill(0xff),
        }
    }

    fn write_port(&self, at: u16, data: &[u8]) -> Outcome {
        match port(at) {
            Port::Serial(offset) => {
                let mut uart = self.uart();
                for byte in data {
                    uart.write(offset, *byte);
                }
            }
            Port::Power(offset) => {
                let mut power = self.power();
                for byte in data {
                    match power.write(offset, *byte) {
                        Some(Request::PowerOff) => return Outcome::Event(Event::PowerOff),
                        Some(Request::Reset) => return Outcome::Event(Event::Reset),
                        None => {}
                    }
                }
            }
            Port::Pci(offset) => self.pci.write_port(offset, data),
            Port::Nobody => {}
        }
        Outcome::Continue
    }

    fn read_memory(&self, addr: u64, data: &mut [u8]) {
        if let Some(offset) = ecam(addr) {
            self.pci.read_ecam(offset, data);
        } else if !self.pci.read_memory(addr, data) {
            data.fill(0xff);
        }
    }

    fn write_memory(&self, addr: u64, data: &[u8]) -> Outcome {
        match ecam(addr) {
            Some(offset) => self.pci.write_ecam(offset, data),
            // What nobody answers is lost, as on a real bus.
            None => _ = self.pci.write_memory(addr, data),
        }
        Outcome::Continue
    }
}
