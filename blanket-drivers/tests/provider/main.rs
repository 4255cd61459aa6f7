//! Who provides a machine: fixtures of every provider's, and their metadata
//! services over real connections, good ones and bad ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod clouds;
mod hostile;
mod machines;
mod server;

use std::net::SocketAddr;
use std::time::Duration;

use blanket_drivers::provider::{
    self, Asking, MetadataState, NoticeKind, PROVIDERS, Report, Source, report,
};
use machines::Fixture;
use server::{Handler, Server};

/// So patient that a slow test machine does not matter.
fn patient(address: SocketAddr) -> Asking {
    Asking {
        address,
        connect: Duration::from_secs(20),
        total: Duration::from_secs(40),
        grace: Duration::from_secs(20),
    }
}

fn ask(fixture: &Fixture, server: &Server) -> Report {
    report(&fixture.machine(), Some(&patient(server.address)))
}

/// The report of a machine in front of a service that answers well.
fn answered(fixture: &Fixture, handler: Handler) -> Report {
    let server = Server::start(handler);
    let report = ask(fixture, &server);
    assert_eq!(
        report.metadata.state,
        MetadataState::Answered,
        "{report:#?}"
    );
    assert_eq!(report.metadata.problems, [""; 0], "{report:#?}");
    assert_eq!(report.doubts, [""; 0], "{report:#?}");
    report
}

