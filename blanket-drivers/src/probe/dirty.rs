//! How KVM tells which pages a guest writes: its dirty rings, tried out.

use std::io;
use std::sync::Arc;

use blanket_memory::dirty::PAGE;
use blanket_memory::{Backing, GuestRam, Spec};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Finding, Virtualization};
use crate::rings::{self, Rings};

const COST: &str = "migrating a guest of very much memory stops it for longer";
/// In real mode: a byte to the page at 0x1000, stop, and once more.
const PROGRAM: [u8; 8] = [0xc6, 0x06, 0x00, 0x10, 0x01, 0xf4, 0xeb, 0xf8];
/// The guest's memory.
const MEMORY: u64 = 16 * PAGE as u64;

pub(super) fn pages() -> Finding {
    let Ok(kvm) = Kvm::new() else {
        return Finding::missing("/dev/kvm cannot be asked", "no guest can run", "see above");
    };
    if !Virtualization::of_this_machine().is_hardware() {
        return Finding::limited(
            "KVM's dirty log is used: rings miss pages under load without hardware virtualization",
            COST,
            "nothing can be done about it here",
        )
        .fact("dirty", "log");
    }
    match try_out(&kvm) {
        Ok(Ok(entries)) => {
            Finding::ok("KVM lists them in a ring of each vCPU: tried, each write is listed once")
                .fact("dirty", "ring")
                .fact("entries", entries)
        }
        Ok(Err(found)) => Finding::limited(
            format!("KVM has dirty rings, but {found}"),
            "a migration would lose memory",
            "run guests with --dirty log",
        )
        .fact("dirty", "broken"),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Finding::limited(
            "KVM has no dirty rings; its dirty log is used",
            COST,
            "use Linux 5.11 or newer",
        )
        .fact("dirty", "log"),
        Err(error) => Finding::limited(
            format!("KVM's dirty rings cannot be tried: {error}"),
            COST,
            "see above; --dirty log does without",
        )
        .fact("dirty", "unknown"),
    }
}

/// Whether a page that a vCPU writes is in its ring, each time once: the entries
/// that there are, or what was wrong.
fn try_out(kvm: &Kvm) -> io::Result<Result<u64, String>> {
    let vm = Arc::new(kvm.create_vm()?);
    let entries = rings::enable(&vm, 1 << 40)?;
    let ram = blanket_memory::build(&Spec {
        size: MEMORY,
        backing: Backing::Small,
        shared: false,
    });
    let ram = ram.map_err(io::Error::other)?;
    let written = ram.write_slice(&PROGRAM, GuestAddress(0));
    written.map_err(io::Error::other)?;
    let mut vcpu = vm.create_vcpu(0)?;
    into_real_mode(&vcpu)?;
    let rings = Rings::map(Arc::clone(&vm), std::slice::from_ref(&vcpu), entries)?;
    rings.start(&ram)?;
    map(&vm, &ram)?;
    for time in 1..=2 {
        match vcpu.run()? {
            VcpuExit::Hlt => {}
            other => return Err(io::Error::other(format!("unexpected exit {other:?}"))),
        }
        let pages = rings.take(&ram)?;
        if !pages.contains(0, 1) {
            return Ok(Err(format!("write number {time} of a page is not in them")));
        }
        // Pages that were not written would cost no more than time.
    }
    match rings.take(&ram)?.count() {
        0 => Ok(Ok(u64::from(entries))),
        _ => Ok(Err("they list what nobody has written".to_owned())),
    }
}

fn into_real_mode(vcpu: &VcpuFd) -> io::Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.set_sregs(&sregs)?;
    Ok(vcpu.set_regs(&kvm_regs {
        rflags: 2,
        ..Default::default()
    })?)
}

fn map(vm: &VmFd, ram: &GuestRam) -> io::Result<()> {
    for region in ram.iter() {
        let mapping = kvm_userspace_memory_region {
            slot: 0,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is the region's own; the vCPU runs only as long as
        // the caller keeps it.
        unsafe { vm.set_user_memory_region(mapping) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_kvm_has_rings_they_list_what_a_vcpu_writes() {
        match Kvm::new()
            .map_err(io::Error::from)
            .and_then(|kvm| try_out(&kvm))
        {
            Ok(tried) => assert!(tried.unwrap() >= 4096),
            Err(error) => println!("skipped, because {error}"),
        }
        println!("{:?}", pages());
    }
}
