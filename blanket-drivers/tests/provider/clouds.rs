//! The clouds' metadata services, as their documentation has them.

use crate::server::{Handler, Reply, Request, ok, status};

const TOKEN: &str = "AQAEAToken==";
const TOKEN_HEADER: &str = "X-aws-ec2-metadata-token";

const EC2_DOCUMENT: &str = r#"{"accountId": "123456789012", "architecture": "x86_64",
    "availabilityZone": "us-east-1a", "instanceId": "i-0af01c0123456789a",
    "instanceType": "m5.large", "privateIp": "10.1.0.10", "region": "us-east-1"}"#;

fn ec2_get(path: &str) -> Reply {
    ok(match path {
        "/latest/dynamic/instance-identity/document" => EC2_DOCUMENT,
        "/latest/meta-data/local-hostname" => "ip-10-1-0-10.ec2.internal",
        "/latest/meta-data/instance-life-cycle" => "spot",
        "/latest/meta-data/public-ipv4" => "198.51.100.7",
        "/latest/meta-data/block-device-mapping/" => "ami\nephemeral0\nephemeral1\nroot",
        "/latest/meta-data/block-device-mapping/ephemeral0" => "sdb",
        "/latest/meta-data/block-device-mapping/ephemeral1" => "/dev/xvdc",
        "/latest/meta-data/spot/instance-action" => {
            r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#
        }
        "/latest/meta-data/events/maintenance/scheduled" => {
            r#"[{"NotBefore": "21 Jan 2019 09:00:43 GMT", "Code": "system-reboot",
                "Description": "scheduled reboot", "EventId": "instance-event-0d59",
                "State": "active"},
               {"Code": "system-reboot", "EventId": "instance-event-0d58",
                "State": "completed"}]"#
        }
        _ => return status(404),
    })
}

/// EC2 that insists on tokens.
pub(crate) fn ec2(request: &Request) -> Reply {
    if request.method == "PUT" {
        return match request.header("X-aws-ec2-metadata-token-ttl-seconds") {
            Some(_) if request.path == "/latest/api/token" => ok(TOKEN),
            _ => status(400),
        };
    }
    match request.header(TOKEN_HEADER) {
        Some(TOKEN) => ec2_get(&request.path),
        _ => status(401),
    }
}

/// What `ec2` does, but for what a request for a token gets.
pub(crate) fn ec2_without_token(request: &Request, refusal: u16) -> Reply {
    match (request.method.as_str(), request.header(TOKEN_HEADER)) {
        ("PUT", _) => status(refusal),
        ("GET", None) => ec2_get(&request.path),
        _ => status(400),
    }
}

pub(crate) fn gce(request: &Request) -> Reply {
    let flavour = || vec![("Metadata-Flavor", "Google".to_owned())];
    if request.header("Metadata-Flavor") != Some("Google") {
        return Reply::Answer(403, flavour(), Vec::new());
    }
    let body = match request.path.as_str() {
        "/computeMetadata/v1/instance/id" => "4520031799277581759",
        "/computeMetadata/v1/instance/machine-type" => "projects/1/machineTypes/n2-standard-4",
        "/computeMetadata/v1/instance/name" => "node-a",
        "/computeMetadata/v1/instance/zone" => "projects/1/zones/us-central1-a",
        "/computeMetadata/v1/instance/network-interfaces/?recursive=true" => {
            r#"[{"accessConfigs": [{"externalIp": "203.0.113.9", "type": "ONE_TO_ONE_NAT"}],
                "ip": "10.128.0.2", "mac": "42:01:0a:80:00:02", "mtu": 1460}]"#
        }
        "/computeMetadata/v1/instance/scheduling/preemptible" => "FALSE",
        "/computeMetadata/v1/instance/preempted" => "FALSE",
        "/computeMetadata/v1/instance/maintenance-event" => "MIGRATE_ON_HOST_MAINTENANCE",
        _ => return Reply::Answer(404, flavour(), Vec::new()),
    };
    Reply::Answer(200, flavour(), body.into())
}