fn texts(addresses: &[std::net::IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn every_provider_is_told_by_what_its_machines_show() {
    for (fixture, provider, platform) in [
        (machines::ec2_nitro(), "ec2", "nitro"),
        (machines::ec2_xen(), "ec2", "xen"),
        (machines::ec2_xen_pv(), "ec2", "xen"),
        (machines::ec2_metal(), "ec2", "metal"),
        (machines::gce(), "gce", "kvm"),
        (machines::azure(), "azure", "hyper-v"),
        (machines::openstack(), "openstack", "kvm"),
        (machines::digitalocean(), "digitalocean", "kvm"),
        (machines::hetzner(), "hetzner", "kvm"),
        (machines::vmware(), "vmware", "vmware"),
        (machines::xen_hvm(), "xen", "hvm"),
        (machines::xen("PV"), "xen", "pv"),
        (machines::xen("PVH"), "xen", "pvh"),
        (machines::xen_dom0(), "xen", "dom0"),
        (machines::dell(), "bare-metal", "metal"),
        (machines::hyper_v(), "unknown", "hyper-v"),
        (machines::kvm(), "unknown", "kvm"),
        (machines::bare_kvm(), "unknown", "kvm"),
    ] {
        let report = report(&fixture.machine(), None);
        assert_eq!(
            (report.provider, report.platform),
            (provider, platform),
            "{report:#?}"
        );
        assert_eq!(report.metadata.state, MetadataState::NotAsked);
        assert_eq!(report.doubts, [""; 0], "{report:#?}");
        assert_eq!(report.evidence.is_empty(), provider == "unknown");
        assert!(
            report
                .evidence
                .iter()
                .all(|fact| report.facts.contains(fact))
        );
        assert!(!report.facts.is_empty());
    }
}

#[test]
fn what_the_firmware_knows_of_an_instance_needs_no_metadata() {
    let report = report(&machines::ec2_nitro().machine(), None);
    assert_eq!(report.instance.id.as_deref(), Some("i-0af01c0123456789a"));
    assert_eq!(report.instance.kind.as_deref(), Some("m5.large"));
}

#[test]
fn ec2_is_asked_with_a_token() {
    let server = Server::start(clouds::ec2);
    let report = ask(&machines::ec2_nitro(), &server);
    assert_eq!(report.metadata.problems, [""; 0]);
    let instance = &report.instance;
    assert_eq!(instance.id.as_deref(), Some("i-0af01c0123456789a"));
    assert_eq!(instance.kind.as_deref(), Some("m5.large"));
    assert_eq!(instance.region.as_deref(), Some("us-east-1"));
    assert_eq!(instance.zone.as_deref(), Some("us-east-1a"));
    assert_eq!(instance.spot, Some(true));
    assert_eq!(texts(&instance.addresses), ["10.1.0.10"]);
    assert_eq!(texts(&instance.public_addresses), ["198.51.100.7"]);
    let kinds: Vec<_> = report.notices.iter().map(|notice| notice.kind).collect();
    assert_eq!(
        kinds,
        [NoticeKind::SpotTermination, NoticeKind::Maintenance]
    );
    assert_eq!(report.notices[0].action, "terminate");
    assert_eq!(report.notices[0].at.unwrap().timestamp(), 1_505_722_920);
    assert_eq!(report.notices[1].id.as_deref(), Some("instance-event-0d59"));
    // One token, and each path once; of other providers' nothing.
    let service = PROVIDERS.iter().find(|known| known.name == "ec2").unwrap();
    let mut expected: Vec<_> = service.service.unwrap().paths().collect();
    expected.sort_unstable();
    let mut expected: Vec<_> = expected.iter().map(|path| format!("GET {path}")).collect();
    expected.push("PUT /latest/api/token".into());
    assert_eq!(server.asked(), expected);
}

#[test]
fn ec2_on_xen_and_metal_are_asked_alike() {
    for fixture in [machines::ec2_xen(), machines::ec2_xen_pv()] {
        let report = answered(&fixture, clouds::ec2);
        assert_eq!((report.provider, report.platform), ("ec2", "xen"));
        assert_eq!(report.instance.kind.as_deref(), Some("m5.large"));
        let stores = report.instance.instance_stores.unwrap();
        assert_eq!(stores, ["xvdb", "xvdc"]);
    }
}

#[test]
fn ec2_that_does_not_tell_of_all_instance_stores_tells_of_none() {
    let report = answered(&machines::ec2_xen(), |request| {
        match request.path.ends_with("/ephemeral1") {
            true => server::status(404),
            false => clouds::ec2(request),
        }
    });
    assert_eq!(report.instance.instance_stores, None);
}

#[test]
fn gce_is_asked_with_its_header() {
    let report = answered(&machines::gce(), clouds::gce);
    let instance = &report.instance;
    assert_eq!(report.provider, "gce");
    assert_eq!(instance.id.as_deref(), Some("4520031799277581759"));
    assert_eq!(instance.kind.as_deref(), Some("n2-standard-4"));
    assert_eq!(instance.name.as_deref(), Some("node-a"));
    assert_eq!(instance.region.as_deref(), Some("us-central1"));
    assert_eq!(instance.zone.as_deref(), Some("us-central1-a"));
    assert_eq!(instance.mtu, Some(1460));
    assert_eq!(instance.spot, Some(false));
    assert_eq!(texts(&instance.addresses), ["10.128.0.2"]);
    assert_eq!(texts(&instance.public_addresses), ["203.0.113.9"]);
    assert_eq!(report.notices.len(), 1);
    assert_eq!(report.notices[0].kind, NoticeKind::Maintenance);
    assert_eq!(report.notices[0].action, "migrate");
}

#[test]
fn azure_tells_of_this_machines_events_alone() {
    let report = answered(&machines::azure(), clouds::azure);
    let instance = &report.instance;
    assert_eq!(report.provider, "azure");
    assert_eq!(
        instance.id.as_deref(),
        Some("02aab8a4-74ef-476e-8182-f6d2ba4166a6")
    );
    assert_eq!(instance.kind.as_deref(), Some("Standard_D4s_v3"));
    assert_eq!(instance.region.as_deref(), Some("westus2"));
    assert_eq!(instance.zone.as_deref(), Some("westus2-1"));
    assert_eq!(instance.spot, Some(true));
    assert_eq!(texts(&instance.addresses), ["10.2.0.4"]);
    assert_eq!(texts(&instance.public_addresses), ["203.0.113.10"]);
    assert_eq!(report.notices.len(), 1);
    assert_eq!(report.notices[0].kind, NoticeKind::SpotTermination);
    assert_eq!(report.notices[0].at.unwrap().timestamp(), 1_474_309_787);
}

#[test]
fn openstack_tells_its_mtu() {
    let report = answered(&machines::openstack(), clouds::openstack);
    let instance = &report.instance;
    assert_eq!(
        instance.id.as_deref(),
        Some("d8e02d56-2648-49a3-bf97-6be8f1204f38")
    );
    assert_eq!(instance.kind.as_deref(), Some("m1.small"));
    assert_eq!(instance.zone.as_deref(), Some("nova"));
    assert_eq!(instance.mtu, Some(1450));
    assert_eq!(texts(&instance.addresses), ["172.16.0.5"]);
    assert!(instance.public_addresses.is_empty());
}

#[test]
fn digitalocean_and_hetzner_are_read() {
    let report = answered(&machines::digitalocean(), clouds::digitalocean);
    assert_eq!(report.instance.id.as_deref(), Some("2756294"));
    assert_eq!(report.instance.region.as_deref(), Some("nyc3"));
    assert_eq!(
        texts(&report.instance.addresses),
        ["10.132.255.113", "203.0.113.11", "2001:db8::11"]
    );
    let report = answered(&machines::hetzner(), clouds::hetzner);
    assert_eq!(report.instance.id.as_deref(), Some("42"));
    assert_eq!(report.instance.name.as_deref(), Some("node-e"));
    assert_eq!(report.instance.zone.as_deref(), Some("hel1-dc2"));
    assert_eq!(
        texts(&report.instance.addresses),
        ["203.0.113.12", "10.0.0.2"]
    );
    assert_eq!(texts(&report.instance.public_addresses), ["203.0.113.12"]);
}

#[test]
fn a_machine_that_shows_nothing_is_told_by_the_service_that_answers() {
    for (name, handler) in clouds::ALL {
        let server = Server::start(handler);
        let report = ask(&machines::bare_kvm(), &server);
        assert_eq!(report.provider, name, "{report:#?}");
        assert_eq!(report.metadata.state, MetadataState::Answered);
        assert!(report.metadata.problems.is_empty(), "{report:#?}");
        let last = report.evidence.last().unwrap();
        assert_eq!(last.source, Source::Metadata);
        // Every other service was asked for one thing at most.
        let own = PROVIDERS.iter().find(|known| known.name == name).unwrap();
        let own = own.service.unwrap().paths().count();
        assert!(server.asked().len() <= own + PROVIDERS.len(), "{name}");
    }
}

#[test]
fn openstack_is_told_by_its_service_where_the_firmware_is_qemus() {
    let report = answered(&machines::kvm(), clouds::openstack);
    assert_eq!((report.provider, report.platform), ("openstack", "kvm"));
    let report = answered(&machines::dell(), clouds::openstack);
    assert_eq!((report.provider, report.platform), ("openstack", "metal"));
}

#[test]
fn notices_can_be_polled() {
    for (name, handler) in clouds::ALL {
        let server = Server::start(handler);
        let notices = provider::notices(name, &patient(server.address)).unwrap();
        let count = match name {
            "ec2" => 2,
            "gce" | "azure" => 1,
            _ => 0,
        };
        assert_eq!(notices.len(), count, "{name}: {notices:?}");
    }
    let server = Server::start(clouds::nothing);
    // Nothing is announced.
    let notices = provider::notices("ec2", &patient(server.address));
    assert_eq!(notices.unwrap(), []);
    for name in ["bare-metal", "unknown"] {
        let before = server.asked().len();
        assert_eq!(
            provider::notices(name, &patient(server.address)).unwrap(),
            []
        );
        assert_eq!(server.asked().len(), before);
    }
    assert!(provider::notices("nimbus", &patient(server.address)).is_err());
}

#[test]
fn notices_that_cannot_be_asked_for_are_an_error_with_a_remedy() {
    let server = Server::start(|_| server::status(500));
    let error = provider::notices("ec2", &patient(server.address)).unwrap_err();
    assert!(error.to_string().contains("status 500"), "{error}");
    assert!(error.to_string().contains("modify-instance"), "{error}");
}

#[test]
fn a_report_is_json_with_stable_names() {
    let report = answered(&machines::ec2_nitro(), clouds::ec2);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["provider"], "ec2");
    assert_eq!(json["platform"], "nitro");
    assert_eq!(json["instance"]["type"], "m5.large");
    assert_eq!(json["instance"]["addresses"][0], "10.1.0.10");
    assert_eq!(json["metadata"]["state"], "answered");
    assert_eq!(json["notices"][0]["kind"], "spot-termination");
    assert_eq!(json["evidence"][0]["source"], "smbios");
}
