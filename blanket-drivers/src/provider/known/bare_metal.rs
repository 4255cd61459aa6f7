//! A machine without a hypervisor, of whichever maker.

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::Source;
use crate::provider::identify::Test::{Is, Passes};
use crate::provider::identify::{Mark, Provider, proof};
use crate::provider::instance::Instance;

pub(super) const PROVIDER: Provider = Provider {
    name: "bare-metal",
    title: "bare metal",
    cloud: false,
    in_smbios: false,
    marks: &[MARK],
    platform: |_| "metal",
    local: |facts| Instance {
        kind: facts.get(Source::Smbios, "product_name").map(str::to_owned),
        ..Instance::default()
    },
    disks: DISKS,
    service: None,
};

/// What is not reached by iSCSI is in the machine.
const DISKS: &[DiskMark] = &[
    disk(
        Field::Path,
        Passes(|path| path.contains("/session")),
        Place::Network,
    ),
    disk(Field::Model, Passes(|_| true), Place::Local),
    disk(Field::Path, Passes(|_| true), Place::Local),
];

const MARK: Mark = proof(Source::Cpuid, "hypervisor", Is("no"));
