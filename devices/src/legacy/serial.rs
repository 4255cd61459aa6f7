//! The serial port: a 16550 at I/O ports 0x3f8 to 0x3ff, interrupt 4.
//!
//! The registers ([`Uart`], from vm-superio) are written by vCPU threads; what
//! goes in and out is moved by a worker, so that no vCPU waits for a terminal.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::char::{self, BUFFER, CharPort, Outbox};
use crate::lifecycle::{Error, Lifecycle, SavedState};
use crate::virtio::queue::watch;
use crate::worker::{Handler, HandlerId, Workers};

/// Number of I/O ports.
pub const PORTS: u16 = 8;
/// System calls of the thread that moves the bytes.
pub const SYSCALLS: &[libc::c_long] = char::SYSCALLS;

const NAME: &str = "serial";
/// Offset of the modem control register, and its loopback bit.
const MCR: u8 = 4;
const MCR_LOOP: u8 = 0x10;

/// Signals an eventfd, without ever blocking.
#[derive(Clone)]
struct Signal(Arc<EventFd>);

impl Signal {
    fn give(&self) {
        // The counter is full: the signal has been given and not taken.
        let _ = self.0.write(1);
    }
}

impl Trigger for Signal {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.give();
        Ok(())
    }
}

/// The receive FIFO has room again.
impl SerialEvents for Signal {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.give();
    }
}

/// Output on its way to the worker.
struct Output {
    bytes: Outbox,
    lost: usize,
    wake: Signal,
}

impl Output {
    fn new(wake: Signal) -> Self {
        Self {
            bytes: Outbox::new(BUFFER),
            lost: 0,
            wake,
        }
    }
}

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            self.wake.give();
        }
        self.lost += self.bytes.push(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The registers, as vCPUs see them.
pub struct Uart {
    registers: vm_superio::Serial<Signal, Signal, Output>,
    interrupt: Signal,
    wake: Signal,
    /// In loopback nothing comes in from outside.
    loopback: bool,
}

impl Uart {
    fn new(interrupt: Signal, wake: Signal) -> Self {
        let output = Output::new(wake.clone());
        Self {
            registers: vm_superio::Serial::with_events(interrupt.clone(), wake.clone(), output),
            interrupt,
            wake,
            loopback: false,
        }
    }

    /// A vCPU reads the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.registers.read(offset)
    }

    /// A vCPU writes `value` to the register at `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        if offset == MCR {
            let ended = self.loopback && value & MCR_LOOP == 0;
            self.loopback = value & MCR_LOOP != 0;
            if ended {
                // What came meanwhile can come in now.
                self.wake.give();
            }
        }
        // Neither the output nor the interrupt can fail.
        let _ = self.registers.write(offset, value);
    }

    /// What the guest has written since, and how much of it was forgotten.
    fn take_output(&mut self) -> (Vec<u8>, usize) {
        let output = self.registers.writer_mut();
        (output.bytes.take(), std::mem::take(&mut output.lost))
    }

    /// Bytes that the guest can be given now.
    fn room(&self) -> usize {
        if self.loopback {
            0
        } else {
            self.registers.fifo_capacity()
        }
    }

    fn set(&mut self, state: &SerialState) -> Result<(), String> {
        self.registers = vm_superio::Serial::from_state(
            state,
            self.interrupt.clone(),
            self.wake.clone(),
            Output::new(self.wake.clone()),
        )
        .map_err(|error| error.to_string())?;
        self.loopback = state.modem_control & MCR_LOOP != 0;
        Ok(())
    }
}

/// [`SerialState`], such that it can be saved.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl From<SerialState> for State {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

