//! Event channels of a guest without a hypervisor.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use blanket_devices::xen::EventChannels;
use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Ports below this may be bound.
const PORTS: u32 = 16;

/// The ports that backends have bound.
#[derive(Default)]
pub struct Ports(Mutex<BTreeMap<u32, EventFd>>);

impl Ports {
    /// Notifies the backend at `port`, if there is one.
    ///
    /// # Panics
    /// The eventfd cannot be written.
    pub fn send(&self, port: u32) {
        if let Some(kick) = self.bound().get(&port) {
            kick.write(1).expect("a notification");
        }
    }

    fn bound(&self) -> MutexGuard<'_, BTreeMap<u32, EventFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventChannels for Ports {
    fn bind(&self, port: u32, kick: &EventFd) -> io::Result<()> {
        let mut bound = self.bound();
        if port >= PORTS || bound.contains_key(&port) {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        bound.insert(port, kick.try_clone()?);
        Ok(())
    }

    fn unbind(&self, port: u32) {
        self.bound().remove(&port);
    }

    fn notify(&self, _: u32) {}
}

/// Waits until the index at `addr` is `value`.
///
/// # Panics
/// It is not within 5 seconds, or not in memory.
pub fn wait_for(ram: &GuestRam, addr: u64, value: u32) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let index = || ram.read_obj::<u32>(GuestAddress(addr)).expect("an index");
    while index() != value {
        assert!(Instant::now() < deadline, "no response");
        sleep(Duration::from_micros(20));
    }
}
