//! OpenStack's metadata service, with the part of EC2's that it also has ("Metadata" in Nova's
//! user documentation).

use serde_json::json;

use super::http::{Request, Response};
use super::{State, ec2};

pub(super) fn answer(request: &Request, state: &mut State) -> Response {
    if request.method != "GET" {
        return Response::error(405, "");
    }
    let own = &state.instance;
    match request.path.as_str() {
        "" => Response::text("1.0\n2009-04-04\nlatest"),
        "/openstack" => Response::text("2012-08-10\n2018-08-27\nlatest"),
        "/openstack/latest" => Response::text("meta_data.json\nnetwork_data.json"),
        "/openstack/latest/meta_data.json" => Response::json(&json!({
            "uuid": own.id, "name": own.name, "hostname": format!("{}.novalocal", own.name),
            "availability_zone": own.zone, "launch_index": 0, "meta": {}, "devices": [],
            "project_id": "f7ac731cc11f40efbc03a9f9e1d1d21f",
        })),
        "/openstack/latest/network_data.json" => Response::json(&json!({
            "links": [{
                "id": "tap0", "vif_id": "5e4de8ca", "type": "ovs", "mtu": own.mtu,
                "ethernet_mac_address": own.mac,
            }],
            "networks": [{
                "id": "network0", "type": "ipv4", "link": "tap0", "ip_address": own.address,
                "netmask": "255.255.255.0", "routes": [],
            }],
            "services": [],
        })),
        // EC2's first version, without tokens. It calls machines i-XXXXXXXX.
        "/latest/meta-data/instance-id" => Response::text("i-00000001"),
        path => ec2::leaf(path, state)
            .filter(|_| path.starts_with("/latest/meta-data"))
            .map_or_else(|| Response::error(404, ""), Response::text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_documents_and_those_of_ec2_are_told_to_all() {
        let mut state = State::example();
        let mut get = |path| answer(&Request::of("GET", path, &[]), &mut state);
        let body = |response: Response| -> serde_json::Value {
            serde_json::from_slice(&response.body).unwrap()
        };
        assert_eq!(body(get("/openstack/latest/meta_data.json"))["uuid"], "i-1");
        let network = body(get("/openstack/latest/network_data.json"));
        assert_eq!(network["links"][0]["mtu"], 1500);
        assert_eq!(get("/latest/meta-data/instance-type").body, b"large");
        assert_eq!(
            get("/latest/dynamic/instance-identity/document").status,
            404
        );
    }
}
