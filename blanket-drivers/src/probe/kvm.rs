//! `/dev/kvm`: whether it works, what is behind it, and what it offers.

use std::fmt;
use std::io;

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;

use crate::cpu::{self, CpuChoice, Shown};

use super::{Finding, host, read};

/// The only version of KVM's API that there has ever been.
const API_VERSION: i32 = 12;

/// What carries guests out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel's VMX.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// If KVM works though the processor shows neither, it is KVM-PVM.
    Pvm,
}

impl Virtualization {
    /// By the processor's flags: KVM's vendor modules cannot work without.
    fn of(cpuinfo: &str) -> Self {
        if host::has_flag(cpuinfo, "vmx") {
            Self::Vmx
        } else if host::has_flag(cpuinfo, "svm") {
            Self::Svm
        } else {
            Self::Pvm
        }
    }

    /// This machine's. Whether `/dev/kvm` can be used at all is another question.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self::of(&read("/proc/cpuinfo").unwrap_or_default())
    }

    /// Whether guests' kernels can run in hardware virtualization.
    #[must_use]
    pub fn is_hardware(self) -> bool {
        self != Self::Pvm
    }
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Vmx => "KVM on Intel VMX",
            Self::Svm => "KVM on AMD SVM",
            Self::Pvm => "KVM without virtualization hardware (PVM)",
        })
    }
}

pub(super) fn kind() -> Finding {
    const COST: &str = "no guest can run";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return unusable(&io::Error::from(error)),
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Finding::missing(
            format!("/dev/kvm speaks version {version} of the API, not {API_VERSION}"),
            COST,
            "use Linux 2.6.22 or newer",
        );
    }
    let kind = Virtualization::of_this_machine();
    let found = match kind {
        Virtualization::Vmx => Finding::ok(kind.to_string()).fact("kind", "vmx"),
        Virtualization::Svm => Finding::ok(kind.to_string()).fact("kind", "svm"),
        Virtualization::Pvm => Finding::limited(
            kind.to_string(),
            "guest kernels in hvm machines are emulated, far too slowly for stock ones; Linux \
             guests run in pv machines: compute at full speed, system calls and faults cost more",
            "use bare metal or an instance type with nested virtualization",
        )
        .fact("kind", "pvm"),
    };
    found.fact("api_version", u64::from(version.unsigned_abs()))
}

/// Which machine guests get where nobody says which.
pub(super) fn machine() -> Finding {
    if Kvm::new().is_err() {
        let remedy = "see above";
        return Finding::missing("none", "no guest can run", remedy).fact("auto", "none");
    }
    let kind = Virtualization::of_this_machine();
    if kind.is_hardware() {
        return Finding::ok("auto is hvm: any kernel; pv runs Linux kernels with Xen PV support")
            .fact("auto", "hvm");
    }
    Finding::ok(
        "auto is pv: Linux kernels with Xen PV support, as distributions' are; \
         no hardware breakpoints in guests",
    )
    .fact("auto", "pv")
}

/// Which processor guests see where nobody says which.
pub(super) fn processor() -> Finding {
    const REMEDY: &str = "use an instance type whose processor has AVX2 and shows all its features";
    let supported = Kvm::new().and_then(|kvm| cpu::supported(&kvm));
    let Ok(supported) = supported else {
        return Finding::missing("/dev/kvm cannot be asked", "no guest can run", "see above");
    };
    let shown = if Virtualization::of_this_machine().is_hardware() {
        Shown::choose(CpuChoice::Auto, &supported, false)
    } else {
        Shown::native(CpuChoice::Auto, &supported)
    };
    match shown {
        Ok(Shown {
            level, why: None, ..
        }) => {
            let model = level.map_or_else(|| "host".to_owned(), |level| level.to_string());
            Finding::ok(format!("auto is {model}")).fact("auto", model)
        }
        Ok(Shown {
            level: Some(level),
            why: Some(why),
            ..
        }) => {
            let cost = "guests do without what better processors have, like wide vectors";
            Finding::limited(format!("auto is {level}: {why}"), cost, REMEDY)
                .fact("auto", level.to_string())
        }
        Ok(Shown {
            level: None,
            why: Some(why),
            ..
        })
        | Err(why) => {
            let cost = "guests cannot go on on nodes of other processors";
            let remedy = match why {
                cpu::Error::Native => {
                    "use bare metal or an instance type with nested virtualization"
                }
                _ => REMEDY,
            };
            Finding::limited(format!("auto is host, this processor: {why}"), cost, remedy)
                .fact("auto", "host")
        }
    }
}

/// Why `/dev/kvm` cannot be opened, and what helps.
fn unusable(error: &io::Error) -> Finding {
    const COST: &str = "no guest can run";
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    let (found, remedy) = match error.kind() {
        io::ErrorKind::PermissionDenied => (
            "no permission on /dev/kvm".to_owned(),
            "add yourself to its group (usermod -aG kvm USER), log in again; or use root",
        ),
        io::ErrorKind::NotFound if host::has_flag(&cpuinfo, "vmx") => (
            "there is no /dev/kvm, though the processor has VMX".to_owned(),
            "modprobe kvm_intel; if that fails, switch virtualization on in the firmware",
        ),
        io::ErrorKind::NotFound if host::has_flag(&cpuinfo, "svm") => (
            "there is no /dev/kvm, though the processor has SVM".to_owned(),
            "modprobe kvm_amd; if that fails, switch virtualization on in the firmware",
        ),
        io::ErrorKind::NotFound => (
            "there is no /dev/kvm, and the processor shows neither VMX nor SVM".to_owned(),
            "use an instance with nested virtualization, bare metal, or a kernel with KVM-PVM",
        ),
        _ => (
            format!("/dev/kvm cannot be opened: {error}"),
            "see the kernel's log (dmesg)",
        ),
    };
    Finding::missing(found, COST, remedy).fact("kind", "none")
}

