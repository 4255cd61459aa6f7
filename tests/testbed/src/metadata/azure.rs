//! Azure's instance metadata service, and its scheduled events ("Azure Instance Metadata Service"
//! and "Scheduled Events for Linux VMs" in Azure's documentation).

use serde_json::{Value, json};

use super::http::{Request, Response};
use super::{Event, State, at};

pub(super) fn answer(request: &Request, state: &mut State) -> Response {
    let bad = |reason: &str| {
        let mut response = Response::json(&json!({ "error": reason }));
        response.status = 400;
        response
    };
    if request.method != "GET" {
        return Response::error(405, "");
    }
    let named = request
        .header("Metadata")
        .is_some_and(|value| value.eq_ignore_ascii_case("true"));
    if !named || request.header("x-forwarded-for").is_some() {
        return bad("Bad request. Required metadata header not specified");
    }
    if !request.field("api-version").is_some_and(is_date) {
        return bad("Bad request. api-version is invalid or was not specified in the request.");
    }
    if request.path == "/metadata/scheduledevents" {
        return Response::json(&events(state));
    }
    let path = request.path.strip_prefix("/metadata/instance");
    match path.and_then(|path| at(&tree(state), path)) {
        None => Response::error(404, ""),
        Some(Value::String(text)) if request.field("format") == Some("text") => {
            Response::text(text)
        }
        Some(Value::Object(_) | Value::Array(_)) if request.field("format") == Some("text") => {
            bad("Bad request. The format text is for leaves only.")
        }
        Some(value) => Response::json(&value),
    }
}

/// `2021-02-01`
fn is_date(version: &str) -> bool {
    let mut parts = version
        .split('-')
        .map(|part| (part.len(), part.parse::<u16>().is_ok()));
    [4, 2, 2]
        .iter()
        .all(|len| parts.next() == Some((*len, true)))
        && parts.next().is_none()
}

fn tree(state: &State) -> Value {
    let own = &state.instance;
    json!({
        "compute": {
            "azEnvironment": "AzurePublicCloud", "location": own.region, "name": own.name,
            "osType": "Linux", "priority": "Spot", "provider": "Microsoft.Compute",
            "resourceGroupName": "blanket-test", "vmId": own.id, "vmSize": own.kind,
            "zone": own.zone,
        },
        "network": { "interface": [{
            "ipv4": {
                "ipAddress": [{ "privateIpAddress": own.address, "publicIpAddress": "" }],
                "subnet": [{ "address": "10.0.0.0", "prefix": "24" }],
            },
            "macAddress": own.mac.replace(':', "").to_ascii_uppercase(),
        }]},
    })
}

fn events(state: &State) -> Value {
    let event = |kind: &str| {
        json!([{
            "EventId": "602d9444-d2cd-49c7-8624-8643e7171297", "EventType": kind,
            "ResourceType": "VirtualMachine", "Resources": [state.instance.name],
            "EventStatus": "Scheduled", "NotBefore": "Mon, 21 Jan 2030 09:00:43 GMT",
            "EventSource": "Platform", "DurationInSeconds": -1,
        }])
    };
    let (incarnation, events) = match state.event {
        None => (1, json!([])),
        Some(Event::Preemption) => (2, event("Preempt")),
        Some(Event::Maintenance) => (2, event("Freeze")),
    };
    json!({ "DocumentIncarnation": incarnation, "Events": events })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(target: &str, headers: &[(&str, &str)], state: &mut State) -> (u16, String) {
        let response = answer(&Request::of("GET", target, headers), state);
        (response.status, String::from_utf8(response.body).unwrap())
    }

    #[test]
    fn the_header_and_a_version_are_needed() {
        let mut state = State::example();
        let named: &[_] = &[("Metadata", "true")];
        let version = "/metadata/instance?api-version=2021-02-01";
        assert_eq!(get(version, &[], &mut state).0, 400);
        assert_eq!(get("/metadata/instance", named, &mut state).0, 400);
        assert_eq!(
            get("/metadata/instance?api-version=x", named, &mut state).0,
            400
        );
        let (status, body) = get(version, named, &mut state);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["compute"]["vmId"]), (200, &json!("i-1")));
        let leaf =
            "/metadata/instance/network/interface/0/macAddress?api-version=2021-02-01&format=text";
        assert_eq!(get(leaf, named, &mut state).1, "020000000001");
    }

    #[test]
    fn events_are_told_when_they_are_announced() {
        let mut state = State::example();
        let target = "/metadata/scheduledevents?api-version=2020-07-01";
        assert!(
            get(target, &[("Metadata", "true")], &mut state)
                .1
                .contains("\"Events\":[]")
        );
        state.event = Some(Event::Preemption);
        assert!(
            get(target, &[("Metadata", "true")], &mut state)
                .1
                .contains("Preempt")
        );
    }
}
