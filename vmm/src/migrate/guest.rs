//! The machine as the engine sees it.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use blanket_devices::vhost_user::Logger;
use blanket_memory::GuestRam;
use blanket_memory::dirty::{self, PAGE, Pages};
use blanket_memory::shared_log::SharedLog;
use blanket_migration::{Disks, Guest, Machine, Place, Remote};
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use tokio::sync::mpsc::UnboundedSender;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::slow::Slowed;
use super::{Frames, Order, What};
use crate::machine::map_memory_with;
use crate::snapshot::pager::Pager;
use crate::snapshot::{Touched, clear};
use crate::vcpu::Brake;
use blanket_drivers::rings::Rings;

/// Memory that the guest, its devices and the monitor write.
pub struct Tracked {
    pub(crate) ram: GuestRam,
    pub(crate) vm: Arc<VmFd>,
    /// Where KVM lists what the guest writes, if that is not in its log.
    pub(crate) rings: Option<Arc<Rings>>,
    pub(crate) touched: Touched,
    /// Backends that write it, too.
    pub(crate) loggers: Vec<Logger>,
    /// What they note.
    pub(crate) logs: Vec<Arc<SharedLog>>,
}

impl Tracked {
    /// Begins to note what is written, by whomever.
    pub(super) fn start(&mut self) -> Result<(), String> {
        let end = self.ram.last_addr().0 + 1;
        let logs = self.loggers.iter().map(|logger| logger.start(end));
        self.logs = logs
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        dirty::start(&self.ram).map_err(|error| error.to_string())?;
        if let Some(rings) = &self.rings {
            rings.start(&self.ram).map_err(untold)?;
        }
        map_memory_with(&self.vm, &self.ram, KVM_MEM_LOG_DIRTY_PAGES)
            .map_err(|error| error.to_string())
    }

    /// Notes no more.
    pub(super) fn stop(&self) {
        dirty::stop(&self.ram);
        self.loggers.iter().for_each(Logger::stop);
        if let Err(error) = map_memory_with(&self.vm, &self.ram, 0) {
            tracing::warn!(%error, "KVM goes on to log what the guest writes");
        }
        // What is listed now nobody wants any more.
        if let Some(rings) = &self.rings {
            rings.stop();
        }
    }

    /// Takes what was written.
    pub(super) fn take(&self) -> Result<Pages, String> {
        let mut pages = dirty::take(&self.ram);
        if let Some(rings) = &self.rings {
            pages.merge(&rings.take(&self.ram).map_err(untold)?);
        } else {
            for (slot, region) in self.ram.iter().enumerate() {
                let log = self.vm.get_dirty_log(slot as u32, region.len() as usize);
                pages.add(slot, &log.map_err(untold)?);
            }
        }
        for log in &self.logs {
            pages.merge(&log.take(&self.ram));
        }
        Ok(pages)
    }

    /// The pages that may be other than zeros.
    fn used(&mut self) -> Pages {
        let mut pages = Pages::none(&self.ram);
        for (index, region) in self.ram.iter().enumerate() {
            for offset in (0..region.len()).step_by(PAGE) {
                if self.touched.must_read(region, offset) {
                    pages.insert(index, offset as usize / PAGE);
                }
            }
        }
        pages
    }

    /// Makes zeros of it all.
    pub(super) fn clear(&self) -> Result<(), String> {
        clear(&self.ram, self.touched.clone()).map_err(|error| error.to_string())
    }
}

fn untold(error: impl std::fmt::Display) -> String {
    format!("KVM does not tell what was written: {error}")
}

/// Has the main thread do something.
pub(super) fn order(orders: &UnboundedSender<Order>, what: What) -> Result<Vec<u8>, String> {
    const GONE: &str = "the monitor ends";
    let (answer, answered) = sync_channel(1);
    orders
        .send(Order { what, answer })
        .map_err(|_| GONE.to_owned())?;
    answered.recv().map_err(|_| GONE.to_owned())?
}

/// The guest that leaves.
pub(super) struct Leaving {
    pub(super) memory: Tracked,
    pub(super) disks: Arc<Disks>,
    /// What comes for it when it has left.
    pub(super) frames: Frames,
    pub(super) orders: UnboundedSender<Order>,
    /// What its vCPUs can be slowed down with.
    pub(super) brakes: Arc<[Brake]>,
    /// They are.
    pub(super) slowed: Option<Slowed>,
}

impl Guest for Leaving {
    fn ram(&self) -> &GuestRam {
        &self.memory.ram
    }

    fn disks(&self) -> Arc<Disks> {
        Arc::clone(&self.disks)
    }

    fn begin(&mut self) -> Result<Pages, String> {
        self.memory.start()?;
        Ok(self.memory.used())
    }

    fn dirty(&mut self) -> Result<Pages, String> {
        self.memory.take()
    }

    fn end(&mut self) {
        self.memory.stop();
    }

    fn throttle(&mut self, percent: u8) -> Result<(), String> {
        if percent == 0 {
            self.slowed = None;
            return Ok(());
        }
        let slowed = match self.slowed.take() {
            Some(slowed) => slowed,
            None => Slowed::new(&self.brakes).map_err(|error| error.to_string())?,
        };
        self.slowed.insert(slowed).set(percent);
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<u8>, String> {
        order(&self.orders, What::Stop)
    }

    fn resume(&mut self) -> Result<(), String> {
        order(&self.orders, What::Resume).map(drop)
    }

    fn give_up(&mut self) {
        // If there is no main thread any more, nothing can run the guest.
        let _ = order(&self.orders, What::GiveUp);
    }

    fn frame(&mut self, into: &mut Vec<u8>) -> Option<Place> {
        self.frames.take(into)
    }

    fn is_found(&self) -> bool {
        self.frames.are_found()
    }
}

/// The machine for a guest that comes.
pub(super) struct Coming {
    pub(super) memory: Tracked,
    pub(super) disks: Arc<Disks>,
    /// What sees to memory that follows, or why there is nothing.
    pub(super) pager: Result<Arc<Pager>, String>,
    /// How it is reached.
    pub(super) frames: Frames,
    pub(super) orders: UnboundedSender<Order>,
}

impl Machine for Coming {
    fn ram(&self) -> &GuestRam {
        &self.memory.ram
    }

    fn disks(&self) -> &Disks {
        &self.disks
    }

    fn can_follow(&self) -> Result<(), String> {
        self.pager.as_ref().map(drop).map_err(Clone::clone)
    }

    fn follow(&self, remote: Remote) -> Result<(), String> {
        let pager = self.pager.as_ref().map_err(Clone::clone)?;
        pager.follow(remote).map_err(|error| error.to_string())
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        order(&self.orders, What::Restore(state.to_vec())).map(drop)
    }

    fn run(&self) -> Result<(), String> {
        order(&self.orders, What::Run).map(drop)
    }

    fn frame(&self, place: Place, frame: &[u8]) {
        self.frames.put(place, frame);
    }

    fn release(&self) {
        self.frames.let_in();
    }
}
