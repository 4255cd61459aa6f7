//! What a provider tells about its machine.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

use super::facts::{Facts, Source};
use super::text::clean;

/// So many addresses and notices of a machine are kept.
const MOST: usize = 32;

/// The least MTU that IPv4 allows, in bytes (RFC 791).
const LEAST_MTU: u64 = 68;

/// The machine, as its provider knows it. What the provider does not tell is
/// `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// The provider's identifier.
    pub id: Option<String>,
    /// The type or flavour, like `m5.large`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The name that its owner gave it.
    pub name: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The zone within the region.
    pub zone: Option<String>,
    /// Whether the provider may take it away at any time.
    pub spot: Option<bool>,
    /// The largest packet that all its networks carry, in bytes.
    pub mtu: Option<u32>,
    /// The names of its disks that are instance store, if it tells of all that
    /// do not tell it themselves; as the kernel has them (`xvdb`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_stores: Option<Vec<String>>,
    /// Addresses of its interfaces.
    pub addresses: Vec<IpAddr>,
    /// Addresses by which it is reached from elsewhere.
    pub public_addresses: Vec<IpAddr>,
}

impl Instance {
    /// Adds an address of an interface.
    pub(super) fn add_address(&mut self, address: Option<&str>) {
        add(&mut self.addresses, address);
    }

    /// Adds an address by which it is reached from elsewhere.
    pub(super) fn add_public_address(&mut self, address: Option<&str>) {
        add(&mut self.public_addresses, address);
    }

    /// Takes the MTU of one of its networks into account.
    pub(super) fn add_mtu(&mut self, mtu: Option<&Value>) {
        let mtu = mtu.and_then(Value::as_u64).unwrap_or(0);
        if let (true, Ok(mtu)) = (mtu >= LEAST_MTU, u16::try_from(mtu)) {
            let mtu = u32::from(mtu);
            self.mtu = Some(self.mtu.map_or(mtu, |known| known.min(mtu)));
        }
    }
}

fn add(to: &mut Vec<IpAddr>, address: Option<&str>) {
    let Some(Ok(address)) = address.map(|text| text.trim().parse::<IpAddr>()) else {
        return;
    };
    let a_machines = !address.is_unspecified() && !address.is_loopback() && !address.is_multicast();
    if a_machines && to.len() < MOST && !to.contains(&address) {
        to.push(address);
    }
}

/// What a notice is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticeKind {
    /// The provider takes the machine away.
    SpotTermination,
    /// The provider is likely to take the machine away.
    Rebalance,
    /// The provider works on the hardware underneath.
    Maintenance,
}

/// Something that the provider is about to do to the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// What it is about.
    pub kind: NoticeKind,
    /// What happens to the machine, in the provider's word: `terminate`,
    /// `reboot`, `freeze`, ...
    pub action: String,
    /// Not before this time; `None` if it can be now.
    pub at: Option<DateTime<Utc>>,
    /// The provider's identifier of the event.
    pub id: Option<String>,
    /// The provider's description.
    pub description: Option<String>,
}

impl Notice {
    /// A notice without details, of an action in lower case.
    pub(super) fn new(kind: NoticeKind, action: &str) -> Self {
        Self {
            kind,
            action: action.to_ascii_lowercase(),
            at: None,
            id: None,
            description: None,
        }
    }
}

/// At most so many notices as anybody will look at.
pub(super) fn bounded(notices: impl Iterator<Item = Notice>) -> Vec<Notice> {
    notices.take(MOST).collect()
}

/// A time as RFC 3339 or RFC 5322 (section 3.3) writes it.
pub(super) fn time(text: &str) -> Option<DateTime<Utc>> {
    let time = DateTime::parse_from_rfc3339(text);
    let time = time.or_else(|_| DateTime::parse_from_rfc2822(text)).ok()?;
    Some(time.to_utc())
}

/// The machine of a provider that has its identity in the serial number.
pub(super) fn of_serial(facts: &Facts) -> Instance {
    let id = facts.get(Source::Smbios, "product_serial");
    Instance {
        id: id.map(str::to_owned),
        ..Instance::default()
    }
}

/// Text or a whole number somewhere in a JSON document.
pub(super) fn string(document: &Value, pointer: &str) -> Option<String> {
    match document.pointer(pointer)? {
        Value::String(text) => clean(text.as_bytes()),
        Value::Number(number) if !number.is_f64() => Some(number.to_string()),
        _ => None,
    }
}

/// The elements of a list somewhere in a JSON document.
pub(super) fn list<'a>(document: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    let list = document.pointer(pointer).and_then(Value::as_array);
    list.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_addresses_that_a_machine_can_have_are_kept_once() {
        let mut instance = Instance::default();
        for text in [
            "10.0.0.1",
            " 10.0.0.1\n",
            "fe80::1",
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "no",
        ] {
            instance.add_address(Some(text));
        }
        instance.add_address(None);
        assert_eq!(instance.addresses.len(), 2);
        for n in 0..200 {
            instance.add_public_address(Some(&format!("10.0.1.{n}")));
        }
        assert_eq!(instance.public_addresses.len(), MOST);
    }

    #[test]
    fn the_least_sound_mtu_counts() {
        let mut instance = Instance::default();
        for mtu in [json!(67), json!(65536), json!(-1), json!("1500"), json!([])] {
            instance.add_mtu(Some(&mtu));
        }
        assert_eq!(instance.mtu, None);
        for mtu in [json!(8900), json!(1460), json!(9001)] {
            instance.add_mtu(Some(&mtu));
        }
        assert_eq!(instance.mtu, Some(1460));
    }

    #[test]
    fn times_of_every_provider_are_read() {
        for text in [
            "2019-01-21T09:00:43Z",
            "21 Jan 2019 09:00:43 GMT",
            "Mon, 21 Jan 2019 09:00:43 GMT",
        ] {
            let time = time(text).unwrap();
            assert_eq!(time.timestamp(), 1_548_061_243, "{text}");
        }
        assert_eq!(time("soon"), None);
    }

    #[test]
    fn a_notice_is_json_with_its_time() {
        let mut notice = Notice::new(NoticeKind::SpotTermination, "TERMINATE");
        notice.at = time("2026-01-01T00:00:00Z");
        let json = serde_json::to_value(&notice).unwrap();
        assert_eq!(json["kind"], "spot-termination");
        assert_eq!(json["action"], "terminate");
        assert_eq!(json["at"], "2026-01-01T00:00:00Z");
    }
}
