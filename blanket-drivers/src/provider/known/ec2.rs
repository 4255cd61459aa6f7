//! Amazon EC2: instances on Xen and on Nitro, and bare-metal ones.
//!
//! "Identify EC2 instances", "Instance metadata" and "Instance identity
//! documents" of the EC2 user guide.

use std::time::Duration;

use serde_json::Value;

use crate::provider::disk::{DiskMark, Field, Place, disk};
use crate::provider::facts::{Facts, Source};
use crate::provider::identify::Test::{Begins, Ends, Is, Passes};
use crate::provider::identify::{Mark, Provider, hint, proof};
use crate::provider::instance::{Instance, Notice, NoticeKind, bounded, list, string, time};
use crate::provider::platform::{metal_or, on_xen};
use crate::provider::service::{Answers, Service, Token};

pub(super) const PROVIDER: Provider = Provider {
    name: "ec2",
    title: "Amazon EC2",
    cloud: true,
    in_smbios: true,
    marks: MARKS,
    platform,
    local,
    disks: DISKS,
    service: Some(&SERVICE),
};

// "Identify NVMe block devices" of the EC2 user guide.
const DISKS: &[DiskMark] = &[
    disk(
        Field::Model,
        Is("Amazon EC2 NVMe Instance Storage"),
        Place::InstanceStore,
    ),
    disk(
        Field::Model,
        Is("Amazon Elastic Block Store"),
        Place::Network,
    ),
];

const MARKS: &[Mark] = &[
    // Nitro, and bare metal.
    proof(Source::Smbios, "sys_vendor", Is("Amazon EC2")),
    proof(Source::Smbios, "bios_vendor", Is("Amazon EC2")),
    proof(Source::Smbios, "board_vendor", Is("Amazon EC2")),
    // Xen with, and without firmware.
    proof(Source::Smbios, "bios_version", Ends(".amazon")),
    proof(Source::Smbios, "product_version", Ends(".amazon")),
    proof(Source::Xen, "version_extra", Ends(".amazon")),
    proof(Source::Xen, "uuid", Begins("ec2")),
    // One UUID in 4096 looks like this.
    hint(Source::Smbios, "product_uuid", Passes(is_uuid)),
    // Amazon's network and disk controllers.
    hint(Source::Pci, "device", Begins("1d0f:")),
];

/// A UUID that begins with `ec2`, in either order of bytes: SMBIOS before 2.6
/// did not say which.
fn is_uuid(uuid: &str) -> bool {
    let uuid = uuid.to_ascii_lowercase();
    let swapped = uuid.get(4..5) == Some("2") && uuid.get(6..8) == Some("ec");
    uuid.starts_with("ec2") || swapped
}

fn platform(facts: &Facts) -> &'static str {
    if on_xen(facts) || facts.get(Source::Smbios, "sys_vendor") == Some("Xen") {
        "xen"
    } else {
        metal_or("nitro", facts)
    }
}

fn local(facts: &Facts) -> Instance {
    let says = |field| facts.get(Source::Smbios, field).map(str::to_owned);
    // On Xen the product is the hypervisor's.
    let own = facts.get(Source::Smbios, "sys_vendor") == Some("Amazon EC2");
    Instance {
        id: says("board_asset_tag").filter(|id| id.starts_with("i-")),
        kind: says("product_name").filter(|_| own),
        ..Instance::default()
    }
}

const DOCUMENT: &str = "/latest/dynamic/instance-identity/document";
const HOSTNAME: &str = "/latest/meta-data/local-hostname";
const IPV6: &str = "/latest/meta-data/ipv6";
const LIFE_CYCLE: &str = "/latest/meta-data/instance-life-cycle";
const PUBLIC_IPV4: &str = "/latest/meta-data/public-ipv4";
// "Instance metadata categories": what instances on Xen were given at their
// start, by names that have `sd` or `xvd` in front.
const VOLUMES: &str = "/latest/meta-data/block-device-mapping/";
const EPHEMERAL: [&str; 8] = [
    "/latest/meta-data/block-device-mapping/ephemeral0",
    "/latest/meta-data/block-device-mapping/ephemeral1",
    "/latest/meta-data/block-device-mapping/ephemeral2",
    "/latest/meta-data/block-device-mapping/ephemeral3",
    "/latest/meta-data/block-device-mapping/ephemeral4",
    "/latest/meta-data/block-device-mapping/ephemeral5",
    "/latest/meta-data/block-device-mapping/ephemeral6",
    "/latest/meta-data/block-device-mapping/ephemeral7",
];
const SPOT: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";
const MAINTENANCE: &str = "/latest/meta-data/events/maintenance/scheduled";

