//! Metadata services that lie, hang, talk without end, or speak something else.

use std::time::Duration;

use blanket_drivers::provider::{Asking, LONGEST_ANSWER, MetadataState, Report, report};

use crate::machines::{self, Fixture};
use crate::server::{Handler, Reply, Server, ok, status};
use crate::{ask, clouds, patient};

/// More than the kernel keeps for both ends of a connection.
const BUFFERS: u64 = 32 << 20;

/// What a machine finds out that soon gives up.
fn impatient(fixture: &Fixture, server: &Server) -> Report {
    let asking = Asking {
        total: Duration::from_secs(1),
        ..patient(server.address)
    };
    report(&fixture.machine(), Some(&asking))
}

/// What is known without a metadata service is known still.
fn assert_known_by_firmware(report: &Report, state: MetadataState) {
    assert_eq!(report.provider, "ec2", "{report:#?}");
    assert_eq!(report.instance.id.as_deref(), Some("i-0af01c0123456789a"));
    assert_eq!(report.instance.zone, None);
    assert_eq!(report.metadata.state, state, "{report:#?}");
    assert_eq!(report.metadata.problems.len(), 1, "{report:#?}");
    assert!(report.metadata.remedy.is_some());
}

#[test]
fn a_refused_token_means_the_first_version_and_nothing_else_does() {
    let refusing: [Handler; 2] = [
        |request| clouds::ec2_without_token(request, 403),
        |request| clouds::ec2_without_token(request, 404),
    ];
    for handler in refusing {
        let server = Server::start(handler);
        let report = ask(&machines::ec2_nitro(), &server);
        assert_eq!(report.metadata.state, MetadataState::Answered);
        assert_eq!(report.instance.zone.as_deref(), Some("us-east-1a"));
        let gets = server
            .requests()
            .into_iter()
            .filter(|one| one.method == "GET");
        assert!(gets.clone().count() > 1);
        for request in gets {
            assert_eq!(request.header("X-aws-ec2-metadata-token"), None);
        }
    }
    let failing: [Handler; 4] = [
        |request| clouds::ec2_without_token(request, 500),
        |request| clouds::ec2_without_token(request, 405),
        |request| clouds::ec2_without_token(request, 401),
        // No token at all, or none that a header can carry.
        |request| {
            ok(if request.path.ends_with("token") {
                "a\u{1}b"
            } else {
                ""
            })
        },
    ];
    for handler in failing {
        let server = Server::start(handler);
        let report = ask(&machines::ec2_nitro(), &server);
        assert_known_by_firmware(&report, MetadataState::Unusable);
        assert_eq!(server.asked(), ["PUT /latest/api/token"]);
    }
}

#[test]
fn what_hangs_is_given_up() {
    let hanging: [Handler; 3] = [
        |_| Reply::Hang(b""),
        |_| Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Le"),
        |_| Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nAQAEA"),
    ];
    for handler in hanging {
        let server = Server::start(handler);
        let report = impatient(&machines::ec2_nitro(), &server);
        assert_known_by_firmware(&report, MetadataState::Unanswered);
        assert_eq!(server.asked().len(), 1);
    }
}

#[test]
fn a_service_that_hangs_is_asked_by_all_who_may_be_meant_at_once() {
    let server = Server::start(|_| Reply::Hang(b""));
    let report = impatient(&machines::bare_kvm(), &server);
    assert_eq!(report.provider, "unknown");
    assert_eq!(report.metadata.state, MetadataState::Unanswered);
    assert_eq!(report.metadata.problems.len(), 1, "{report:#?}");
    for (name, _) in clouds::ALL {
        assert!(report.metadata.problems[0].contains(name), "{name}");
    }
    assert_eq!(report.metadata.remedy, None);
    assert_eq!(server.asked().len(), clouds::ALL.len());
}

#[test]
fn details_that_hang_are_left_out() {
    let server = Server::start(|request| match request.path.as_str() {
        "/latest/meta-data/public-ipv4" => Reply::Hang(b""),
        "/latest/meta-data/local-hostname" => Reply::Hang(b"HTTP/1.1 200 OK\r\n\r\nip-10"),
        _ => clouds::ec2(request),
    });
    let asking = Asking {
        total: Duration::from_secs(8),
        ..patient(server.address)
    };
    let report = report(&machines::ec2_nitro().machine(), Some(&asking));
    assert_eq!(report.metadata.state, MetadataState::Answered);
    assert_eq!(report.instance.zone.as_deref(), Some("us-east-1a"));
    assert_eq!(report.instance.spot, Some(true));
    assert_eq!(report.instance.name, None);
    assert!(report.instance.public_addresses.is_empty());
    assert_eq!(report.notices.len(), 2);
    // What failed alike is one problem.
    let [problem] = report.metadata.problems.as_slice() else {
        panic!("{report:#?}");
    };
    assert!(problem.contains("local-hostname") && problem.contains("public-ipv4"));
}

#[test]
fn notices_that_are_slow_have_a_grace_period() {
    let server = Server::start(|request| match request.path.as_str() {
        "/metadata/scheduledevents?api-version=2020-07-01" => Reply::Hang(b""),
        _ => clouds::azure(request),
    });
    let asking = Asking {
        grace: Duration::from_secs(1),
        total: Duration::from_secs(600),
        ..patient(server.address)
    };
    let report = report(&machines::azure().machine(), Some(&asking));
    assert_eq!(report.metadata.state, MetadataState::Answered);
    assert_eq!(report.instance.zone.as_deref(), Some("westus2-1"));
    assert_eq!(report.metadata.problems.len(), 1, "{report:#?}");
    assert!(report.metadata.problems[0].contains("scheduledevents"));
    // It did not wait for as long as it may.
    assert!(report.took_ms < 300_000);
}

