//! What the vCPUs of a domain share.

use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use blanket_devices::lifecycle;
use blanket_memory::GuestRam;
use blanket_pv_shim::layout::{self, Data};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_regs};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::abi::{Errno, PAGE_SIZE, VcpuRunstateInfo};
use super::cpuid::Visible;
use super::debug::Debug;
use super::events::Events;
use super::mmu::Space;
use super::parts::EarlyConsole;
use super::runstate::{Meter, RunState, State};
use super::shim::Part;
use super::time::Time;
use crate::vcpu::{kick_signal, wait_for_kick};

/// A handler of the guest's trap table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trap {
    /// Privilege that `int` needs in its lowest two bits, 4: events are masked.
    pub flags: u8,
    /// Its address; 0: none.
    pub address: u64,
}

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Online {
    /// It has no registers yet.
    #[default]
    Never,
    /// It has registers and does not run.
    Down,
    /// It runs.
    Up,
}

/// The registers that a vCPU begins with.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Begin {
    /// General registers.
    pub regs: kvm_regs,
    /// Page table.
    pub cr3: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
}

/// What only the monitor knows of a vCPU.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CpuState {
    /// The registers to begin with, until it has.
    pub begin: Option<Begin>,
    /// Handlers by vector.
    pub traps: Vec<Trap>,
    /// Handler for segments that could not be loaded on a return.
    pub failsafe: u64,
    /// Frames of the descriptor table.
    pub gdt: Vec<u64>,
    /// Entries of it.
    pub gdt_entries: u64,
    /// The local descriptor table: address and entries.
    pub ldt: (u64, u64),
    /// Breakpoints, and what they met.
    pub debug: Debug,
    /// CR4 as the guest has set it.
    pub cr4: u64,
    /// The system time at which the timer fires.
    pub deadline: Option<u64>,
    /// The vCPU's thread has to set its timer.
    pub rearm: bool,
    /// Where it is in its life.
    pub online: Online,
    /// What it has been doing.
    pub run: RunState,
    /// Where it wants its time for user code.
    pub time_area: u64,
}

impl CpuState {
    /// Whether tables from elsewhere have the sizes that all of this relies on.
    pub(crate) fn is_sound(&self) -> bool {
        const VECTORS: usize = 256;
        const GDT_PAGES: usize = 14;
        self.traps.len() == VECTORS && self.gdt.len() <= GDT_PAGES
    }
}

/// A vCPU, as others see it.
pub(crate) struct Cpu {
    /// What only the monitor knows.
    state: Mutex<CpuState>,
    /// Whether it is in the guest, so that it does not see by itself what is
    /// asked of it.
    pub in_guest: AtomicBool,
    /// How often it has entered the guest.
    pub entries: AtomicU64,
    /// Hypercalls that nobody knows.
    pub unknown: AtomicU64,
    /// Hypercalls that came to the monitor.
    pub hypercalls: AtomicU64,
    /// Exceptions that came to the monitor.
    pub exceptions: AtomicU64,
    /// Its thread, once that runs.
    thread: AtomicU64,
    /// What the node's kernel knows of that.
    meter: OnceLock<Meter>,
    /// It waits outside of the guest.
    sleeps: AtomicBool,
    /// Interrupts it: it looks at its events.
    interrupt: EventFd,
}

impl Cpu {
    /// One that has not been set up, except by its reset; `interrupt` is wired
    /// to it.
    #[must_use]
    pub(crate) fn new(interrupt: EventFd) -> Self {
        Self {
            state: Mutex::default(),
            in_guest: AtomicBool::new(false),
            entries: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            hypercalls: AtomicU64::new(0),
            exceptions: AtomicU64::new(0),
            thread: AtomicU64::new(0),
            meter: OnceLock::new(),
            sleeps: AtomicBool::new(false),
            interrupt,
        }
    }

    /// Interrupts it: it looks at its events.
    pub(crate) fn interrupt(&self) {
        // It fails only where the counter is full: then it is pending already.
        let _ = self.interrupt.write(1);
    }

    /// The calling thread will be the vCPU's: from now on its time is accounted
    /// for. To be called before the thread's filter forbids it.
    pub(crate) fn measure(&self) {
        self.meter.get_or_init(Meter::of_this_thread);
    }

    /// The calling thread is the vCPU's.
    pub(crate) fn attach(&self) {
        // SAFETY: it only reads the thread's own identity.
        let thread = unsafe { libc::pthread_self() };
        self.thread.store(thread, Ordering::Release);
    }

    /// Takes it out of the guest, or out of [`Cpu::sleep`].
    pub(crate) fn kick(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: vCPU threads are joined after all that may kick them has
            // ended, and the signal has a handler.
            unsafe {
                libc::pthread_kill(thread, kick_signal());
            }
        }
    }

    /// Whether the calling thread is the vCPU's.
    #[must_use]
    pub(crate) fn is_this_thread(&self) -> bool {
        // SAFETY: as in attach.
        self.thread.load(Ordering::Acquire) == unsafe { libc::pthread_self() }
    }

    /// Wakes it if it sleeps.
    pub(crate) fn wake(&self) {
        if self.sleeps.load(Ordering::SeqCst) {
            self.kick();
        }
    }

    /// Waits for a kick. (One that came since the last is still there.)
    pub(crate) fn sleep(&self, most: Duration) {
        self.sleeps.store(true, Ordering::SeqCst);
        wait_for_kick(most);
        self.sleeps.store(false, Ordering::SeqCst);
    }

    /// What only the monitor knows.
    pub(crate) fn state(&self) -> MutexGuard<'_, CpuState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A domain.