const SERVICE: Service = Service {
    headers: &[],
    token: Some(Token {
        path: "/latest/api/token",
        lifetime: ("X-aws-ec2-metadata-token-ttl-seconds", "60"),
        header: "X-aws-ec2-metadata-token",
    }),
    seal: None,
    document: DOCUMENT,
    details: &[
        HOSTNAME,
        IPV6,
        LIFE_CYCLE,
        PUBLIC_IPV4,
        VOLUMES,
        EPHEMERAL[0],
        EPHEMERAL[1],
        EPHEMERAL[2],
        EPHEMERAL[3],
        EPHEMERAL[4],
        EPHEMERAL[5],
        EPHEMERAL[6],
        EPHEMERAL[7],
    ],
    notices: &[SPOT, REBALANCE, MAINTENANCE],
    // "Spot Instance interruption notices" of the EC2 User Guide.
    interval: Duration::from_secs(5),
    read,
    read_notices,
    remedy: "turn it on (aws ec2 modify-instance-metadata-options --http-endpoint enabled), with a \
             hop limit above 1 if this runs in a container, and let TCP to 169.254.169.254 out",
};

fn read(answers: &Answers) -> Option<Instance> {
    let document = answers.json(DOCUMENT);
    let id = string(&document, "/instanceId").filter(|id| id.starts_with("i-"))?;
    let mut instance = Instance {
        id: Some(id),
        kind: string(&document, "/instanceType"),
        name: answers.text(HOSTNAME),
        region: string(&document, "/region"),
        zone: string(&document, "/availabilityZone"),
        spot: answers.text(LIFE_CYCLE).map(|kind| kind == "spot"),
        instance_stores: instance_stores(answers),
        ..Instance::default()
    };
    instance.add_address(string(&document, "/privateIp").as_deref());
    instance.add_address(answers.text(IPV6).as_deref());
    instance.add_public_address(answers.text(PUBLIC_IPV4).as_deref());
    Some(instance)
}

/// The disks of Xen that are instance store, if it tells where each of them is.
fn instance_stores(answers: &Answers) -> Option<Vec<String>> {
    let all = answers.lines(VOLUMES)?;
    let count = all.iter().filter(|it| it.starts_with("ephemeral")).count();
    let told = EPHEMERAL.iter().filter_map(|path| answers.text(path));
    let names: Vec<String> = told.filter_map(|name| xen_name(&name)).collect();
    (names.len() == count).then_some(names)
}

/// How Linux calls a disk that the metadata calls `sdb`, `xvdb` or `/dev/sdb`.
fn xen_name(name: &str) -> Option<String> {
    let name = name.strip_prefix("/dev/").unwrap_or(name);
    let prefixes = ["sd", "xvd"];
    let letters = prefixes.iter().find_map(|it| name.strip_prefix(it))?;
    let sound = (1..=2).contains(&letters.len()) && letters.bytes().all(|c| c.is_ascii_lowercase());
    sound.then(|| format!("xvd{letters}"))
}

fn read_notices(answers: &Answers) -> Vec<Notice> {
    let spot = answers.json(SPOT);
    let spot = string(&spot, "/action").map(|action| Notice {
        at: string(&spot, "/time").and_then(|text| time(&text)),
        ..Notice::new(NoticeKind::SpotTermination, &action)
    });
    let rebalance = answers.json(REBALANCE);
    let rebalance = string(&rebalance, "/noticeTime").map(|text| Notice {
        at: time(&text),
        ..Notice::new(NoticeKind::Rebalance, "rebalance")
    });
    let scheduled = answers.json(MAINTENANCE);
    let maintenance = list(&scheduled, "").filter_map(maintenance);
    bounded(spot.into_iter().chain(rebalance).chain(maintenance))
}

/// A scheduled event that is not over.
fn maintenance(event: &Value) -> Option<Notice> {
    if string(event, "/State").is_some_and(|state| state != "active") {
        return None;
    }
    let action = string(event, "/Code")?;
    Some(Notice {
        at: string(event, "/NotBefore").and_then(|text| time(&text)),
        id: string(event, "/EventId"),
        description: string(event, "/Description"),
        ..Notice::new(NoticeKind::Maintenance, &action)
    })
}
