//! Compute Engine's metadata server ("About VM metadata" in the Compute Engine documentation).

use serde_json::{Value, json};

use super::http::{Request, Response};
use super::{Event, State, at};

pub(super) fn answer(request: &Request, state: &mut State) -> Response {
    let flavored = |response: Response| {
        response
            .with("Metadata-Flavor", "Google")
            .with("Server", "Metadata Server for VM")
    };
    if request.method != "GET" {
        return flavored(Response::error(405, ""));
    }
    if request.path.is_empty() {
        // How its presence is asked for: no header is needed.
        return flavored(Response::text("computeMetadata/\n"));
    }
    if request.header("Metadata-Flavor") != Some("Google")
        || request.header("x-forwarded-for").is_some()
    {
        return flavored(Response::error(
            403,
            "Missing Metadata-Flavor:Google header.",
        ));
    }
    let recursive = request.field("recursive") == Some("true");
    let found = request
        .path
        .strip_prefix("/computeMetadata/v1")
        .and_then(|path| at(&tree(state), path));
    flavored(match found {
        None => Response::error(404, ""),
        Some(value) if recursive => Response::json(&camel(value)),
        Some(value) => Response::text(listing(&value)),
    })
}

/// All that is told, under the names of the paths.
fn tree(state: &State) -> Value {
    let own = &state.instance;
    let maintenance = match state.event {
        Some(Event::Maintenance) => "MIGRATE_ON_HOST_MAINTENANCE",
        Some(Event::Preemption) => "TERMINATE_ON_HOST_MAINTENANCE",
        None => "NONE",
    };
    let preempted = state.event == Some(Event::Preemption);
    json!({
        "instance": {
            "id": own.id.parse::<u64>().ok(),
            "name": own.name,
            "hostname": format!("{}.c.blanket-test.internal", own.name),
            "machine-type": format!("projects/123456789012/machineTypes/{}", own.kind),
            "zone": format!("projects/123456789012/zones/{}", own.zone),
            "maintenance-event": maintenance,
            "preempted": if preempted { "TRUE" } else { "FALSE" },
            "scheduling": {
                "automatic-restart": "FALSE", "on-host-maintenance": "TERMINATE",
                "preemptible": "TRUE",
            },
            "network-interfaces": [{
                "ip": own.address, "mac": own.mac, "mtu": own.mtu,
                "network": "projects/123456789012/networks/default",
            }],
        },
        "project": { "project-id": "blanket-test", "numeric-project-id": 123_456_789_012_u64 },
    })
}

/// A leaf as text; what a folder has, with a slash behind folders.
fn listing(value: &Value) -> String {
    let entry = |name: &str, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => format!("{name}/\n"),
        _ => format!("{name}\n"),
    };
    match value {
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| entry(key, value))
            .collect(),
        Value::Array(items) => (0..items.len())
            .map(|index| format!("{index}/\n"))
            .collect(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// JSON has `machineType` where paths have `machine-type`.
fn camel(value: Value) -> Value {
    let name = |key: &str| {
        let mut words = key.split('-');
        let mut name = words.next().unwrap_or_default().to_owned();
        for word in words {
            let (first, rest) = word.split_at(word.len().min(1));
            name.push_str(&first.to_ascii_uppercase());
            name.push_str(rest);
        }
        name
    };
    match value {
        Value::Object(entries) => entries
            .into_iter()
            .map(|(key, value)| (name(&key), camel(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(camel).collect(),
        leaf => leaf,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(target: &str) -> Response {
        let mut state = State::example();
        state.instance.id = "4520031799277581759".to_owned();
        answer(
            &Request::of("GET", target, &[("Metadata-Flavor", "Google")]),
            &mut state,
        )
    }

    fn text(target: &str) -> String {
        String::from_utf8(get(target).body).unwrap()
    }

    #[test]
    fn the_flavor_is_told_to_all_and_the_rest_only_to_who_names_it() {
        let mut state = State::example();
        let root = answer(&Request::of("GET", "/", &[]), &mut state);
        assert!(
            root.headers
                .contains(&("Metadata-Flavor", "Google".to_owned()))
        );
        let request = Request::of("GET", "/computeMetadata/v1/instance/id", &[]);
        assert_eq!(answer(&request, &mut state).status, 403);
    }

    #[test]
    fn leaves_folders_and_whole_trees_are_told() {
        assert_eq!(
            text("/computeMetadata/v1/instance/id"),
            "4520031799277581759"
        );
        assert_eq!(
            text("/computeMetadata/v1/instance/network-interfaces/0/mtu"),
            "1500"
        );
        assert!(text("/computeMetadata/v1/instance/").contains("network-interfaces/\n"));
        assert_eq!(get("/computeMetadata/v1/none").status, 404);
        let tree: Value =
            serde_json::from_str(&text("/computeMetadata/v1/?recursive=true")).unwrap();
        assert_eq!(tree["instance"]["networkInterfaces"][0]["mtu"], 1500);
        assert_eq!(tree["project"]["numericProjectId"], 123_456_789_012_u64);
    }
}