pub(crate) struct Domain {
    /// All memory, the hypervisor's area included.
    pub ram: GuestRam,
    /// Bytes of the domain's own, from address 0 on.
    pub memory: u64,
    /// Kernel and user code share one address space.
    pub trusted: bool,
    /// Its vCPUs.
    pub cpus: Arc<Vec<Cpu>>,
    /// Event channels.
    pub events: Arc<Events>,
    /// Clocks.
    pub time: Arc<Time>,
    /// What CPUID says.
    pub cpuid: Arc<Visible>,
    /// Takes what the kernel writes to the hypervisor's console.
    pub console: EarlyConsole,
    /// Pages that the guest has given back.
    pub given: AtomicU64,
    /// What the guest reads as its identity.
    pub uuid: Mutex<[u8; 16]>,
    /// KVM has VMX or SVM: ring 0 is real.
    pub hardware: bool,
    /// The frame of its `start_info`, if the guest has suspended itself.
    pub suspended: Mutex<Option<u64>>,
}

impl Domain {
    /// The part of vCPU `index`.
    #[must_use]
    pub(crate) fn part(&self, index: usize) -> Part<'_> {
        Part::new(&self.ram, index)
    }

    /// The address space of the kernel on vCPU `index`.
    #[must_use]
    pub(crate) fn space(&self, index: usize) -> Space<'_> {
        let cr3 = self.part(index).get(offset_of!(Data, kernel_cr3));
        Space::new(&self.ram, cr3.unwrap_or(u64::MAX))
    }

    /// Has the other vCPUs in `mask` load their page tables before they run
    /// guest code again. On return they have, or are on their way out of here.
    pub(crate) fn flush_others(&self, own: usize, mask: u64) {
        let others = (0..self.cpus.len()).filter(|i| *i != own && mask >> i & 1 != 0);
        let mut waiting = Vec::new();
        for index in others {
            if self.part(index).set8(offset_of!(Data, flush), 1).is_err() {
                continue;
            }
            fence(Ordering::SeqCst);
            let entries = self.cpus[index].entries.load(Ordering::SeqCst);
            if self.runs(index) {
                self.cpus[index].interrupt();
                waiting.push((index, entries));
            }
        }
        for (index, entries) in waiting {
            self.wait_for_flush(index, entries);
        }
    }

    /// Waits until a vCPU has flushed, or has left the guest since it had
    /// entered it for the `entries`th time: it meets the interrupt then before
    /// anything else. One whose shim does not answer is taken out.
    fn wait_for_flush(&self, index: usize, entries: u64) {
        const SPINS: u32 = 100;
        const YIELDS: u32 = 1000;
        let cpu = &self.cpus[index];
        let mut tries = 0u32;
        while self.runs(index)
            && cpu.entries.load(Ordering::SeqCst) == entries
            && matches!(self.part(index).get8(offset_of!(Data, flush)), Ok(1))
        {
            tries += 1;
            if tries < SPINS {
                std::hint::spin_loop();
            } else {
                if tries.is_multiple_of(YIELDS) {
                    cpu.kick();
                }
                std::thread::yield_now();
            }
        }
    }

    /// Brings the clock of a vCPU into its information areas.
    pub(crate) fn write_time(&self, index: usize) {
        const TIME: u64 = 32;
        let info = self.time.info();
        if let Some(at) = self.events.vcpu_info(index) {
            let _ = self.ram.write_obj(info, GuestAddress(at.0 + TIME));
        }
    }

    /// Tells the guest the time of day at system time 0.
    ///
    /// # Errors
    /// The area is not in memory.
    pub(crate) fn write_wall_clock(&self) -> Result<(), GuestMemoryError> {
        const VERSION: u64 = 3072;
        let (seconds, nanoseconds) = self.time.wall();
        let words = [2, seconds as u32, nanoseconds, (seconds >> 32) as u32];
        let at = layout::GPA + layout::SHARED_INFO + VERSION;
        self.ram.write_obj(words, GuestAddress(at))
    }

    /// A vCPU's counters: of the monitor and of its shim.
    #[must_use]
    pub(crate) fn counters(&self, index: usize) -> Vec<(&'static str, u64)> {
        let cpu = &self.cpus[index];
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut all = vec![
            ("monitor_hypercalls", count(&cpu.hypercalls)),
            ("monitor_exceptions", count(&cpu.exceptions)),
            ("unknown_hypercalls", count(&cpu.unknown)),
        ];
        for (i, name) in layout::COUNTERS.iter().enumerate() {
            let field = offset_of!(Data, counters) + 8 * i;
            all.push((name, self.part(index).get(field).unwrap_or(0)));
        }
        all.extend(self.account(index).times());
        all
    }

    /// Lets the clocks go on after a pause, and the timers with them.
    ///
    /// # Errors
    /// The area is not in memory.
    pub(crate) fn resume_clocks(&self) -> Result<(), lifecycle::Error> {
        self.time.resume();
        self.write_wall_clock()
            .map_err(|error| lifecycle::Error::Device {
                device: "clock".to_owned(),
                message: error.to_string(),
            })?;
        for (index, cpu) in self.cpus.iter().enumerate() {
            self.write_time(index);
            let mut state = cpu.state();
            state.rearm = true;
            state.debug.reload = true;
            if state.time_area != 0 {
                // The guest may have taken the page away: that is its loss.
                let _ = self.space(index).put(state.time_area, self.time.info());
            }
        }
        Ok(())
    }

    /// What a vCPU has been doing until now.
    #[must_use]
    pub(crate) fn account(&self, index: usize) -> RunState {
        let cpu = &self.cpus[index];
        let mut state = cpu.state();
        let same = state.run.state();
        state.run.enter(same, self.time.now(), cpu.meter.get());
        state.run.clone()
    }

    /// The same, as the guest reads it.
    #[must_use]
    pub(crate) fn runstate(&self, index: usize) -> VcpuRunstateInfo {
        let halted = self.part(index).get8(offset_of!(Data, asleep));
        self.account(index).info(matches!(halted, Ok(1)))
    }

    /// A vCPU enters a run state, and its guest is told. Only for the vCPU's
    /// own thread: nobody reads meanwhile who could not see that it changes.
    pub(crate) fn enter(&self, index: usize, next: State) {
        let cpu = &self.cpus[index];
        let mut state = cpu.state();
        state.run.enter(next, self.time.now(), cpu.meter.get());
        let RunState { area, marked, .. } = state.run;
        drop(state);
        if area != 0 {
            self.write_runstate(index, area, marked);
        }
    }

    /// Tells the guest a vCPU's run state. Others may read it meanwhile: they
    /// look at the time before and after.
    fn write_runstate(&self, index: usize, area: u64, marked: bool) {
        const MARK: u64 = 1 << 63;
        let info = self.runstate(index);
        let space = self.space(index);
        let entry = area.wrapping_add(offset_of!(VcpuRunstateInfo, state_entry_time) as u64);
        if marked {
            let _ = space.put(entry, info.state_entry_time | MARK);
            fence(Ordering::SeqCst);
            let changing = VcpuRunstateInfo {
                state_entry_time: info.state_entry_time | MARK,
                ..info
            };
            let _ = space.put(area, changing);
            fence(Ordering::SeqCst);
            let _ = space.put(entry, info.state_entry_time);
        } else {
            let _ = space.put(area, info);
        }
    }

    /// Sets a debug register of a vCPU.
    ///
    /// # Errors
    /// There is no such register, or it may not have that value; or it would
    /// set a breakpoint, which KVM without hardware virtualization ignores.
    pub(crate) fn set_debug(&self, index: usize, register: u64, value: u64) -> Result<(), Errno> {
        let mut state = self.cpus[index].state();
        let mut debug = state.debug.clone();
        debug.set(register, value)?;
        if debug.has_breakpoints() && !self.hardware {
            return Err(Errno::Perm);
        }
        state.debug = debug;
        Ok(())
    }

    /// Pages that the guest has given back.
    #[must_use]
    pub(crate) fn ballooned(&self) -> u64 {
        self.given
            .load(Ordering::Relaxed)
            .min(self.memory / PAGE_SIZE)
    }

    /// Counts pages that it gives (or takes).
    pub(crate) fn balloon(&self, pages: i64) {
        self.given
            .fetch_add(pages.cast_unsigned(), Ordering::Relaxed);
    }

    /// Whether a vCPU may be using its page table.
    fn runs(&self, index: usize) -> bool {
        self.cpus[index].in_guest.load(Ordering::SeqCst)
            && matches!(self.part(index).get8(offset_of!(Data, asleep)), Ok(0))
    }
}

/// Has KVM interrupt vCPU `index` when an eventfd is signalled: any thread
/// may, whatever its filter.
///
/// # Errors
/// No descriptor is left, or KVM refuses the wiring.
pub(crate) fn wire_interrupts(vm: &VmFd, count: usize) -> io::Result<Vec<EventFd>> {
    const ADDRESS: u32 = 0xfee0_0000;
    const DESTINATION: u32 = 12;
    let route = |index: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi: index,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = ADDRESS | index << DESTINATION;
        entry.u.msi.data = u32::from(layout::EVENT_VECTOR);
        entry
    };
    let routes: Vec<_> = (0..count as u32).map(route).collect();
    let routing = KvmIrqRouting::from_entries(&routes)
        .map_err(|error| io::Error::other(format!("{error:?}")))?;
    vm.set_gsi_routing(&routing)?;
    (0..count as u32)
        .map(|index| {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            vm.register_irqfd(&event, index)?;
            Ok(event)
        })
        .collect()
}
