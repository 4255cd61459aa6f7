//! Names and addresses, as users and other nodes write them.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The port that `blanketd` listens on unless told otherwise.
pub const PORT: u16 = 7117;

/// The longest address, in bytes: a domain name (RFC 1035, section 2.3.4) and a port.
const MAX_ADDRESS: usize = 255 + 6;

/// What is wrong with a name or an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No name of a node.
    #[error(
        "a node's name has 1 to 63 small letters, digits and '-', and begins and ends with a \
         letter or digit"
    )]
    Node,
    /// No name of a service.
    #[error("a service's name has 1 to 100 letters, digits, '.', '_', '-' and '/'")]
    Service,
    /// No address.
    #[error("an address is HOST, HOST:PORT or [IPv6]:PORT")]
    Address,
}

/// Makes serde read and write a type as text.
macro_rules! as_text {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl $type {
            /// As text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    };
}

/// A node's name: a label of a domain name, in small letters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

as_text!(NodeName);

impl FromStr for NodeName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let inner = text.bytes().all(|b| plain(b) || b == b'-');
        let ends = text.bytes().next().is_some_and(plain) && text.bytes().last().is_some_and(plain);
        if inner && ends && text.len() <= 63 {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::Node)
    }
}

impl NodeName {
    /// The name that a host name suggests: its first label, without what a
    /// node's name cannot have.
    #[must_use]
    pub fn suggested(host: &str) -> Option<Self> {
        let label = host.split('.').next().unwrap_or_default();
        let plain: String = label
            .to_ascii_lowercase()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(63)
            .collect();
        plain.trim_matches('-').parse().ok()
    }

    /// The name that this node's certificate is for.
    #[must_use]
    pub fn domain(&self) -> String {
        format!("{self}.node.blanket.internal")
    }
}

/// The name of something on a node that streams of bytes can be opened to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

as_text!(ServiceName);

impl FromStr for ServiceName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let known = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
        if (1..=100).contains(&text.len()) && text.bytes().all(known) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::Service)
    }
}

/// Where a node is reached: a host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(String);

as_text!(Address);

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl FromStr for Address {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_ADDRESS {
            return Err(Error::Address);
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(address.into());
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        if let Ok(address) = bare.unwrap_or(text).parse::<Ipv6Addr>() {
            return Ok(Self(format!("[{address}]:{PORT}")));
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, port.parse::<u16>().map_err(|_| Error::Address)?),
            None => (text, PORT),
        };
        let known = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
        let first = host
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        if port > 0 && first && host.bytes().all(known) {
            return Ok(Self(format!("{host}:{port}")));
        }
        Err(Error::Address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_read_is_written_and_read_again_as_the_same(text in ".{0,80}") {
            if let Ok(name) = text.parse::<NodeName>() {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert!(rustls::pki_types::ServerName::try_from(name.domain()).is_ok());
            }
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
            }
            if let Some(name) = NodeName::suggested(&text) {
                prop_assert_eq!(name.as_str().parse::<NodeName>().unwrap(), name);
            }
        }

        #[test]
        fn hosts_with_and_without_ports_are_addresses(
            host in "[a-z][a-z0-9-]{0,20}(\\.[a-z][a-z0-9]{0,8}){0,3}", port in 1u16..
        ) {
            let plain = host.parse::<Address>().unwrap();
            prop_assert_eq!(plain.to_string(), format!("{host}:{PORT}"));
            let full = format!("{host}:{port}");
            prop_assert_eq!(full.parse::<Address>().unwrap().to_string(), full);
        }
    }

    #[test]
    fn addresses_get_their_port_and_nonsense_is_refused() {
        for (text, is) in [
            ("10.0.0.1", "10.0.0.1:7117"),
            ("10.0.0.1:9", "10.0.0.1:9"),
            ("fd00::1", "[fd00::1]:7117"),
            ("[fd00::1]", "[fd00::1]:7117"),
            ("[fd00::1]:8", "[fd00::1]:8"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), is);
        }
        for bad in ["", ":7", "a:0", "a:x", "a:70000", "a b", "-a", "a:1:2", "ä"] {
            assert!(bad.parse::<Address>().is_err(), "{bad:?}");
        }
        for bad in ["", "A", "-a", "a-", "a.b", "a_b", &"a".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
        let name = NodeName::suggested("Web_1.example.org").unwrap();
        assert_eq!(name.as_str(), "web-1");
        assert!("../x y".parse::<ServiceName>().is_err());
    }
}