pub(crate) fn azure(request: &Request) -> Reply {
    if request.header("Metadata") != Some("true") || !request.path.contains("api-version=") {
        return status(400);
    }
    ok(match request.path.split('?').next().unwrap() {
        "/metadata/instance" => {
            r#"{"compute": {"location": "westus2", "name": "node-b", "priority": "Spot",
                "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6", "vmSize": "Standard_D4s_v3",
                "zone": "1"},
               "network": {"interface": [{"ipv4": {"ipAddress": [
                    {"privateIpAddress": "10.2.0.4", "publicIpAddress": "203.0.113.10"}]},
                "ipv6": {"ipAddress": []}, "macAddress": "000D3A000001"}]}}"#
        }
        "/metadata/instance/compute/name" => "node-b",
        "/metadata/scheduledevents" => {
            r#"{"DocumentIncarnation": 1, "Events": [
                {"EventId": "C7061BAC", "EventType": "Preempt", "EventStatus": "Scheduled",
                 "ResourceType": "VirtualMachine", "Resources": ["node-b"],
                 "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT", "Description": ""},
                {"EventId": "C7061BAD", "EventType": "Freeze", "EventStatus": "Scheduled",
                 "ResourceType": "VirtualMachine", "Resources": ["node-c"],
                 "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}]}"#
        }
        _ => return status(404),
    })
}

pub(crate) fn openstack(request: &Request) -> Reply {
    ok(match request.path.as_str() {
        "/openstack/latest/meta_data.json" => {
            r#"{"uuid": "d8e02d56-2648-49a3-bf97-6be8f1204f38", "name": "node-c",
                "availability_zone": "nova", "launch_index": 0}"#
        }
        "/openstack/latest/network_data.json" => {
            r#"{"links": [{"id": "tap1", "type": "ovs", "mtu": 1450,
                    "ethernet_mac_address": "fa:16:3e:00:00:01"},
                   {"id": "tap2", "type": "ovs", "mtu": null}],
                "networks": [{"id": "network0", "link": "tap1", "type": "ipv4",
                    "ip_address": "172.16.0.5", "netmask": "255.255.255.0"}], "services": []}"#
        }
        "/latest/meta-data/instance-type" => "m1.small",
        "/latest/meta-data/local-ipv4" => "172.16.0.5",
        "/latest/meta-data/public-ipv4" => "",
        _ => return status(404),
    })
}

pub(crate) fn digitalocean(request: &Request) -> Reply {
    match request.path.as_str() {
        "/metadata/v1.json" => ok(
            r#"{"droplet_id": 2756294, "hostname": "node-d", "region": "nyc3",
                "interfaces": {
                  "private": [{"ipv4": {"ip_address": "10.132.255.113"}, "type": "private"}],
                  "public": [{"ipv4": {"ip_address": "203.0.113.11"},
                    "ipv6": {"ip_address": "2001:db8::11", "cidr": 64}, "type": "public"}]},
                "floating_ip": {"ipv4": {"active": false}}}"#,
        ),
        _ => status(404),
    }
}

pub(crate) fn hetzner(request: &Request) -> Reply {
    ok(match request.path.as_str() {
        "/hetzner/v1/metadata" => {
            "availability-zone: hel1-dc2\nhostname: 'node-e'\ninstance-id: 42\n\
             public-ipv4: 203.0.113.12\nregion: eu-central\n\
             vendor_data: |\n  instance-id: 43\n"
        }
        "/hetzner/v1/metadata/private-networks" => {
            "- ip: 10.0.0.2\n  alias_ips: [10.0.0.3]\n  network: 10.0.0.0/8\n"
        }
        _ => return status(404),
    })
}

/// Nobody's.
pub(crate) fn nothing(_: &Request) -> Reply {
    status(404)
}

pub(crate) const ALL: [(&str, Handler); 6] = [
    ("ec2", ec2),
    ("gce", gce),
    ("azure", azure),
    ("openstack", openstack),
    ("digitalocean", digitalocean),
    ("hetzner", hetzner),
];
