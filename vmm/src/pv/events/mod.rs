//! Event channels, by the two-level ABI (`event_channel.h`).
//!
//! What is bound to what is the hypervisor's table, which the guest changes by
//! hypercalls. What is pending and what is masked are bits in pages that the
//! guest writes at any time: nothing here relies on what it finds there.

mod bits;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::mem::offset_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_devices::xen::{BACKEND, EventChannels};
use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::abi::{EVENT_CHANNELS, Errno, PAGE_SIZE, VcpuInfo, virq};
use bits::{Bits, place};
use table::{FREE, Port, Table};
pub use table::{Invalid, SavedEvents, Status};

/// Ports that one vCPU may poll at a time.
pub const MAX_POLLED: usize = 128;

/// Value of a port's doorbell when the guest's notifications go to a backend.
const BOUND: u8 = 1;

/// Makes a vCPU look for events. Called without any lock held.
pub type Wake = Arc<dyn Fn(usize) + Send + Sync>;

/// Has KVM signal an eventfd when the guest rings for a port, or stop that.
pub type Register = Arc<dyn Fn(&EventFd, u32, bool) -> io::Result<()> + Send + Sync>;

/// Where in guest memory the event channels' shared parts lie.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The page of [`SharedInfo`].
    pub shared_info: GuestAddress,
    /// One byte per port: 1 if a notification is for a backend, else 0.
    pub doorbells: GuestAddress,
}

/// The event channels of one guest.
pub struct Events {
    bits: Bits,
    vcpus: usize,
    wake: Wake,
    register: Register,
    table: Mutex<Table>,
    /// Held while KVM's wiring changes, which may take milliseconds; taken
    /// before the table's lock.
    wiring: Mutex<()>,
}

/// vCPUs to be woken once the lock is free.
#[derive(Default)]
struct Woken {
    target: Option<usize>,
    pollers: Vec<usize>,
}

impl Events {
    /// Event channels of a guest with `vcpus` vCPUs, all closed. Guest memory
    /// is not touched: see [`Events::initialize`].
    pub fn new(
        memory: GuestRam,
        places: Places,
        vcpus: usize,
        wake: Wake,
        register: Register,
    ) -> Self {
        Self {
            table: Mutex::new(Table::new(vcpus, places.shared_info)),
            wiring: Mutex::new(()),
            bits: Bits { memory, places },
            vcpus,
            wake,
            register,
        }
    }

    /// Makes all as a new domain finds it: no port is bound, every one is
    /// masked, and so are all vCPUs.
    pub fn initialize(&self) {
        let _wiring = lock(&self.wiring);
        self.close_all();
        *self.table() = Table::new(self.vcpus, self.bits.places.shared_info);
        self.forget_all();
        for vcpu in 0..self.vcpus {
            if let Some(info) = self.vcpu_info(vcpu) {
                self.bits
                    .swap_byte(info.0 + offset_of!(VcpuInfo, evtchn_upcall_mask) as u64, 1);
            }
        }
    }

    /// For a guest that goes on in a new domain: no port is bound, and every one
    /// is masked. The vCPUs' information stays where it is: the guest says again
    /// where it wants it.
    pub fn renew(&self) {
        let _wiring = lock(&self.wiring);
        self.close_all();
        {
            let mut table = self.table();
            table.ports.truncate(1);
            table.kicks.truncate(1);
        }
        self.forget_all();
    }

    /// No port is pending, and every one is masked.
    fn forget_all(&self) {
        for word in 0..u64::from(EVENT_CHANNELS / 64) {
            self.bits.store(self.bits.pending_word(word), 0);
            self.bits.store(self.bits.mask_word(word), u64::MAX);
        }
        for vcpu in 0..self.vcpus {
            if let Some(info) = self.vcpu_info(vcpu) {
                self.bits
                    .store(info.0 + offset_of!(VcpuInfo, evtchn_pending_sel) as u64, 0);
                self.bits.swap_byte(info.0, 0);
            }
        }
    }

    /// Moves a vCPU's information to where the guest wants it
    /// (`VCPUOP_register_vcpu_info`). Everything is marked pending, so that no
    /// event is lost.
    ///
    /// # Errors
    /// `Inval`: no such vCPU, or it lies across pages, unaligned, or not in memory.
    pub fn set_vcpu_info(&self, vcpu: usize, at: GuestAddress) -> Result<(), Errno> {
        let size = size_of::<VcpuInfo>();
        if at.0 % PAGE_SIZE > PAGE_SIZE - size as u64
            || !at.0.is_multiple_of(align_of::<VcpuInfo>() as u64)
            || self.bits.memory.get_slice(at, size).is_err()
        {
            return Err(Errno::Inval);
        }
        let mut table = self.table();
        let info = table.vcpu_info.get_mut(vcpu).ok_or(Errno::Inval)?;
        let mut content = [0; size_of::<VcpuInfo>()];
        // A vCPU without one before starts with all masked.
        content[offset_of!(VcpuInfo, evtchn_upcall_mask)] = 1;
        if let Some(old) = info.replace(at) {
            let _ = self.bits.memory.read_slice(&mut content, old);
        }
        let _ = self.bits.memory.write_slice(&content, at);
        self.bits.store(
            at.0 + offset_of!(VcpuInfo, evtchn_pending_sel) as u64,
            u64::MAX,
        );
        self.bits.swap_byte(at.0, 1);
        drop(table);
        (self.wake)(vcpu);
        Ok(())
    }