#[test]
fn what_has_no_end_is_cut_off() {
    const BODY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n";
    const CHUNKS: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    const HUGE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n";
    let endless: [Handler; 5] = [
        |_| Reply::Endless(BODY, &[b'['; 4096]),
        |_| Reply::Endless(CHUNKS, b"8\r\nxxxxxxxx\r\n"),
        |_| Reply::Endless(HUGE, &[b'x'; 4096]),
        |_| Reply::Endless(b"HTTP/1.1 200 OK\r\n", b"X-More: of the same\r\n"),
        |_| Reply::Endless(b"", &[b'x'; 4096]),
    ];
    for (n, handler) in endless.into_iter().enumerate() {
        let server = Server::start(handler);
        let report = ask(&machines::ec2_nitro(), &server);
        assert_known_by_firmware(&report, MetadataState::Unusable);
        let problem = &report.metadata.problems[0];
        assert_eq!(problem.contains("256 KiB"), n < 3, "{problem}");
        assert_eq!(server.asked().len(), 1);
        let sent = server.sent();
        assert!(sent < LONGEST_ANSWER as u64 + BUFFERS, "{n}: {sent}");
    }
}

#[test]
fn what_is_no_answer_is_none() {
    let garbage: [Handler; 6] = [
        |_| Reply::Raw(b"\xff\x00\x01SSH-2.0-OpenSSH\r\n"),
        |_| Reply::Raw(b""),
        |_| Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nAQ"),
        |_| Reply::Raw(b"HTTP/1.1 999999 \r\n\r\n"),
        |request| match request.method.as_str() {
            "PUT" => ok("token"),
            _ => ok("<html>log in to use the network</html>"),
        },
        |request| match request.method.as_str() {
            "PUT" => ok("token"),
            _ => ok(r#"{"instanceId": ["i-1"], "region": 7}"#),
        },
    ];
    for handler in garbage {
        let server = Server::start(handler);
        let report = ask(&machines::ec2_nitro(), &server);
        assert_known_by_firmware(&report, MetadataState::Unusable);
    }
}

#[test]
fn a_redirect_is_not_followed() {
    static ELSEWHERE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let elsewhere = Server::start(clouds::ec2);
    let url = format!("http://{}/latest/api/token", elsewhere.address);
    ELSEWHERE.set(url).unwrap();
    let server = Server::start(|_| {
        let location = ELSEWHERE.get().unwrap().clone();
        Reply::Answer(307, vec![("Location", location)], Vec::new())
    });
    let report = ask(&machines::ec2_nitro(), &server);
    assert_known_by_firmware(&report, MetadataState::Unusable);
    assert!(report.metadata.problems[0].contains("redirect"));
    assert_eq!(elsewhere.asked(), [""; 0]);
}

#[test]
fn an_answer_without_googles_header_is_not_googles() {
    let server = Server::start(|request| match clouds::gce(request) {
        Reply::Answer(status, _, body) => Reply::Answer(status, Vec::new(), body),
        other => other,
    });
    let report = ask(&machines::gce(), &server);
    assert_eq!(report.metadata.state, MetadataState::Unusable);
    assert_eq!(report.instance.id, None);
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_service_that_claims_to_be_a_cloud_where_the_firmware_says_otherwise_is_not_believed() {
    for (name, handler) in clouds::ALL {
        let server = Server::start(handler);
        let report = ask(&machines::dell(), &server);
        if name == "openstack" {
            continue;
        }
        assert_eq!(report.provider, "bare-metal", "{name}");
        assert_eq!(report.metadata.state, MetadataState::Unusable);
        assert_eq!(report.instance.id, None);
        assert_eq!(report.notices, []);
        assert_eq!(report.doubts.len(), 1);
        assert!(report.doubts[0].contains("Dell"), "{:?}", report.doubts);
    }
}

#[test]
fn where_metadata_and_firmware_differ_the_firmware_is_believed() {
    let fixture = machines::ec2_nitro().smbios(&[("board_asset_tag", "i-0123")]);
    let server = Server::start(clouds::ec2);
    let report = ask(&fixture, &server);
    assert_eq!(report.instance.id.as_deref(), Some("i-0123"));
    assert_eq!(report.doubts.len(), 1);
    assert!(report.doubts[0].contains("i-0af01c0123456789a"));
}

#[test]
fn where_nothing_listens_nobody_waits() {
    let server = Server::start(clouds::nothing);
    let address = server.address;
    drop(server);
    let asking = patient(address);
    let report = report(&machines::ec2_nitro().machine(), Some(&asking));
    assert_known_by_firmware(&report, MetadataState::Unanswered);
    assert!(report.metadata.problems[0].contains("no connection"));
}

#[test]
fn a_service_of_nobody_says_nothing() {
    let server = Server::start(|_| status(404));
    let report = ask(&machines::kvm(), &server);
    assert_eq!(report.provider, "unknown");
    assert_eq!(report.metadata.state, MetadataState::Unusable);
    assert_eq!(report.facts.len(), 6, "{report:#?}");
}
