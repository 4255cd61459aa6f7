//! In which way KVM tells what a guest writes.

use std::io;
use std::sync::Arc;

use blanket_drivers::probe::Virtualization;
use blanket_drivers::rings::{self, Rings};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{Error, resource};
use crate::config::{DirtyChoice, VmConfig};

/// Switches dirty rings on for a VM without vCPUs, if its configuration wants them
/// and this KVM has them: the entries of each. Without hardware virtualization,
/// rings have been seen to miss pages under load (KVM-PVM, which has shadow page
/// tables): they are not used there.
pub(crate) fn enable(vm: &VmFd, config: &VmConfig) -> Result<Option<u32>, Error> {
    let choice = config.dirty.unwrap_or_default();
    let sound = Virtualization::of_this_machine().is_hardware();
    match choice {
        DirtyChoice::Log => return Ok(None),
        DirtyChoice::Auto if !sound => return Ok(None),
        DirtyChoice::Ring if !sound => {
            return Err(Error::Missing(
                "dirty rings that list all that is written: those of a KVM without hardware virtualization do not (use --dirty log)",
            ));
        }
        DirtyChoice::Auto | DirtyChoice::Ring => {}
    }
    match rings::enable(vm, config.memory()) {
        Ok(entries) => Ok(Some(entries)),
        Err(error) if choice == DirtyChoice::Auto => {
            tracing::info!(%error, "no dirty rings: KVM's dirty log is used");
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            Err(Error::Missing("dirty rings (--dirty log does without)"))
        }
        Err(error) => Err(Error::Kvm("switch dirty rings on", error)),
    }
}

/// The rings of all of a VM's vCPUs, if they have been switched on.
pub(crate) fn map(
    vm: &Arc<VmFd>,
    vcpus: &[VcpuFd],
    entries: Option<u32>,
) -> Result<Option<Arc<Rings>>, Error> {
    let rings = entries.map(|entries| Rings::map(Arc::clone(vm), vcpus, entries));
    let rings = rings.transpose().map_err(resource("map dirty rings"))?;
    Ok(rings.map(Arc::new))
}
