//! Metadata services' answers: any bodies are read or refused, what is read is
//! bounded, and sound ones are read.
#![no_main]

use std::net::IpAddr;

use arbitrary::Arbitrary;
use blanket_drivers::provider::{Answers, Instance, PROVIDERS, Service};
use libfuzzer_sys::fuzz_target;

/// The longest text that is kept, in characters.
const LONGEST: usize = 256;

/// The most addresses and notices that are kept.
const MOST: usize = 32;

#[derive(Arbitrary, Debug)]
struct Input {
    provider: u8,
    /// One for each path: in their place, or what differs from a sound answer.
    bodies: [Body; 9],
}

#[derive(Arbitrary, Debug)]
enum Body {
    None,
    Any(Vec<u8>),
    Sound(Vec<(u16, u8)>),
    /// Any scalar where a sound answer has another, by its place among them.
    Scalar(u8, Scalar),
}

#[derive(Arbitrary, Debug)]
enum Scalar {
    Text(String),
    Number(i64),
    Null,
    Nested,
}

/// A sound answer.
fn sound(path: &str) -> &'static str {
    match path.split('?').next().unwrap_or_default() {
        "/latest/dynamic/instance-identity/document" => {
            r#"{"instanceId":"i-1","instanceType":"m5.large","region":"r","availabilityZone":"z","privateIp":"10.0.0.1"}"#
        }
        "/latest/meta-data/spot/instance-action" => {
            r#"{"action":"stop","time":"2017-09-18T08:22:00Z"}"#
        }
        "/latest/meta-data/events/recommendations/rebalance" => {
            r#"{"noticeTime":"2020-11-05T08:22:00Z"}"#
        }
        "/latest/meta-data/events/maintenance/scheduled" => {
            r#"[{"NotBefore":"21 Jan 2019 09:00:43 GMT","Code":"system-reboot","Description":"d","EventId":"e","State":"active"}]"#
        }
        "/computeMetadata/v1/instance/id" => "4520031799277581759",
        "/computeMetadata/v1/instance/zone" => "projects/1/zones/us-central1-a",
        "/computeMetadata/v1/instance/machine-type" => "projects/1/machineTypes/n2-standard-4",
        "/computeMetadata/v1/instance/network-interfaces/" => {
            r#"[{"accessConfigs":[{"externalIp":"203.0.113.9"}],"ip":"10.128.0.2","mtu":1460,"ipv6s":["2001:db8::1"]}]"#
        }
        "/computeMetadata/v1/instance/maintenance-event" => "MIGRATE_ON_HOST_MAINTENANCE",
        "/metadata/instance" => {
            r#"{"compute":{"location":"l","name":"n","priority":"Spot","vmId":"v","vmSize":"s","zone":"1"},"network":{"interface":[{"ipv4":{"ipAddress":[{"privateIpAddress":"10.2.0.4","publicIpAddress":""}]}}]}}"#
        }
        "/metadata/instance/compute/name" => "n",
        "/metadata/scheduledevents" => {
            r#"{"Events":[{"EventId":"e","EventType":"Preempt","Resources":["n"],"NotBefore":"Mon, 19 Sep 2016 18:29:47 GMT","Description":""}]}"#
        }
        "/openstack/latest/meta_data.json" => r#"{"uuid":"u","name":"n","availability_zone":"z"}"#,
        "/openstack/latest/network_data.json" => {
            r#"{"links":[{"id":"t","mtu":1450}],"networks":[{"ip_address":"172.16.0.5","link":"t"}]}"#
        }
        "/metadata/v1.json" => {
            r#"{"droplet_id":1,"hostname":"h","region":"r","interfaces":{"private":[{"ipv4":{"ip_address":"10.1.1.1"}}],"public":[{"ipv4":{"ip_address":"203.0.113.11"},"ipv6":{"ip_address":"2001:db8::11"}}]}}"#
        }
        "/hetzner/v1/metadata" => {
            "availability-zone: z\nhostname: h\ninstance-id: 42\npublic-ipv4: 203.0.113.12\nregion: r\n"
        }
        "/hetzner/v1/metadata/private-networks" => "- ip: 10.0.0.2\n  alias_ips: []\n",
        _ => "TRUE",
    }
}

/// Replaces the text between one pair of quotes, quotes included.
fn replace(body: &str, place: u8, scalar: &Scalar) -> Vec<u8> {
    let new = match scalar {
        // Not all that Debug writes is JSON, and that is as good.
        Scalar::Text(text) => format!("{text:?}"),
        Scalar::Number(number) => number.to_string(),
        Scalar::Null => "null".into(),
        Scalar::Nested => "[{\"a\":[{}]}]".into(),
    };
    let mut parts: Vec<_> = body.split('"').map(str::to_owned).collect();
    let quoted = parts.len() / 2;
    if quoted == 0 {
        return new.into_bytes();
    }
    let at = usize::from(place) % quoted * 2 + 1;
    let before = parts[..at].join("\"");
    let behind = parts.split_off(at + 1).join("\"");
    format!("{before}{new}{behind}").into_bytes()
}

fn body(path: &str, how: &Body) -> Option<Vec<u8>> {
    match how {
        Body::None => None,
        Body::Any(bytes) => Some(bytes.clone()),
        Body::Sound(changes) => {
            let mut bytes = sound(path).as_bytes().to_vec();
            let len = bytes.len();
            for (at, byte) in changes {
                bytes[usize::from(*at) % len] = *byte;
            }
            Some(bytes)
        }
        Body::Scalar(place, scalar) => Some(replace(sound(path), *place, scalar)),
    }
}

fn check(instance: Instance) {
    let texts = [
        instance.id,
        instance.kind,
        instance.name,
        instance.region,
        instance.zone,
    ];
    for text in texts.into_iter().flatten() {
        // A zone may be put together from two.
        assert!(text.chars().count() <= 2 * LONGEST + 1);
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
    for addresses in [instance.addresses, instance.public_addresses] {
        assert!(addresses.len() <= MOST);
        assert!(!addresses.iter().any(IpAddr::is_unspecified));
    }
    assert!(instance.mtu.is_none_or(|mtu| (68..=65_535).contains(&mtu)));
}

fuzz_target!(|input: Input| {
    let services: Vec<&Service> = PROVIDERS.iter().filter_map(|it| it.service).collect();
    let service = services[usize::from(input.provider) % services.len()];
    let mut answers = Answers::default();
    let mut untouched = true;
    for (path, how) in service.paths().zip(&input.bodies) {
        untouched &= matches!(how, Body::Sound(changes) if changes.is_empty());
        if let Some(body) = body(path, how) {
            answers.add(path, body);
        }
    }
    let instance = service.read(&answers);
    assert!(instance.is_some() || !untouched);
    assert_eq!(instance, service.read(&answers));
    check(instance.unwrap_or_default());
    let notices = service.read_notices(&answers);
    assert!(notices.len() <= MOST);
    for notice in &notices {
        assert!(!notice.action.chars().any(char::is_control));
    }
});
