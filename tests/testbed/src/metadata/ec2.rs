//! EC2's metadata service, version 2: nothing is told without a token ("Access instance metadata
//! for an EC2 instance" in the EC2 User Guide).

use std::time::{Duration, Instant};

use serde_json::json;

use super::http::{Request, Response};
use super::{Event, State};

const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds";

/// Seconds that a token may last.
const MAX_TTL: u64 = 21_600;

pub(super) fn answer(request: &Request, state: &mut State) -> Response {
    if request.header("x-forwarded-for").is_some() {
        return Response::error(403, "");
    }
    match (request.method.as_str(), request.path.as_str()) {
        ("PUT", "/latest/api/token") => token(request, state),
        ("GET", path) => {
            let valid = |given: &str| {
                let known = state.tokens.iter().find(|(token, _)| token == given);
                known.is_some_and(|(_, until)| Instant::now() < *until)
            };
            if !request
                .header("X-aws-ec2-metadata-token")
                .is_some_and(valid)
            {
                return Response::error(401, "");
            }
            leaf(path, state).map_or_else(|| Response::error(404, ""), Response::text)
        }
        _ => Response::error(405, ""),
    }
}

fn token(request: &Request, state: &mut State) -> Response {
    let ttl = request.header(TTL).and_then(|ttl| ttl.parse().ok());
    let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TTL).contains(ttl)) else {
        return Response::error(400, "");
    };
    let token = format!("AQAEA{:032x}==", fastrand::u128(..));
    let until = Instant::now() + Duration::from_secs(ttl);
    state.tokens.push((token.clone(), until));
    Response::text(token).with(TTL, ttl.to_string())
}

/// What is told at a path.
pub(super) fn leaf(path: &str, state: &State) -> Option<String> {
    let own = &state.instance;
    if path == "/latest/dynamic/instance-identity/document" {
        let document = json!({
            "accountId": "123456789012", "architecture": "x86_64",
            "availabilityZone": own.zone, "imageId": "ami-0123456789abcdef0",
            "instanceId": own.id, "instanceType": own.kind,
            "privateIp": own.address, "region": own.region, "version": "2017-09-30",
        });
        return Some(document.to_string());
    }
    let path = path.strip_prefix("/latest/meta-data")?;
    let card = format!("/network/interfaces/macs/{}", own.mac);
    if let Some(rest) = path.strip_prefix(&card) {
        return match rest {
            "" => Some("device-number\nlocal-ipv4s\nmac".to_owned()),
            "/device-number" => Some("0".to_owned()),
            "/local-ipv4s" => Some(own.address.clone()),
            "/mac" => Some(own.mac.clone()),
            _ => None,
        };
    }
    let spot = state.event == Some(Event::Preemption);
    let at = state.at.as_deref().unwrap_or("2030-01-21T09:00:43Z");
    let maintenance = match state.event {
        Some(Event::Maintenance) => json!([{
            "Code": "system-reboot", "Description": "scheduled reboot", "State": "active",
            "EventId": "instance-event-0d59937288b749b32",
            "NotBefore": "21 Jan 2030 09:00:43 GMT", "NotAfter": "21 Jan 2030 09:17:23 GMT",
        }]),
        _ => json!([]),
    };
    match path {
        "" => Some(
            "events/\ninstance-id\ninstance-life-cycle\ninstance-type\nlocal-hostname\nlocal-ipv4\n\
             mac\nnetwork/\nplacement/"
                .to_owned(),
        ),
        "/instance-id" => Some(own.id.clone()),
        "/instance-type" => Some(own.kind.clone()),
        "/instance-life-cycle" => Some("spot".to_owned()),
        "/local-hostname" => Some(own.name.clone()),
        "/local-ipv4" => Some(own.address.clone()),
        "/mac" => Some(own.mac.clone()),
        "/network/interfaces/macs" => Some(format!("{}/", own.mac)),
        "/placement/availability-zone" => Some(own.zone.clone()),
        "/placement/region" => Some(own.region.clone()),
        "/events/maintenance/scheduled" => Some(maintenance.to_string()),
        "/spot/instance-action" if spot => {
            Some(json!({"action": "terminate", "time": at}).to_string())
        }
        "/spot/termination-time" if spot => Some(at.to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "X-aws-ec2-metadata-token";

    fn get(state: &mut State, path: &str, token: &str) -> Response {
        answer(&Request::of("GET", path, &[(TOKEN, token)]), state)
    }

    #[test]
    fn nothing_is_told_without_a_token_of_its_own() {
        let mut state = State::example();
        let id = "/latest/meta-data/instance-id";
        let plain = Request::of("GET", id, &[]);
        assert_eq!(answer(&plain, &mut state).status, 401);
        assert_eq!(get(&mut state, id, "guess").status, 401);
        for ttl in ["", "0", "21601"] {
            let request = Request::of("PUT", "/latest/api/token", &[(TTL, ttl)]);
            assert_eq!(answer(&request, &mut state).status, 400);
        }
        let request = Request::of("PUT", "/latest/api/token", &[(TTL, "60")]);
        let token = String::from_utf8(answer(&request, &mut state).body).unwrap();
        assert_eq!(get(&mut state, id, &token).body, b"i-1");
        assert_eq!(
            get(&mut state, "/latest/meta-data/none", &token).status,
            404
        );
        let forwarded = Request::of(
            "PUT",
            "/latest/api/token",
            &[(TTL, "60"), ("X-Forwarded-For", "a")],
        );
        assert_eq!(answer(&forwarded, &mut state).status, 403);
    }

    #[test]
    fn an_expired_token_is_none() {
        let mut state = State::example();
        state.tokens.push(("old".to_owned(), Instant::now()));
        assert_eq!(get(&mut state, "/latest/meta-data/mac", "old").status, 401);
    }

    #[test]
    fn a_spot_notice_appears_when_it_is_announced() {
        let mut state = State::example();
        let path = "/latest/meta-data/spot/instance-action";
        assert_eq!(leaf(path, &state), None);
        state.event = Some(Event::Preemption);
        assert!(leaf(path, &state).unwrap().contains("terminate"));
    }
}
