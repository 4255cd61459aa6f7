//! What kind of virtualization the machine runs on, whoever provides it.

use super::facts::{Facts, Source};

/// Hypervisors by their CPUID signatures. One that shows Hyper-V's interface
/// beside its own is not Hyper-V, so that comes last.
const SIGNATURES: &[(&str, &str)] = &[
    ("KVMKVMKVM", "kvm"),
    ("VMwareVMware", "vmware"),
    ("TCGTCGTCGTCG", "tcg"),
    ("bhyve bhyve", "bhyve"),
    ("ACRNACRNACRN", "acrn"),
    ("Microsoft Hv", "hyper-v"),
];

/// Xen's signature.
pub(super) const XEN_SIGNATURE: &str = "XenVMMXenVMM";

/// `XENFEAT_auto_translated_physmap` of Xen's `features.h`: the guest's
/// addresses are translated by the hypervisor, so it is no PV guest.
const AUTO_TRANSLATED: u64 = 1 << 2;

/// The platform: `metal`, `kvm`, `hyper-v`, `vmware`, `tcg`, `bhyve`, `acrn`;
/// with Xen `pv`, `pvh`, `hvm` or `dom0`; `virtual` if the hypervisor is none
/// of these.
pub(super) fn platform(facts: &Facts) -> &'static str {
    if on_xen(facts) {
        return xen_kind(facts);
    }
    let seen = |name: &str| facts.all(Source::Cpuid, "signature").any(|s| s == name);
    if let Some((_, kind)) = SIGNATURES.iter().find(|(name, _)| seen(name)) {
        return kind;
    }
    match facts.get(Source::Cpuid, "hypervisor") {
        Some("no") => "metal",
        _ => "virtual",
    }
}

/// `kind`, but for machines without a hypervisor.
pub(super) fn metal_or(kind: &'static str, facts: &Facts) -> &'static str {
    match platform(facts) {
        "metal" => "metal",
        _ => kind,
    }
}

/// Whether Xen runs underneath.
pub(super) fn on_xen(facts: &Facts) -> bool {
    facts.get(Source::Xen, "type") == Some("xen")
        || facts.get(Source::Xen, "proc").is_some()
        || facts
            .all(Source::Cpuid, "signature")
            .any(|s| s == XEN_SIGNATURE)
}

fn xen_kind(facts: &Facts) -> &'static str {
    let says = |name| facts.get(Source::Xen, name);
    if says("capabilities").is_some_and(|all| all.contains("control_d")) {
        return "dom0";
    }
    match says("guest_type") {
        Some("PV") => return "pv",
        Some("PVH") => return "pvh",
        Some("HVM") => return "hvm",
        _ => {}
    }
    // Kernels before 4.13 do not name it. HVM guests alone have firmware.
    let features = says("features").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    if facts.get(Source::Smbios, "sys_vendor").is_some() {
        "hvm"
    } else if features.is_some_and(|bits| bits & AUTO_TRANSLATED != 0) {
        "pvh"
    } else {
        "pv"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Source::{Cpuid, Smbios, Xen};

    fn of(facts: &[(Source, &'static str, &str)]) -> &'static str {
        let mut all = Facts::default();
        for (source, name, value) in facts {
            all.add(*source, name, value.as_bytes());
        }
        platform(&all)
    }

    #[test]
    fn a_hypervisor_is_told_by_its_own_signature() {
        let hyper_v = (Cpuid, "signature", "Microsoft Hv");
        assert_eq!(of(&[hyper_v]), "hyper-v");
        assert_eq!(of(&[hyper_v, (Cpuid, "signature", "KVMKVMKVM")]), "kvm");
        assert_eq!(of(&[hyper_v, (Cpuid, "signature", XEN_SIGNATURE)]), "pv");
        assert_eq!(of(&[(Cpuid, "hypervisor", "no")]), "metal");
        assert_eq!(of(&[(Cpuid, "hypervisor", "yes")]), "virtual");
    }

    #[test]
    fn kinds_of_xen_guests_are_told_apart() {
        let xen = (Xen, "type", "xen");
        for (more, kind) in [
            (&[(Xen, "guest_type", "PVH")][..], "pvh"),
            (&[(Xen, "guest_type", "HVM")], "hvm"),
            (
                &[
                    (Xen, "guest_type", "PV"),
                    (Xen, "capabilities", "control_d"),
                ],
                "dom0",
            ),
            (&[(Xen, "features", "00000705")], "pvh"),
            (
                &[(Xen, "features", "00000705"), (Smbios, "sys_vendor", "Xen")],
                "hvm",
            ),
            (&[(Xen, "features", "00000000")], "pv"),
            (&[(Xen, "features", "zz")], "pv"),
        ] {
            assert_eq!(of(&[&[xen], more].concat()), kind, "{more:?}");
        }
        // A PV guest may see the bare processor's leaves.
        assert_eq!(of(&[xen, (Cpuid, "hypervisor", "no")]), "pv");
        assert_eq!(of(&[(Xen, "proc", "yes")]), "pv");
    }
}
