//! Sleep, reset and the power button of a hardware-reduced ACPI machine
//! (ACPI 6.5, 4.8.3.7, 4.8.3.6 and 5.6.9).
//!
//! | port | read | write |
//! |---|---|---|
//! | +0 | 0 | sleep control: S5 with SLP_EN powers off |
//! | +1 | 0 | reset: 1 resets |
//! | +2 | sleep status | -- |
//! | +3 | pending events, cleared | -- |

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::lifecycle::{Error, Lifecycle, SavedState};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the reset register.
pub const RESET: u16 = 1;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 2;
/// Offset of the event register, which the general event device reads.
pub const EVENTS: u16 = 3;
/// Number of registers.
pub const SIZE: u16 = 4;
/// What is written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// Event bit: the power button was pressed.
pub const EVENT_BUTTON: u8 = 1;
/// Event bit: the generation ID is another one.
pub const EVENT_GENERATION: u8 = 2;
/// Sleep type of S5, as the DSDT names it.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What the guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To be powered off.
    PowerOff,
    /// To start anew.
    Reset,
}

/// The registers and the button.
pub struct Power {
    events: u8,
    interrupt: EventFd,
}

#[derive(Serialize, Deserialize)]
struct State {
    events: u8,
}

impl Power {
    /// `interrupt` raises [`crate::platform::POWER_GSI`].
    #[must_use]
    pub fn new(interrupt: EventFd) -> Self {
        Self {
            events: 0,
            interrupt,
        }
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u16) -> u8 {
        match offset {
            EVENTS => std::mem::take(&mut self.events),
            _ => 0,
        }
    }

    /// The guest writes a register; what it asks for, if anything.
    #[must_use]
    pub fn write(&mut self, offset: u16, value: u8) -> Option<Request> {
        const POWER_OFF: u8 = (SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE;
        match (offset, value) {
            (SLEEP_CONTROL, POWER_OFF) => Some(Request::PowerOff),
            (RESET, RESET_VALUE) => Some(Request::Reset),
            _ => None,
        }
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn press_button(&mut self) -> std::io::Result<()> {
        self.tell(EVENT_BUTTON)
    }

    /// Tells that the [generation ID](super::generation) is another one.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn tell_generation(&mut self) -> std::io::Result<()> {
        self.tell(EVENT_GENERATION)
    }

    fn tell(&mut self, event: u8) -> std::io::Result<()> {
        self.events |= event;
        self.interrupt.write(1)
    }
}

impl Lifecycle for Power {
    fn reset(&mut self) -> Result<(), Error> {
        self.events = 0;
        Ok(())
    }

    fn save(&self) -> Result<SavedState, Error> {
        SavedState::pack(
            "power",
            1,
            &State {
                events: self.events,
            },
        )
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), Error> {
        self.events = state.unpack::<State>("power", 1)?.events;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_values_power_off_or_reset() {
        let mut power = Power::new(EventFd::new(0).unwrap());
        for offset in 0..=SIZE {
            for value in 0..=255 {
                let expected = match (offset, value) {
                    (0, 0x34) => Some(Request::PowerOff),
                    (1, 1) => Some(Request::Reset),
                    _ => None,
                };
                assert_eq!(power.write(offset, value), expected);
            }
        }
    }

    #[test]
    fn a_press_interrupts_once_and_survives_a_move() {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut power = Power::new(interrupt.try_clone().unwrap());
        power.press_button().unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        let saved = power.save().unwrap();
        assert_eq!((power.read(EVENTS), power.read(EVENTS)), (EVENT_BUTTON, 0));
        power.restore(&saved).unwrap();
        power.tell_generation().unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(power.read(EVENTS), EVENT_BUTTON | EVENT_GENERATION);
    }
}
