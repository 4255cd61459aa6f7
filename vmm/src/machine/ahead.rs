//! A VM that is made while its machine's parts are still being opened.
//!
//! KVM takes its time for a VM and for the first memory that it gets, whatever its
//! size: it waits until no processor uses what was there before, and has nothing
//! ready for that yet. So a thread makes a VM first thing in the process's life,
//! gives it a page, and takes that away again. What comes later takes no time to
//! speak of, [up to interrupt controllers](super::furnish). It is done before the
//! process gives up its privileges, as each thread has its own.

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use blanket_devices::worker::STACK;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};

use super::{Error, kvm};

/// A page of this process's.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// A VM in the making. Its thread does not outlive it.
pub struct Ahead {
    thread: Option<JoinHandle<Result<VmFd, Error>>>,
    made: Arc<OnceLock<Instant>>,
}

impl Ahead {
    /// Begins, under the filter of the calling thread.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn begin() -> io::Result<Self> {
        let made = Arc::new(OnceLock::new());
        let moment = Arc::clone(&made);
        let thread = std::thread::Builder::new()
            .name("kvm".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let kvm = Kvm::new().map_err(|error| crate::hvm::no_kvm(error.into()))?;
                let vm = make(&kvm)?;
                accustom(&vm)?;
                let _ = moment.set(Instant::now());
                Ok(vm)
            })?;
        Ok(Self {
            thread: Some(thread),
            made,
        })
    }

    /// The moment at which it was ready, once it is.
    pub(crate) fn made(&self) -> Arc<OnceLock<Instant>> {
        Arc::clone(&self.made)
    }

    /// The VM, when it is ready. If it could not be made, whoever tries again finds
    /// out why.
    fn wait(mut self) -> Option<VmFd> {
        match self.thread.take()?.join() {
            Ok(Ok(vm)) => Some(vm),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no VM was made ahead");
                None
            }
            Err(_) => None,
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // It has privileges of its own, which others are about to give up.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The VM that was made ahead, or one that is made now: without memory, and without
/// interrupt controllers.
pub(crate) fn take(ahead: Option<Ahead>, host: &Kvm) -> Result<VmFd, Error> {
    match ahead.and_then(Ahead::wait) {
        Some(vm) => Ok(vm),
        None => make(host),
    }
}

fn make(host: &Kvm) -> Result<VmFd, Error> {
    host.create_vm().map_err(kvm("create a VM"))
}

/// Gives a VM a page, and takes it away.
fn accustom(vm: &VmFd) -> Result<(), Error> {
    let page = Box::new(Page([0; 4096]));
    for memory_size in [4096, 0] {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: page.0.as_ptr() as u64,
        };
        // SAFETY: the page outlives the slot, as no vCPU is there to use it: the
        // second round removes the slot, and if that fails, the VM goes.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm("map guest memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_was_made_ahead_is_like_any_other() {
        let Ok(host) = Kvm::new() else {
            println!("skipped, because /dev/kvm cannot be used");
            return;
        };
        let ahead = Ahead::begin().unwrap();
        let made = ahead.made();
        let vm = take(Some(ahead), &host).unwrap();
        assert!(made.get().is_some(), "it was this one");
        // Its place in memory is free.
        let ram = blanket_memory::build(&blanket_memory::Spec {
            size: 32 << 20,
            backing: blanket_memory::Backing::Small,
            shared: false,
        });
        super::super::furnish(&vm, &ram.unwrap()).unwrap();
        assert!(vm.create_irq_chip().is_err(), "there are some");
        vm.create_vcpu(0).unwrap();
        // Nobody made one ahead.
        take(None, &host).unwrap().create_vcpu(0).unwrap();
    }
}
