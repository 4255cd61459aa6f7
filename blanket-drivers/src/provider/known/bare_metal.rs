//! A machine without a hypervisor, of whichever maker.

use crate::provider::facts::Source;
use crate::provider::identify::Test::Is;
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
    service: None,
};

const MARK: Mark = proof(Source::Cpuid, "hypervisor", Is("no"));
