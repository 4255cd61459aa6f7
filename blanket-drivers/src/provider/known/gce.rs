//! Google Compute Engine.
//!
//! "Detect if a VM is running in Compute Engine" and "Predefined metadata keys"
//! of the Compute Engine documentation.

use std::time::Duration;

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::{Begins, Is};
use crate::provider::identify::{Mark, Provider, hint, proof};
use crate::provider::instance::{Instance, Notice, NoticeKind, bounded, list, string};
use crate::provider::platform::metal_or;
use crate::provider::service::{Answers, Service};

pub(super) const PROVIDER: Provider = Provider {
    name: "gce",
    title: "Google Compute Engine",
    cloud: true,
    in_smbios: true,
    marks: MARKS,
    platform: |facts: &Facts| metal_or("kvm", facts),
    local: |_| Instance::default(),
    disks: DISKS,
    service: Some(&SERVICE),
};

// Names of the NVMe and SCSI disks in Google's guest configuration (udev rules).
const DISKS: &[DiskMark] = &[
    disk(Field::Model, Begins("nvme_card-pd"), Place::Network),
    disk(Field::Model, Begins("nvme_card"), Place::InstanceStore),
    disk(Field::Model, Is("EphemeralDisk"), Place::InstanceStore),
    disk(Field::Model, Is("PersistentDisk"), Place::Network),
];

const MARKS: &[Mark] = &[
    proof(Source::Smbios, "product_name", Is("Google Compute Engine")),
    proof(Source::Smbios, "board_name", Is("Google Compute Engine")),
    proof(Source::Smbios, "product_serial", Begins("GoogleCloud-")),
    // Chromebooks have these too.
    hint(Source::Smbios, "sys_vendor", Is("Google")),
    hint(Source::Smbios, "bios_vendor", Is("Google")),
    // Google's network card (gVNIC) among others.
    hint(Source::Pci, "device", Begins("1ae0:")),
];

const ID: &str = "/computeMetadata/v1/instance/id";
const TYPE: &str = "/computeMetadata/v1/instance/machine-type";
const NAME: &str = "/computeMetadata/v1/instance/name";
const ZONE: &str = "/computeMetadata/v1/instance/zone";
const INTERFACES: &str = "/computeMetadata/v1/instance/network-interfaces/?recursive=true";
const PREEMPTIBLE: &str = "/computeMetadata/v1/instance/scheduling/preemptible";
const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted";
const MAINTENANCE: &str = "/computeMetadata/v1/instance/maintenance-event";

const SERVICE: Service = Service {
    headers: &[("Metadata-Flavor", "Google")],
    token: None,
    seal: Some(("Metadata-Flavor", "Google")),
    document: ID,
    details: &[TYPE, NAME, ZONE, INTERFACES, PREEMPTIBLE],
    notices: &[PREEMPTED, MAINTENANCE],
    // A preemption is told 30 seconds before.
    interval: Duration::from_secs(5),
    read,
    read_notices,
    remedy: "let TCP to 169.254.169.254 out",
};

/// The name at the end of a path like `projects/1/zones/us-central1-a`.
fn last(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

fn read(answers: &Answers) -> Option<Instance> {
    let number = |id: &String| id.len() <= 20 && id.bytes().all(|byte| byte.is_ascii_digit());
    let zone = answers.text(ZONE).as_deref().and_then(last);
    let mut instance = Instance {
        id: Some(answers.text(ID).filter(number)?),
        kind: answers.text(TYPE).as_deref().and_then(last),
        name: answers.text(NAME),
        region: zone
            .as_deref()
            .and_then(|zone| Some(zone.rsplit_once('-')?.0.to_owned())),
        zone,
        spot: answers.text(PREEMPTIBLE).map(|answer| answer == "TRUE"),
        ..Instance::default()
    };
    let interfaces = answers.json(INTERFACES);
    for interface in list(&interfaces, "") {
        instance.add_mtu(interface.get("mtu"));
        instance.add_address(string(interface, "/ip").as_deref());
        for address in list(interface, "/ipv6s") {
            instance.add_address(address.as_str());
        }
        for access in list(interface, "/accessConfigs") {
            instance.add_public_address(string(access, "/externalIp").as_deref());
        }
    }
    Some(instance)
}

fn read_notices(answers: &Answers) -> Vec<Notice> {
    let preempted = answers.text(PREEMPTED);
    let preempted = preempted
        .filter(|answer| answer == "TRUE")
        .map(|_| Notice::new(NoticeKind::SpotTermination, "stop"));
    // `MIGRATE_ON_HOST_MAINTENANCE` or `TERMINATE_ON_HOST_MAINTENANCE`.
    let event = answers.text(MAINTENANCE);
    let maintenance = event.filter(|event| event != "NONE").map(|event| {
        let action = event.split('_').next().unwrap_or_default();
        Notice {
            description: Some(event.clone()),
            ..Notice::new(NoticeKind::Maintenance, action)
        }
    });
    bounded(preempted.into_iter().chain(maintenance))
}
