//! A vCPU whose guest reaches devices by ports and memory.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Counters, Event, Outcome, Processor, complete_access, exits, interrupted};

/// What answers a guest's accesses to ports and device memory.
pub trait Bus: Send + Sync {
    /// A read from a port.
    fn read_port(&self, port: u16, data: &mut [u8]);
    /// A write to a port.
    fn write_port(&self, port: u16, data: &[u8]) -> Outcome;
    /// A read from memory that is not RAM.
    fn read_memory(&self, addr: u64, data: &mut [u8]);
    /// A write to memory that is not RAM.
    fn write_memory(&self, addr: u64, data: &[u8]) -> Outcome;
}

/// A vCPU on a bus.
pub struct OnBus(
    /// The bus.
    pub Arc<dyn Bus>,
);

impl Processor for OnBus {
    fn step(&mut self, fd: &mut VcpuFd, counters: &Counters) -> Outcome {
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.io.add();
                self.0.read_port(port, data);
                Outcome::Continue
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.io.add();
                self.0.write_port(port, data)
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                counters.mmio.add();
                self.0.read_memory(addr, data);
                Outcome::Continue
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                counters.mmio.add();
                self.0.write_memory(addr, data)
            }
            // A triple fault resets a PC.
            Ok(VcpuExit::Shutdown) => Outcome::Event(Event::Reset),
            Ok(VcpuExit::Intr) => interrupted(counters),
            Ok(VcpuExit::InternalError) => Outcome::Event(Event::Failed(exits::internal(fd))),
            Ok(other) => exits::other(&other),
            Err(error) => exits::failed_run(error, counters),
        }
    }

    fn stop(&mut self, fd: &mut VcpuFd) {
        complete_access(fd);
    }
}
