//! Clouds built with OpenStack, on whatever hypervisor.
//!
//! "Metadata" of Nova's user guide.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::Is;
use crate::provider::identify::{Mark, Provider, proof};
use crate::provider::instance::{Instance, list, string};
use crate::provider::platform::platform;
use crate::provider::service::{Answers, Service};

pub(super) const PROVIDER: Provider = Provider {
    name: "openstack",
    title: "OpenStack",
    cloud: true,
    // Many clouds put their own names there, or leave QEMU's.
    in_smbios: false,
    marks: MARKS,
    platform,
    local,
    disks: &[],
    service: Some(&SERVICE),
};

const MARKS: &[Mark] = &[
    proof(Source::Smbios, "sys_vendor", Is("OpenStack Foundation")),
    proof(Source::Smbios, "product_name", Is("OpenStack Nova")),
    proof(Source::Smbios, "product_name", Is("OpenStack Compute")),
    proof(Source::Smbios, "chassis_asset_tag", Is("OpenStack Nova")),
    proof(Source::Smbios, "chassis_asset_tag", Is("OpenStack Compute")),
    proof(Source::Smbios, "chassis_asset_tag", Is("OpenTelekomCloud")),
    proof(Source::Smbios, "chassis_asset_tag", Is("HUAWEICLOUD")),
    proof(Source::Smbios, "chassis_asset_tag", Is("SAP CCloud VM")),
];

/// Nova gives machines their instance's UUID. QEMU's own is all zeros.
fn local(facts: &Facts) -> Instance {
    let uuid = facts.get(Source::Smbios, "product_uuid");
    let set = |uuid: &&str| uuid.chars().any(|c| !matches!(c, '0' | '-'));
    Instance {
        id: uuid.filter(set).map(str::to_ascii_lowercase),
        ..Instance::default()
    }
}

const META_DATA: &str = "/openstack/latest/meta_data.json";
const NETWORK_DATA: &str = "/openstack/latest/network_data.json";
// Nova speaks EC2's older API too, which knows what its own does not tell.
const TYPE: &str = "/latest/meta-data/instance-type";
const LOCAL_IPV4: &str = "/latest/meta-data/local-ipv4";
const PUBLIC_IPV4: &str = "/latest/meta-data/public-ipv4";

const SERVICE: Service = Service {
    headers: &[],
    token: None,
    seal: None,
    document: META_DATA,
    details: &[NETWORK_DATA, TYPE, LOCAL_IPV4, PUBLIC_IPV4],
    notices: &[],
    interval: Duration::ZERO,
    read,
    read_notices: |_| Vec::new(),
    remedy: "let TCP to 169.254.169.254 out, by the route that DHCP gave",
};

fn read(answers: &Answers) -> Option<Instance> {
    let document = answers.json(META_DATA);
    let mut instance = Instance {
        id: Some(string(&document, "/uuid")?),
        kind: answers.text(TYPE),
        name: string(&document, "/name"),
        zone: string(&document, "/availability_zone"),
        ..Instance::default()
    };
    let network = answers.json(NETWORK_DATA);
    let links: BTreeMap<_, _> = list(&network, "/links")
        .filter_map(|link| Some((string(link, "/id")?, link.get("mtu"))))
        .collect();
    links.values().for_each(|mtu| instance.add_mtu(*mtu));
    for part in list(&network, "/networks") {
        instance.add_address(string(part, "/ip_address").as_deref());
    }
    instance.add_address(answers.text(LOCAL_IPV4).as_deref());
    instance.add_public_address(answers.text(PUBLIC_IPV4).as_deref());
    Some(instance)
}
