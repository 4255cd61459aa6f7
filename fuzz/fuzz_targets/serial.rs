//! The serial port's registers: no access, move or reset hurts it, and what a
//! driver that behaves writes gets through afterwards.
#![no_main]

use arbitrary::Arbitrary;
use blanket_devices::char::{CharPort, Spec};
use blanket_devices::legacy::serial::{PORTS, Serial};
use blanket_devices::lifecycle::Lifecycle;
use blanket_fuzz::machine::workers;
use libfuzzer_sys::fuzz_target;
use std::sync::PoisonError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Transmit holding register, line control, and line status with its bit for
/// an empty transmitter (16550).
const DATA: u8 = 0;
const LINE_STATUS: u8 = 5;
const EMPTY: u8 = 0x20;

#[derive(Arbitrary, Debug)]
enum Step {
    Read(u8),
    Write(u8, u8),
    Move,
    Reset,
}

fn output(serial: &Serial) -> u64 {
    let all = serial.metrics();
    let found = all.iter().find(|(name, _)| *name == "output_bytes");
    found.expect("it counts").1
}

fuzz_target!(|steps: Vec<Step>| {
    let port = CharPort::open(&Spec::default()).expect("a port that leads nowhere");
    let interrupt = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let mut serial = Serial::new(port, interrupt, workers()).expect("a serial port");
    serial.start().expect("a worker");
    let uart = serial.uart().clone();
    let uart = || uart.lock().unwrap_or_else(PoisonError::into_inner);
    for step in steps {
        match step {
            Step::Read(offset) => drop(uart().read(offset % PORTS as u8)),
            Step::Write(offset, value) => uart().write(offset % PORTS as u8, value),
            Step::Move => {
                serial.pause().expect("a rest");
                let saved = serial.save().expect("a state to save");
                serial.restore(&saved).expect("its own state");
                assert_eq!(serial.save().expect("a state to save"), saved);
                serial.resume().expect("a worker");
            }
            Step::Reset => {
                serial.pause().expect("a rest");
                serial.reset().expect("a reset");
                serial.resume().expect("a worker");
            }
        }
    }
    serial.pause().expect("a rest");
    serial.reset().expect("a reset");
    let before = output(&serial);
    serial.resume().expect("a worker");
    assert_ne!(uart().read(LINE_STATUS) & EMPTY, 0);
    uart().write(DATA, b'x');
    serial.pause().expect("a rest");
    assert_eq!(output(&serial), before + 1);
    serial.halt();
});