    /// Where a vCPU's information lies now.
    #[must_use]
    pub fn vcpu_info(&self, vcpu: usize) -> Option<GuestAddress> {
        self.table().vcpu_info.get(vcpu).copied().flatten()
    }

    /// Allocates a port that `remote` may bind (`EVTCHNOP_alloc_unbound`).
    ///
    /// # Errors
    /// `NoSpc`: all ports are taken.
    pub fn alloc_unbound(&self, remote: u16) -> Result<u32, Errno> {
        self.table().allocate(Port {
            status: Status::Unbound { remote },
            vcpu: 0,
        })
    }

    /// Binds a virtual interrupt to a new port (`EVTCHNOP_bind_virq`).
    ///
    /// # Errors
    /// `Inval`: no such interrupt, or a global one for another vCPU than the
    /// first. `NoEnt`: no such vCPU. `Exist`: it is bound. `NoSpc`.
    pub fn bind_virq(&self, number: u32, vcpu: usize) -> Result<u32, Errno> {
        if number >= virq::COUNT || (!virq::is_per_vcpu(number) && vcpu != 0) {
            return Err(Errno::Inval);
        }
        if vcpu >= self.vcpus {
            return Err(Errno::NoEnt);
        }
        let mut table = self.table();
        if table.virq_port(number, vcpu).is_some() {
            return Err(Errno::Exist);
        }
        let status = Status::Virq { virq: number };
        table.allocate(Port { status, vcpu })
    }

    /// Allocates a port for interrupts to `vcpu` (`EVTCHNOP_bind_ipi`).
    ///
    /// # Errors
    /// `NoEnt`: no such vCPU. `NoSpc`.
    pub fn bind_ipi(&self, vcpu: usize) -> Result<u32, Errno> {
        if vcpu >= self.vcpus {
            return Err(Errno::NoEnt);
        }
        let status = Status::Ipi;
        self.table().allocate(Port { status, vcpu })
    }

    /// Says which vCPU is told of a port's events (`EVTCHNOP_bind_vcpu`).
    ///
    /// # Errors
    /// `NoEnt`: no such vCPU. `Inval`: no such port, or one that is a vCPU's own.
    pub fn bind_vcpu(&self, port: u32, vcpu: usize) -> Result<(), Errno> {
        if vcpu >= self.vcpus {
            return Err(Errno::NoEnt);
        }
        let mut table = self.table();
        match table.get(port)?.status {
            Status::Closed | Status::Ipi => return Err(Errno::Inval),
            Status::Virq { virq: number } if virq::is_per_vcpu(number) => {
                return Err(Errno::Inval);
            }
            _ => {}
        }
        table.ports[port as usize].vcpu = vcpu;
        Ok(())
    }

    /// Frees a port, whatever it is bound to (`EVTCHNOP_close`).
    ///
    /// # Errors
    /// `Inval`: it is not in use.
    pub fn close(&self, port: u32) -> Result<(), Errno> {
        let _wiring = lock(&self.wiring);
        if self.table().get(port)?.status == Status::Closed {
            return Err(Errno::Inval);
        }
        self.free(port, FREE);
        Ok(())
    }

    /// Frees all ports (`EVTCHNOP_reset`).
    pub fn reset(&self) {
        let _wiring = lock(&self.wiring);
        self.close_all();
    }

    /// Notifies the other end of a port (`EVTCHNOP_send`).
    ///
    /// # Errors
    /// `Inval`: it has no other end.
    pub fn send(&self, port: u32) -> Result<(), Errno> {
        let table = self.table();
        let woken = match table.get(port)?.status {
            Status::Closed | Status::Virq { .. } => return Err(Errno::Inval),
            // Nobody listens yet; who binds looks first.
            Status::Unbound { .. } => return Ok(()),
            Status::Interdomain { .. } => {
                if let Some(kick) = &table.kicks[port as usize] {
                    // It fails only if the counter is full: then it is signalled.
                    let _ = kick.write(1);
                }
                return Ok(());
            }
            Status::Ipi => self.raise(&table, port),
        };
        drop(table);
        self.wake_up(&woken);
        Ok(())
    }

