//! Microsoft Azure.
//!
//! "Azure Instance Metadata Service" and "Scheduled Events for Linux VMs" of
//! the Azure documentation.

use std::time::Duration;

use serde_json::Value;

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::{Begins, Is, Passes};
use crate::provider::identify::{Mark, Provider, hint, proof};
use crate::provider::instance::{Instance, Notice, NoticeKind, bounded, list, string, time};
use crate::provider::platform::metal_or;
use crate::provider::service::{Answers, Service};

pub(super) const PROVIDER: Provider = Provider {
    name: "azure",
    title: "Microsoft Azure",
    cloud: true,
    in_smbios: true,
    marks: MARKS,
    platform: |facts: &Facts| metal_or("hyper-v", facts),
    local: |_| Instance::default(),
    disks: DISKS,
    service: Some(&SERVICE),
};

// Names and controllers as in the udev rules of Azure's Linux agent.
const DISKS: &[DiskMark] = &[
    disk(
        Field::Model,
        Begins("Microsoft NVMe Direct Disk"),
        Place::InstanceStore,
    ),
    disk(
        Field::Model,
        Begins("MSFT NVMe Accelerator"),
        Place::Network,
    ),
    disk(Field::Path, Passes(is_resource_disk), Place::InstanceStore),
    disk(Field::Model, Is("Virtual Disk"), Place::Network),
];

/// The second disk of the first controller, on machines of either generation.
fn is_resource_disk(path: &str) -> bool {
    path.contains("/00000000-0001-")
        || path.contains("/f8b3781a-1e82-4818-a1c3-63d806ec15bb/") && path.ends_with(":1")
}

const MARKS: &[Mark] = &[
    // The same on every machine of Azure's, and on no other with Hyper-V.
    proof(
        Source::Smbios,
        "chassis_asset_tag",
        Is("7783-7084-3265-9085-8269-3286-77"),
    ),
    hint(Source::Smbios, "sys_vendor", Is("Microsoft Corporation")),
    hint(Source::Smbios, "product_name", Is("Virtual Machine")),
    hint(Source::Cpuid, "signature", Is("Microsoft Hv")),
    // Microsoft's network card (MANA) among others.
    hint(Source::Pci, "device", Begins("1414:")),
];

const INSTANCE: &str = "/metadata/instance?api-version=2021-02-01";
const NAME: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

const SERVICE: Service = Service {
    headers: &[("Metadata", "true")],
    token: None,
    seal: None,
    document: INSTANCE,
    details: &[],
    notices: &[EVENTS, NAME],
    // A preemption is told 30 seconds before.
    interval: Duration::from_secs(1),
    read,
    read_notices,
    remedy: "let TCP to 169.254.169.254 out",
};

fn read(answers: &Answers) -> Option<Instance> {
    let document = answers.json(INSTANCE);
    let region = string(&document, "/compute/location");
    let zone = string(&document, "/compute/zone");
    let mut instance = Instance {
        id: Some(string(&document, "/compute/vmId")?),
        kind: string(&document, "/compute/vmSize"),
        name: string(&document, "/compute/name"),
        // Zones are numbers within their region.
        zone: region
            .as_ref()
            .zip(zone)
            .map(|(region, zone)| format!("{region}-{zone}")),
        region,
        spot: string(&document, "/compute/priority").map(|priority| priority == "Spot"),
        ..Instance::default()
    };
    for interface in list(&document, "/network/interface") {
        for protocol in ["/ipv4/ipAddress", "/ipv6/ipAddress"] {
            for address in list(interface, protocol) {
                instance.add_address(string(address, "/privateIpAddress").as_deref());
                instance.add_public_address(string(address, "/publicIpAddress").as_deref());
            }
        }
    }
    Some(instance)
}

fn read_notices(answers: &Answers) -> Vec<Notice> {
    let own = answers.text(NAME);
    let document = answers.json(EVENTS);
    let events = list(&document, "/Events").filter(|event| concerns(event, own.as_deref()));
    bounded(events.filter_map(notice))
}

/// Whether an event is about this machine: all those of an availability set are
/// told of each other's events.
fn concerns(event: &Value, own: Option<&str>) -> bool {
    let named = |name: &str| list(event, "/Resources").any(|one| one.as_str() == Some(name));
    own.is_none_or(named)
}

fn notice(event: &Value) -> Option<Notice> {
    let action = string(event, "/EventType")?;
    let kind = match action.as_str() {
        "Preempt" => NoticeKind::SpotTermination,
        _ => NoticeKind::Maintenance,
    };
    Some(Notice {
        // Empty once it has started.
        at: string(event, "/NotBefore").and_then(|text| time(&text)),
        id: string(event, "/EventId"),
        description: string(event, "/Description"),
        ..Notice::new(kind, &action)
    })
}
