//! DigitalOcean.
//!
//! "Droplet Metadata API" of the DigitalOcean documentation.

use std::time::Duration;

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::Is;
use crate::provider::identify::{Mark, Provider, proof};
use crate::provider::instance::{Instance, list, of_serial, string};
use crate::provider::platform::metal_or;
use crate::provider::service::{Answers, Service};

pub(super) const PROVIDER: Provider = Provider {
    name: "digitalocean",
    title: "DigitalOcean",
    cloud: true,
    in_smbios: true,
    marks: MARKS,
    platform: |facts: &Facts| metal_or("kvm", facts),
    local: of_serial,
    disks: DISKS,
    service: Some(&SERVICE),
};

const DISKS: &[DiskMark] = &[disk(Field::Vendor, Is("DO"), Place::Network)];

const MARKS: &[Mark] = &[
    proof(Source::Smbios, "sys_vendor", Is("DigitalOcean")),
    proof(Source::Smbios, "bios_vendor", Is("DigitalOcean")),
];

const DOCUMENT: &str = "/metadata/v1.json";

const SERVICE: Service = Service {
    headers: &[],
    token: None,
    seal: None,
    document: DOCUMENT,
    details: &[],
    notices: &[],
    interval: Duration::ZERO,
    read,
    read_notices: |_| Vec::new(),
    remedy: "let TCP to 169.254.169.254 out",
};

fn read(answers: &Answers) -> Option<Instance> {
    let document = answers.json(DOCUMENT);
    let mut instance = Instance {
        id: Some(string(&document, "/droplet_id")?),
        name: string(&document, "/hostname"),
        region: string(&document, "/region"),
        ..Instance::default()
    };
    for protocol in ["/ipv4/ip_address", "/ipv6/ip_address"] {
        for interface in list(&document, "/interfaces/private") {
            instance.add_address(string(interface, protocol).as_deref());
        }
        for interface in list(&document, "/interfaces/public") {
            let address = string(interface, protocol);
            instance.add_address(address.as_deref());
            instance.add_public_address(address.as_deref());
        }
    }
    let floating = string(&document, "/floating_ip/ipv4/ip_address");
    instance.add_public_address(floating.as_deref());
    Some(instance)
}