    /// Clears a port's mask and tells its vCPU if it is pending (`EVTCHNOP_unmask`).
    ///
    /// # Errors
    /// `Inval`: it is not in use.
    pub fn unmask(&self, port: u32) -> Result<(), Errno> {
        let table = self.table();
        let Port { status, vcpu } = table.get(port)?;
        if status == Status::Closed {
            return Err(Errno::Inval);
        }
        let (word, bit) = place(port);
        let was_masked = self.bits.fetch_and(self.bits.mask_word(word), !bit) & bit != 0;
        let pending = self.bits.load(self.bits.pending_word(word)) & bit != 0;
        let woken = was_masked && pending && self.mark(&table, vcpu, word);
        drop(table);
        if woken {
            (self.wake)(vcpu);
        }
        Ok(())
    }

    /// What a port is bound to, and which vCPU is told (`EVTCHNOP_status`).
    ///
    /// # Errors
    /// `Inval`: no such port.
    pub fn status(&self, port: u32) -> Result<(Status, usize), Errno> {
        if port >= EVENT_CHANNELS {
            return Err(Errno::Inval);
        }
        let port = self.table().get(port).unwrap_or(FREE);
        Ok((port.status, port.vcpu))
    }

    /// Raises a virtual interrupt on `vcpu`, if the guest has bound it.
    pub fn virq(&self, number: u32, vcpu: usize) {
        let table = self.table();
        let port = table.virq_port(number, vcpu);
        let woken = port.map(|port| self.raise(&table, port));
        drop(table);
        self.wake_up(&woken.unwrap_or_default());
    }

    /// The port of a vCPU's timer interrupt; 0 if the guest has not bound it.
    #[must_use]
    pub fn timer_port(&self, vcpu: usize) -> u32 {
        self.table().virq_port(virq::TIMER, vcpu).unwrap_or(0)
    }

    /// Whether an upcall is due on `vcpu`: an event is pending and not masked.
    #[must_use]
    pub fn pending(&self, vcpu: usize) -> bool {
        let Some(info) = self.vcpu_info(vcpu) else {
            return false;
        };
        // Both bytes at once: they are the first two of the structure.
        let pending_and_mask: u16 = self.bits.memory.read_obj(info).unwrap_or(0);
        pending_and_mask.to_le_bytes()[0] != 0 && pending_and_mask.to_le_bytes()[1] == 0
    }

    /// For `SCHEDOP_poll`: whether one of `ports` is pending. If not, `vcpu` is
    /// woken once one is, masked or not, until [`Events::end_poll`].
    ///
    /// # Errors
    /// `Inval`: no such vCPU or port, or more than [`MAX_POLLED`].
    pub fn poll(&self, vcpu: usize, ports: &[u32]) -> Result<bool, Errno> {
        if ports.len() > MAX_POLLED || ports.iter().any(|port| *port >= EVENT_CHANNELS) {
            return Err(Errno::Inval);
        }
        let mut table = self.table();
        let polled = table.polled.get_mut(vcpu).ok_or(Errno::Inval)?;
        polled.clear();
        polled.extend(ports);
        Ok(ports.iter().any(|port| {
            let (word, bit) = place(*port);
            self.bits.load(self.bits.pending_word(word)) & bit != 0
        }))
    }

    /// `vcpu` polls no more.
    pub fn end_poll(&self, vcpu: usize) {
        if let Some(polled) = self.table().polled.get_mut(vcpu) {
            polled.clear();
        }
    }

    /// The table as it is saved. Bits in guest memory are saved with that.
    #[must_use]
    pub fn save(&self) -> SavedEvents {
        let table = self.table();
        SavedEvents {
            ports: table.ports.clone(),
            vcpu_info: table
                .vcpu_info
                .iter()
                .map(|info| info.map(|at| at.0))
                .collect(),
        }
    }

