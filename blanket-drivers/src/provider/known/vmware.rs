//! VMware: ESXi, its clouds, and its desktop products.

use crate::provider::facts::Source;
use crate::provider::identify::Test::{Begins, Is};
use crate::provider::identify::{Mark, Provider, hint, proof};
use crate::provider::instance::Instance;

pub(super) const PROVIDER: Provider = Provider {
    name: "vmware",
    title: "VMware",
    cloud: false,
    in_smbios: true,
    marks: MARKS,
    platform: |_| "vmware",
    local: |_| Instance::default(),
    disks: &[],
    service: None,
};

const MARKS: &[Mark] = &[
    proof(Source::Smbios, "sys_vendor", Begins("VMware")),
    proof(Source::Smbios, "product_name", Begins("VMware")),
    proof(Source::Smbios, "product_serial", Begins("VMware-")),
    proof(Source::Cpuid, "signature", Is("VMwareVMware")),
    // QEMU has its devices too.
    hint(Source::Pci, "device", Begins("15ad:")),
];
