//! Metadata of every provider, as it should not be.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::provider::instance::NoticeKind;
use crate::provider::service::{Answers, Service};
use crate::provider::text::LONGEST;

fn service(name: &str) -> &'static Service {
    let known = KNOWN.iter().find(|known| known.name == name);
    known.unwrap().service.unwrap()
}

fn answers(bodies: &[(&'static str, &str)]) -> Answers {
    let mut answers = Answers::default();
    for (path, body) in bodies {
        answers.add(path, (*body).into());
    }
    answers
}

#[test]
fn a_document_without_an_identifier_is_not_the_providers() {
    for known in KNOWN {
        let Some(service) = known.service else {
            continue;
        };
        for body in ["", "null", "{}", "[]", "\u{0}", "<html></html>", "x: y"] {
            let first = service.paths().next().unwrap();
            assert!(service.read(&answers(&[(first, body)])).is_none());
        }
        assert!(service.read(&Answers::default()).is_none());
        assert!(service.read_notices(&Answers::default()).is_empty());
    }
}

#[test]
fn fields_of_the_wrong_kind_are_left_out() {
    let path = "/latest/dynamic/instance-identity/document";
    let body = json!({"instanceId": "i-1", "instanceType": 1.5, "region": null,
        "privateIp": "10.0.0.256", "availabilityZone": "a\nb\u{1b}[2J"});
    let read = service("ec2").read(&answers(&[(path, &body.to_string())]));
    let instance = read.unwrap();
    assert_eq!(instance.kind, None);
    assert_eq!(instance.region, None);
    assert!(instance.addresses.is_empty());
    assert_eq!(instance.zone.as_deref(), Some("a?b?[2J"));
}

#[test]
fn a_notice_whose_time_cannot_be_read_may_be_due_now() {
    let spot = "/latest/meta-data/spot/instance-action";
    let found =
        service("ec2").read_notices(&answers(&[(spot, r#"{"action": "stop", "time": "?"}"#)]));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].at, None);
    let rebalance = "/latest/meta-data/events/recommendations/rebalance";
    let found = service("ec2").read_notices(&answers(&[(
        rebalance,
        r#"{"noticeTime": "2020-11-05T08:22:00Z"}"#,
    )]));
    assert_eq!(found[0].kind, NoticeKind::Rebalance);
    assert!(found[0].at.is_some());
}

#[test]
fn a_preempted_machine_of_googles_is_told() {
    let found = service("gce").read_notices(&answers(&[
        ("/computeMetadata/v1/instance/preempted", "TRUE\n"),
        ("/computeMetadata/v1/instance/maintenance-event", "NONE\n"),
    ]));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].kind, NoticeKind::SpotTermination);
}

#[test]
fn of_many_events_a_bounded_number_is_kept() {
    let event = json!({"EventType": "Freeze", "Resources": []});
    let body = json!({ "Events": vec![event; 1000] }).to_string();
    let path = "/metadata/scheduledevents?api-version=2020-07-01";
    assert_eq!(
        service("azure")
            .read_notices(&answers(&[(path, &body)]))
            .len(),
        32
    );
}

/// Keys of many providers.
const KEYS: &[&str] = &[
    "instanceId",
    "instanceType",
    "droplet_id",
    "uuid",
    "compute",
    "network",
    "links",
    "interfaces",
    "Events",
    "action",
    "time",
    "vmId",
    "mtu",
];

/// JSON of the shape that some provider's answers have, or any.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let word = || {
        prop_oneof![
            any::<String>().prop_map(|text| json!(text)),
            any::<i64>().prop_map(|number| json!(number)),
            Just(json!("i-1")),
            Just(json!("10.0.0.1")),
            Just(json!([{"ip": "10.0.0.1", "mtu": 1500}])),
        ]
    };
    let key = proptest::sample::select(KEYS);
    let object = proptest::collection::btree_map(key, word(), 0..6);
    prop_oneof![
        any::<Vec<u8>>(),
        object.prop_map(|map| json!(map).to_string().into_bytes()),
        word().prop_map(|value| value.to_string().into_bytes()),
        any::<String>().prop_map(|text| format!("instance-id: 7\nregion: {text}").into_bytes()),
    ]
}

proptest! {
    #[test]
    fn any_answers_are_read_or_refused(bodies in proptest::collection::vec(body(), 9)) {
        for known in KNOWN {
            let Some(service) = known.service else { continue };
            let mut answers = Answers::default();
            for (path, body) in service.paths().zip(&bodies) {
                answers.add(path, body.clone());
            }
            let instance = service.read(&answers).unwrap_or_default();
            let texts = [instance.id, instance.kind, instance.name, instance.region];
            for text in texts.into_iter().flatten() {
                prop_assert!(!text.chars().any(char::is_control));
                prop_assert!(text.chars().count() <= LONGEST);
            }
            prop_assert!(service.read_notices(&answers).len() <= 32);
        }
    }
}