    /// Takes over a saved table. Backends bind their ports again.
    ///
    /// # Errors
    /// The table is not one of a machine like this.
    pub fn restore(&self, saved: &SavedEvents) -> Result<(), Invalid> {
        let mut ports = saved.ports.clone();
        if ports.first() != Some(&FREE) || ports.len() > EVENT_CHANNELS as usize {
            return Err(Invalid("its table has another size"));
        }
        if saved.vcpu_info.len() != self.vcpus || ports.iter().any(|port| port.vcpu >= self.vcpus) {
            return Err(Invalid("it has another number of vCPUs"));
        }
        for port in &mut ports {
            match port.status {
                Status::Interdomain { remote } => port.status = Status::Unbound { remote },
                Status::Virq { virq: number } if number >= virq::COUNT => {
                    return Err(Invalid("it has an interrupt that is not known"));
                }
                _ => {}
            }
        }
        let mut vcpu_info = Vec::new();
        for at in saved.vcpu_info.iter().copied() {
            let at = at.map(GuestAddress);
            let sound = at.is_none_or(|at| {
                at.0.is_multiple_of(8)
                    && self
                        .bits
                        .memory
                        .get_slice(at, size_of::<VcpuInfo>())
                        .is_ok()
            });
            if !sound {
                return Err(Invalid("a vCPU's information is not in memory"));
            }
            vcpu_info.push(at);
        }
        let _wiring = lock(&self.wiring);
        self.close_all();
        // Restored memory has those of backends that are not bound yet.
        for port in 0..EVENT_CHANNELS {
            self.bits.ring_for(port, 0);
        }
        let mut table = self.table();
        table.kicks = ports.iter().map(|_| None).collect();
        table.ports = ports;
        table.vcpu_info = vcpu_info;
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    fn wake_up(&self, woken: &Woken) {
        for vcpu in woken.target.iter().chain(&woken.pollers) {
            (self.wake)(*vcpu);
        }
    }

    fn close_all(&self) {
        let count = self.table().ports.len() as u32;
        for port in 1..count {
            self.free(port, FREE);
        }
    }

    /// Gives a port another state, unwired. The wiring is locked.
    fn free(&self, port: u32, state: Port) {
        let mut table = self.table();
        table.ports[port as usize] = state;
        let kick = table.kicks[port as usize].take();
        drop(table);
        if let Some(kick) = kick {
            self.bits.ring_for(port, 0);
            // A registration that is gone already is what we want.
            let _ = (self.register)(&kick, port, false);
        }
        if state.status == Status::Closed {
            let (word, bit) = place(port);
            self.bits.fetch_and(self.bits.pending_word(word), !bit);
        }
    }

    /// Sets a port pending and tells its vCPU, unless masked.
    fn raise(&self, table: &Table, port: u32) -> Woken {
        let (word, bit) = place(port);
        if self.bits.fetch_or(self.bits.pending_word(word), bit) & bit != 0 {
            return Woken::default();
        }
        let vcpu = table.ports[port as usize].vcpu;
        let masked = self.bits.load(self.bits.mask_word(word)) & bit != 0;
        let target = (!masked && self.mark(table, vcpu, word)).then_some(vcpu);
        let polls = |(vcpu, ports): (usize, &Vec<u32>)| ports.contains(&port).then_some(vcpu);
        Woken {
            target,
            pollers: table.polled.iter().enumerate().filter_map(polls).collect(),
        }
    }

    /// Tells a vCPU of a word of events; whether that is news to it.
    fn mark(&self, table: &Table, vcpu: usize, word: u64) -> bool {
        let Some(info) = table.vcpu_info.get(vcpu).copied().flatten() else {
            return false;
        };
        let selector = info.0 + offset_of!(VcpuInfo, evtchn_pending_sel) as u64;
        let news = self.bits.fetch_or(selector, 1 << word) & (1 << word) == 0;
        if news {
            self.bits.swap_byte(info.0, 1);
        }
        news
    }
}

impl EventChannels for Events {
    fn bind(&self, port: u32, kick: &EventFd) -> io::Result<()> {
        let _wiring = lock(&self.wiring);
        let waits = Status::Unbound { remote: BACKEND };
        let mut table = self.table();
        let Port { status, vcpu } = table.get(port).unwrap_or(FREE);
        if status != waits {
            let why = format!("event channel {port} of the guest does not wait for a backend");
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        table.kicks[port as usize] = Some(kick.try_clone()?);
        table.ports[port as usize].status = Status::Interdomain { remote: BACKEND };
        drop(table);
        if let Err(error) = (self.register)(kick, port, true) {
            let mut table = self.table();
            table.kicks[port as usize] = None;
            table.ports[port as usize] = Port {
                status: waits,
                vcpu,
            };
            return Err(error);
        }
        self.bits.ring_for(port, BOUND);
        kick.write(1)
    }

    fn unbind(&self, port: u32) {
        let _wiring = lock(&self.wiring);
        let Port { status, vcpu } = self.table().get(port).unwrap_or(FREE);
        if let Status::Interdomain { remote } = status {
            let status = Status::Unbound { remote };
            self.free(port, Port { status, vcpu });
        }
    }

    fn notify(&self, port: u32) {
        let table = self.table();
        let Ok(Status::Interdomain { .. }) = table.get(port).map(|port| port.status) else {
            return;
        };
        let woken = self.raise(&table, port);
        drop(table);
        self.wake_up(&woken);
    }
}

/// A lock, whatever became of another thread that held it: all that it guards
/// is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