impl From<State> for SerialState {
    fn from(state: State) -> Self {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moves bytes between the registers and the port.
struct Line {
    uart: Arc<Mutex<Uart>>,
    port: CharPort,
    wake: Signal,
}

impl Line {
    fn send(&mut self) {
        let (output, lost) = lock(&self.uart).take_output();
        if !output.is_empty() {
            self.port.write(&output);
        }
        self.port.metrics().drop_bytes(lost);
    }

    /// Reads as much as the FIFO takes. When the guest has emptied it, the
    /// registers wake this line.
    fn receive(&mut self) {
        let mut uart = lock(&self.uart);
        let mut bytes = [0; 64];
        let room = uart.room().min(bytes.len());
        let n = self.port.read(&mut bytes[..room]);
        // There is room; the interrupt cannot fail.
        let _ = uart.registers.enqueue_raw_bytes(&bytes[..n]);
        self.port.want_input(uart.room() > 0);
    }
}

impl MutEventSubscriber for Line {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = watch(ops, &*self.wake.0, 0) {
            tracing::error!(%error, "the serial port cannot be watched");
        }
        self.port.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if CharPort::owns(&events) {
            self.port.process(&events, ops);
        } else {
            // An empty eventfd is no news.
            let _ = self.wake.0.read();
        }
        self.send();
        self.receive();
        self.port.sync(ops);
    }
}

impl Handler for Line {
    fn kick(&mut self) {
        self.wake.give();
    }

    fn quiesce(&mut self) {
        self.send();
    }
}

/// Where the line is.
enum Place {
    Parked(Box<dyn Handler>),
    Running(HandlerId),
    Halted,
}

/// A serial port.
pub struct Serial {
    uart: Arc<Mutex<Uart>>,
    workers: Workers,
    place: Place,
    metrics: Arc<char::Metrics>,
}

impl Serial {
    /// A serial port that leads to `port`, is served by the first of `workers`
    /// and raises its interrupt by signalling `interrupt`.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub fn new(port: CharPort, interrupt: EventFd, workers: Workers) -> io::Result<Self> {
        let wake = Signal(Arc::new(EventFd::new(EFD_NONBLOCK)?));
        let uart = Uart::new(Signal(Arc::new(interrupt)), wake.clone());
        let uart = Arc::new(Mutex::new(uart));
        Ok(Self {
            metrics: Arc::clone(port.metrics()),
            place: Place::Parked(Box::new(Line {
                uart: Arc::clone(&uart),
                port,
                wake,
            })),
            uart,
            workers,
        })
    }

    /// The registers, for the bus.
    #[must_use]
    pub fn uart(&self) -> &Arc<Mutex<Uart>> {
        &self.uart
    }

    /// Its counters now, as (name, value).
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.read()
    }

    fn run(&mut self) -> Result<(), Error> {
        match (
            std::mem::replace(&mut self.place, Place::Halted),
            self.workers.first(),
        ) {
            (Place::Parked(line), Some(worker)) => {
                self.place = Place::Running(worker.add(line).map_err(|e| error(&e))?);
            }
            (place, _) => self.place = place,
        }
        Ok(())
    }

    fn park(&mut self) -> Result<(), Error> {
        if let (Place::Running(id), Some(worker)) = (&self.place, self.workers.first()) {
            self.place = Place::Parked(worker.remove(*id).map_err(|e| error(&e))?);
        }
        Ok(())
    }
}

fn error(message: &impl ToString) -> Error {
    Error::Device {
        device: NAME.into(),
        message: message.to_string(),
    }
}

impl Lifecycle for Serial {
    fn start(&mut self) -> Result<(), Error> {
        self.run()
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.park()
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.run()
    }

    fn reset(&mut self) -> Result<(), Error> {
        lock(&self.uart)
            .set(&SerialState::default())
            .map_err(|e| error(&e))
    }

    fn halt(&mut self) {
        if let Err(error) = self.park() {
            tracing::warn!(%error, "halt");
        }
        // The port ends with the line, after its last words.
        self.place = Place::Halted;
    }

    fn save(&self) -> Result<SavedState, Error> {
        let state = State::from(lock(&self.uart).registers.state());
        SavedState::pack(NAME, 1, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), Error> {
        let state: State = state.unpack(NAME, 1)?;
        lock(&self.uart).set(&state.into()).map_err(|e| error(&e))
    }
}

#[cfg(test)]
mod tests;
