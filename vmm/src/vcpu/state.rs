//! Everything that KVM knows of a vCPU, to reset and to move it.

use blanket_devices::lifecycle::{Error, SavedState};
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::nested::NestedState;
use serde::{Deserialize, Serialize};

/// Kind and version of the saved state.
const KIND: &str = "vcpu";
const VERSION: u32 = 2;
/// What is enough for a guest that runs no guests of its own.
const VERSION_WITHOUT_NESTED: u32 = 1;
/// Whether virtualization is enabled: of Intel's processors.
const MSR_FEATURE_CONTROL: u32 = 0x3a;

/// A vCPU's registers. What a machine's KVM does not offer is absent.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    mp_state: Option<kvm_mp_state>,
    lapic: Option<kvm_lapic_state>,
    xsave: Option<kvm_xsave>,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    events: Option<kvm_vcpu_events>,
    msrs: Vec<kvm_msr_entry>,
    /// What KVM knows of the guest's own guests. Its other registers are those of
    /// such a guest if one runs.
    #[serde(default, skip_serializing_if = "NestedState::is_idle")]
    nested: NestedState,
}

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Device {
        device: KIND.to_owned(),
        message: format!("{what}: {error}"),
    }
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run. `msrs` lists those to save.
    ///
    /// # Errors
    /// The registers cannot be read.
    pub fn read(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, Error> {
        Ok(Self {
            // The MP state first: reading it lets KVM finish pending INITs.
            mp_state: fd.get_mp_state().ok(),
            regs: fd.get_regs().map_err(|e| failed("registers", e))?,
            sregs: fd.get_sregs().map_err(|e| failed("system registers", e))?,
            lapic: fd.get_lapic().ok(),
            xsave: fd.get_xsave().ok(),
            // A processor without XSAVE has none, and KVM lets none be set.
            xcrs: fd.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
            debug: fd.get_debug_regs().ok(),
            events: fd.get_vcpu_events().ok(),
            msrs: read_msrs(fd, msrs),
            nested: NestedState::read(fd),
        })
    }

    /// Writes the state to a vCPU that does not run.
    ///
    /// # Errors
    /// KVM refuses a part of it.
    pub fn write(&self, fd: &VcpuFd) -> Result<(), Error> {
        fn part<T>(
            what: &str,
            value: Option<&T>,
            set: impl FnOnce(&T) -> Result<(), kvm_ioctls::Error>,
        ) -> Result<(), Error> {
            value.map_or(Ok(()), |value| set(value).map_err(|e| failed(what, e)))
        }
        let nested = |e| failed("nested state", e);
        part("MP state", self.mp_state.as_ref(), |v| fd.set_mp_state(*v))?;
        // Registers do not fit a vCPU that runs a guest of its guest's.
        NestedState::leave(fd);
        let control = |msr: &&kvm_msr_entry| msr.index == MSR_FEATURE_CONTROL;
        if let Some(control) = self.msrs.iter().find(control) {
            write_msrs(fd, std::slice::from_ref(control));
        }
        part("registers", Some(&self.regs), |v| fd.set_regs(v))?;
        part("system registers", Some(&self.sregs), |v| fd.set_sregs(v))?;
        // Once EFER allows it; before whatever comes to such a guest.
        self.nested.write(fd).map_err(nested)?;
        part("XSAVE area", self.xsave.as_ref(), |v| {
            // SAFETY: the area came from KVM_GET_XSAVE with 4096 bytes, and no
            // feature with a larger area is enabled for guests.
            unsafe { fd.set_xsave(v) }
        })?;
        part("XCR0", self.xcrs.as_ref(), |v| fd.set_xcrs(v))?;
        part("debug registers", self.debug.as_ref(), |v| {
            fd.set_debug_regs(v)
        })?;
        // The APIC base is among the system registers: they come before.
        part("local APIC", self.lapic.as_ref(), |v| fd.set_lapic(v))?;
        write_msrs(fd, &self.msrs);
        part("events", self.events.as_ref(), |v| fd.set_vcpu_events(v))
    }

    /// Encodes the state.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn pack(&self) -> Result<SavedState, Error> {
        let version = match self.nested.is_idle() {
            true => VERSION_WITHOUT_NESTED,
            false => VERSION,
        };
        SavedState::pack(KIND, version, self)
    }

    /// Decodes a state.
    ///
    /// # Errors
    /// It is damaged, too new, or something else's.
    pub fn unpack(state: &SavedState) -> Result<Self, Error> {
        state.unpack(KIND, VERSION)
    }
}

/// Reads the MSRs that can be read; KVM lists some that it then refuses.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let mut out = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let Ok(mut msrs) = Msrs::from_entries(&entries) else {
            break;
        };
        let read = fd.get_msrs(&mut msrs).unwrap_or(0).min(rest.len());
        out.extend_from_slice(&msrs.as_slice()[..read]);
        // The one that stopped it is skipped.
        rest = &rest[(read + 1).min(rest.len())..];
    }
    out
}

/// Writes the MSRs that can be written.
fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) {
    let mut rest = entries;
    while !rest.is_empty() {
        let Ok(msrs) = Msrs::from_entries(rest) else {
            break;
        };
        let written = fd.set_msrs(&msrs).unwrap_or(0).min(rest.len());
        if let Some(refused) = rest.get(written) {
            tracing::debug!(index = refused.index, "MSR cannot be set");
        }
        rest = &rest[(written + 1).min(rest.len())..];
    }
}

/// Gives a vCPU its CPUID.
///
/// # Errors
/// KVM refuses it.
pub fn set_cpuid(fd: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let cpuid = CpuId::from_entries(cpuid).map_err(|e| failed("CPUID", e))?;
    fd.set_cpuid2(&cpuid).map_err(|e| failed("CPUID", e))
}
