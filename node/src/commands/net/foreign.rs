//! Peers that are no switches.

use std::net::{IpAddr, SocketAddr};

use blanket_overlay::api::types::{ForeignKind, ForeignSpec, Peer, PeerSpec};
use blanket_overlay::frame::Vni;
use blanket_overlay::tunnel::{geneve, vxlan};

#[derive(clap::Args)]
pub(super) struct ForeignArgs {
    /// A VXLAN tunnel endpoint (UDP port 4789 if none is given). NOT ENCRYPTED.
    #[arg(long, value_name = "ADDRESS[:PORT]", conflicts_with_all = ["key", "geneve"], requires = "vni", value_parser = vxlan_endpoint)]
    vxlan: Option<SocketAddr>,
    /// A Geneve tunnel endpoint (UDP port 6081 if none is given). NOT ENCRYPTED.
    #[arg(long, value_name = "ADDRESS[:PORT]", conflicts_with = "key", requires = "vni", value_parser = geneve_endpoint)]
    geneve: Option<SocketAddr>,
    /// The networks that such an endpoint is in, by their identifiers.
    #[arg(
        long,
        value_name = "VNIS",
        value_delimiter = ',',
        conflicts_with = "key"
    )]
    vni: Vec<Vni>,
}

fn endpoint(text: &str, port: u16) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>();
    let address = address.map(|address| SocketAddr::new(address, port));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "an IP address, perhaps with a port".to_owned())
}

fn vxlan_endpoint(text: &str) -> Result<SocketAddr, String> {
    endpoint(text, vxlan::PORT)
}

fn geneve_endpoint(text: &str) -> Result<SocketAddr, String> {
    endpoint(text, geneve::PORT)
}

impl ForeignArgs {
    pub(super) fn spec(&self) -> Option<PeerSpec> {
        let vxlan = self.vxlan.map(|to| (ForeignKind::Vxlan, to));
        let geneve = self.geneve.map(|to| (ForeignKind::Geneve, to));
        let (kind, to) = vxlan.or(geneve)?;
        Some(PeerSpec {
            key: String::new(),
            endpoints: vec![to],
            member: false,
            foreign: Some(ForeignSpec {
                kind,
                vnis: self.vni.clone(),
            }),
        })
    }
}

/// Says what such a peer is.
pub(super) fn warned(name: &str, spec: PeerSpec) -> PeerSpec {
    if let Some(foreign) = &spec.foreign {
        let kind = foreign.kind.name();
        eprintln!(
            "WARNING: {kind} IS NOT ENCRYPTED. Whoever is on the way to {name} can read and change \
             all frames, and whoever can send from its address is in these networks."
        );
    }
    spec
}

pub(super) fn state(peer: &Peer) -> String {
    let paths = &peer.status.paths;
    match (&peer.spec.foreign, peer.status.connected) {
        (Some(foreign), _) => foreign.kind.name(),
        // There are keys, and nobody answers.
        (None, true) if paths.iter().all(|path| !path.up) => "unreachable",
        (None, true) => "connected",
        (None, false) => "not connected",
    }
    .to_owned()
}

pub(super) fn cipher(peer: &Peer) -> Option<String> {
    if peer.spec.foreign.is_some() {
        return Some("NONE: NOT ENCRYPTED".to_owned());
    }
    let cipher = peer.status.cipher;
    cipher.map(|cipher| cipher.name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_the_usual_ports_unless_another_one_is_given() {
        for (text, is) in [
            ("192.0.2.1", "192.0.2.1:4789"),
            ("192.0.2.1:8472", "192.0.2.1:8472"),
            ("2001:db8::1", "[2001:db8::1]:4789"),
            ("[2001:db8::1]:8472", "[2001:db8::1]:8472"),
        ] {
            assert_eq!(vxlan_endpoint(text), Ok(is.parse().unwrap()), "{text}");
        }
        assert!(vxlan_endpoint("host").is_err());
    }
}
