//! Where controllers are, as users of `ovs-vsctl set-controller` write it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// OpenFlow's port, if none is said.
const PORT: u16 = 6653;

/// A controller, or where controllers are waited for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// `tcp:HOST[:PORT]`: it is connected to.
    Tcp(String, u16),
    /// `ssl:HOST[:PORT]`: the same by TLS.
    Ssl(String, u16),
    /// `unix:PATH`: the same on this machine.
    Unix(PathBuf),
    /// `ptcp:[PORT][:ADDRESS]`: controllers, and `ovs-ofctl`, connect.
    Ptcp(SocketAddr),
    /// `pssl:[PORT][:ADDRESS]`: the same by TLS.
    Pssl(SocketAddr),
    /// `punix:PATH`: the same on this machine.
    Punix(PathBuf),
}

/// What is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no controller: write tcp:HOST:PORT, ssl:HOST:PORT or unix:PATH for one to connect to, ptcp:PORT[:ADDRESS], pssl:PORT[:ADDRESS] or punix:PATH to wait for some"
)]
pub struct NoTarget(String);

/// A host and a port, the port being usual if there is none.
fn host(text: &str) -> Option<(String, u16)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once(']')?;
        address.parse::<std::net::Ipv6Addr>().ok()?;
        return Some((address.to_owned(), port(rest)?));
    }
    let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let fits = (1..=253).contains(&host.len()) && host.bytes().all(sound);
    Some((host.to_owned(), port(rest)?)).filter(|_| fits)
}

/// `:PORT`, or nothing.
fn port(text: &str) -> Option<u16> {
    match text.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|port| *port != 0),
        None => text.is_empty().then_some(PORT),
    }
}

/// Where to listen: `[PORT][:ADDRESS]` as in Open vSwitch, or `ADDRESS:PORT`;
/// on this machine only if there is no address.
fn listen(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let (first, address) = text.split_once(':').unwrap_or((text, ""));
    let port = if first.is_empty() {
        PORT
    } else {
        first.parse().ok()?
    };
    let address = match address.trim_matches(['[', ']']) {
        "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        address => address.parse().ok()?,
    };
    Some(SocketAddr::new(address, port))
}

fn path(text: &str) -> Option<PathBuf> {
    text.starts_with('/').then(|| PathBuf::from(text))
}

impl FromStr for Target {
    type Err = NoTarget;

    fn from_str(text: &str) -> Result<Self, NoTarget> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let tcp = |make: fn(String, u16) -> Self| host(rest).map(|(host, port)| make(host, port));
        let target = match kind {
            "tcp" => tcp(Self::Tcp),
            "ssl" => tcp(Self::Ssl),
            "unix" => path(rest).map(Self::Unix),
            "ptcp" => listen(rest).map(Self::Ptcp),
            "pssl" => listen(rest).map(Self::Pssl),
            "punix" => path(rest).map(Self::Punix),
            _ => None,
        };
        target.ok_or_else(|| NoTarget(text.to_owned()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |f: &mut fmt::Formatter<'_>, kind, host: &str, port| {
            if host.contains(':') {
                write!(f, "{kind}:[{host}]:{port}")
            } else {
                write!(f, "{kind}:{host}:{port}")
            }
        };
        let listen = |f: &mut fmt::Formatter<'_>, kind, at: &SocketAddr| match at.ip() {
            IpAddr::V4(ip) => write!(f, "{kind}:{}:{ip}", at.port()),
            IpAddr::V6(ip) => write!(f, "{kind}:{}:[{ip}]", at.port()),
        };
        match self {
            Self::Tcp(name, port) => host(f, "tcp", name, *port),
            Self::Ssl(name, port) => host(f, "ssl", name, *port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Ptcp(at) => listen(f, "ptcp", at),
            Self::Pssl(at) => listen(f, "pssl", at),
            Self::Punix(path) => write!(f, "punix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Target {
    type Error = NoTarget;

    fn try_from(text: String) -> Result<Self, NoTarget> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl Target {
    /// Whether it is connected to: a network should have such a controller.
    /// Who connects by itself is welcome, and not missed.
    #[must_use]
    pub fn is_active(&self) -> bool {
        matches!(self, Self::Tcp(..) | Self::Ssl(..) | Self::Unix(_))
    }

    /// Whether it takes a key and certificates.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Ssl(..) | Self::Pssl(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_open_vswitch() {
        for (text, shown) in [
            ("tcp:10.0.0.1:6633", "tcp:10.0.0.1:6633"),
            ("tcp:10.0.0.1", "tcp:10.0.0.1:6653"),
            ("tcp:[fd00::1]:6633", "tcp:[fd00::1]:6633"),
            ("ssl:controller.example:1", "ssl:controller.example:1"),
            ("ptcp:", "ptcp:6653:127.0.0.1"),
            ("ptcp:6633", "ptcp:6633:127.0.0.1"),
            ("ptcp:6633:0.0.0.0", "ptcp:6633:0.0.0.0"),
            ("ptcp:0.0.0.0:6633", "ptcp:6633:0.0.0.0"),
            ("pssl:6633:[::1]", "pssl:6633:[::1]"),
            ("pssl:[::1]:6633", "pssl:6633:[::1]"),
            ("punix:/run/blue.mgmt", "punix:/run/blue.mgmt"),
            ("unix:/run/c", "unix:/run/c"),
        ] {
            let target: Target = text.parse().expect("a target");
            assert_eq!(target.to_string(), shown);
            assert_eq!(shown.parse(), Ok(target));
        }
        for wrong in [
            "",
            "tcp",
            "tcp:",
            "tcp::1",
            "tcp:a:0",
            "tcp:a:x",
            "tcp:a:99999",
            "tcp:fd00::1:1",
            "tcp:a b:1",
            "udp:a:1",
            "punix:x",
            "ptcp:x",
            "ptcp:1:host",
            "pssl:1:2:3",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