/// Whether a module's parameter means yes.
fn is_on(parameter: Option<&str>) -> bool {
    matches!(parameter, Some("Y" | "y" | "1"))
}

pub(super) fn nested() -> Finding {
    const COST: &str = "guests cannot be hypervisors themselves";
    let (module, remedy) = match Virtualization::of_this_machine() {
        Virtualization::Vmx => (
            "kvm_intel",
            "reload the module: modprobe -r kvm_intel; modprobe kvm_intel nested=1",
        ),
        Virtualization::Svm => (
            "kvm_amd",
            "reload the module: modprobe -r kvm_amd; modprobe kvm_amd nested=1",
        ),
        Virtualization::Pvm => {
            return Finding::missing(
                "no virtualization hardware to pass on",
                COST,
                "use bare metal or an instance type with nested virtualization",
            );
        }
    };
    let parameter = read(&format!("/sys/module/{module}/parameters/nested"));
    match parameter.as_deref() {
        on if is_on(on) => Finding::ok("guests can use KVM").fact("nested", true),
        Some(_) => Finding::missing(format!("{module} has nested=0"), COST, remedy),
        None => Finding::missing(format!("{module} is not loaded"), COST, remedy),
    }
}

/// A capability, its number, and what it costs not to have it.
struct Capability(&'static str, u32, &'static str);

const CAPABILITIES: &[Capability] = &[
    Capability("irqchip", kvm::KVM_CAP_IRQCHIP, "hvm machines do not run"),
    Capability("irqfd", kvm::KVM_CAP_IRQFD, "interrupts cost a call each"),
    Capability(
        "ioeventfd",
        kvm::KVM_CAP_IOEVENTFD,
        "each kick of a queue stops its vCPU",
    ),
    Capability(
        "signal_msi",
        kvm::KVM_CAP_SIGNAL_MSI,
        "MSI needs a route each",
    ),
    Capability(
        "immediate_exit",
        kvm::KVM_CAP_IMMEDIATE_EXIT,
        "pausing is slower",
    ),
    Capability(
        "readonly_mem",
        kvm::KVM_CAP_READONLY_MEM,
        "no firmware in flash",
    ),
    Capability(
        "sync_regs",
        kvm::KVM_CAP_SYNC_REGS,
        "registers cost a call each at exits",
    ),
    Capability(
        "dirty_log_protect2",
        kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        "long stops while memory is copied",
    ),
    Capability(
        "dirty_ring",
        kvm::KVM_CAP_DIRTY_LOG_RING,
        "migrating large guests takes longer",
    ),
    Capability(
        "guest_memfd",
        kvm::KVM_CAP_GUEST_MEMFD,
        "no memory that only the guest can see",
    ),
];

pub(super) fn capabilities() -> Finding {
    let remedy = "use a newer kernel; some depend on the kind of KVM";
    let Ok(kvm) = Kvm::new() else {
        return Finding::missing("/dev/kvm cannot be asked", "no guest can run", "see above");
    };
    let count = |number: u32| {
        // Negative is an error: not there.
        u64::try_from(kvm.check_extension_raw(number.into())).unwrap_or(0)
    };
    let (have, lack): (Vec<_>, Vec<_>) = CAPABILITIES.iter().partition(|cap| count(cap.1) > 0);
    let names = |caps: &[&Capability]| caps.iter().map(|cap| cap.0).collect::<Vec<_>>().join(" ");
    let vcpus = kvm.get_max_vcpus();
    let found = format!("up to {vcpus} vCPUs; {}", names(&have));
    let finding = if lack.is_empty() {
        Finding::ok(found)
    } else {
        let costs: Vec<_> = lack
            .iter()
            .map(|cap| format!("{}: {}", cap.0, cap.2))
            .collect();
        Finding::limited(
            format!("{found}; not: {}", names(&lack)),
            &costs.join("; "),
            remedy,
        )
    };
    let finding = CAPABILITIES
        .iter()
        .fold(finding, |finding, cap| finding.fact(cap.0, count(cap.1)));
    finding
        .fact("max_vcpus", vcpus as u64)
        .fact("memory_slots", kvm.get_nr_memslots() as u64)
        // Its value is the size of the state: 0 where nothing is nested.
        .fact("nested_state", count(kvm::KVM_CAP_NESTED_STATE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Level;

    #[test]
    fn the_kind_follows_the_processors_flags() {
        assert_eq!(Virtualization::of("flags : fpu vmx"), Virtualization::Vmx);
        assert_eq!(Virtualization::of("flags : fpu svm"), Virtualization::Svm);
        assert_eq!(Virtualization::of("flags : fpu"), Virtualization::Pvm);
    }

    #[test]
    fn permission_and_absence_have_remedies_of_their_own() {
        let denied = unusable(&io::ErrorKind::PermissionDenied.into());
        let absent = unusable(&io::ErrorKind::NotFound.into());
        assert_eq!(denied.level, Level::Missing);
        assert!(denied.remedy.as_ref().unwrap().contains("usermod"));
        assert_ne!(denied.remedy, absent.remedy);
    }

    #[test]
    fn module_parameters_are_read_in_all_their_spellings() {
        assert!(is_on(Some("Y")) && is_on(Some("1")));
        assert!(!is_on(Some("N")) && !is_on(Some("0")) && !is_on(None));
    }
}
