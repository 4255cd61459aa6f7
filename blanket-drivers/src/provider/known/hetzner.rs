//! Hetzner Cloud.
//!
//! "Server Metadata" of the Hetzner Cloud API documentation.

use std::time::Duration;

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::Is;
use crate::provider::identify::{Mark, Provider, proof};
use crate::provider::instance::{Instance, of_serial};
use crate::provider::platform::metal_or;
use crate::provider::service::{Answers, Service};
use crate::provider::text::clean;

pub(super) const PROVIDER: Provider = Provider {
    name: "hetzner",
    title: "Hetzner Cloud",
    cloud: true,
    in_smbios: true,
    marks: MARKS,
    platform: |facts: &Facts| metal_or("kvm", facts),
    local: of_serial,
    disks: DISKS,
    service: Some(&SERVICE),
};

const DISKS: &[DiskMark] = &[disk(Field::Vendor, Is("HC"), Place::Network)];

const MARKS: &[Mark] = &[
    proof(Source::Smbios, "sys_vendor", Is("Hetzner")),
    proof(Source::Smbios, "bios_vendor", Is("Hetzner")),
];

const SUMMARY: &str = "/hetzner/v1/metadata";
const NETWORKS: &str = "/hetzner/v1/metadata/private-networks";

const SERVICE: Service = Service {
    headers: &[],
    token: None,
    seal: None,
    document: SUMMARY,
    details: &[NETWORKS],
    notices: &[],
    interval: Duration::ZERO,
    read,
    read_notices: |_| Vec::new(),
    remedy: "let TCP to 169.254.169.254 out",
};

/// The values of a key in lines of `key: value`, which may begin with `start`.
/// The answers are YAML, of which plain scalars are all that is wanted here:
/// anchors, tags and nesting are for nobody that a stranger could answer to.
fn scalars<'a>(yaml: &'a str, start: &'a str, key: &'a str) -> impl Iterator<Item = String> + 'a {
    yaml.lines().filter_map(move |line| {
        let line = line.strip_prefix(start)?;
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        let value = value.trim().trim_matches(['"', '\'']);
        clean(value.as_bytes())
    })
}

fn read(answers: &Answers) -> Option<Instance> {
    let summary = answers.body(SUMMARY)?;
    let says = |key| scalars(&summary, "", key).next();
    let number = |id: &String| id.bytes().all(|byte| byte.is_ascii_digit());
    let mut instance = Instance {
        id: Some(says("instance-id").filter(number)?),
        name: says("hostname"),
        region: says("region"),
        zone: says("availability-zone"),
        ..Instance::default()
    };
    let public = says("public-ipv4");
    instance.add_address(public.as_deref());
    instance.add_public_address(public.as_deref());
    instance.add_address(says("local-ipv4").as_deref());
    let networks = answers.body(NETWORKS).unwrap_or_default();
    for address in scalars(&networks, "- ", "ip") {
        instance.add_address(Some(&address));
    }
    Some(instance)
}
