//! Xen, of whichever cloud: PV, PVH and HVM guests, and its own first domain.

use crate::provider::facts::Source;
use crate::provider::identify::Test::Is;
use crate::provider::identify::{Mark, Provider, hint, proof};
use crate::provider::instance::Instance;
use crate::provider::platform::{XEN_SIGNATURE, platform};

pub(super) const PROVIDER: Provider = Provider {
    name: "xen",
    title: "Xen",
    cloud: false,
    in_smbios: false,
    marks: MARKS,
    platform,
    local: |facts| Instance {
        id: facts.get(Source::Xen, "uuid").map(str::to_owned),
        ..Instance::default()
    },
    disks: &[],
    service: None,
};

const MARKS: &[Mark] = &[
    proof(Source::Xen, "type", Is("xen")),
    proof(Source::Xen, "proc", Is("yes")),
    proof(Source::Cpuid, "signature", Is(XEN_SIGNATURE)),
    hint(Source::Smbios, "sys_vendor", Is("Xen")),
    // The platform device of HVM guests.
    hint(Source::Pci, "device", Is("5853:0001")),
];
