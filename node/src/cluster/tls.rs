//! TLS between nodes: who is let in, and what is said when somebody is not.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};

use super::ca::CA_DOMAIN;
use super::identity::Identity;
use super::names::NodeName;
use super::token::Fingerprint;

/// The protocols that a connection can be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// A new node joins.
    Join,
    /// Nodes ask each other.
    Node,
    /// A stream of bytes.
    Stream,
}

impl Protocol {
    const ALL: [Self; 3] = [Self::Join, Self::Node, Self::Stream];

    fn alpn(self) -> Vec<u8> {
        let name: &[u8] = match self {
            Self::Join => b"blanket-join/1",
            Self::Node => b"blanket-node/1",
            Self::Stream => b"blanket-stream/2",
        };
        name.to_vec()
    }

    /// The one that a handshake has settled.
    pub(crate) fn of(alpn: Option<&[u8]>) -> Option<Self> {
        Self::ALL.into_iter().find(|it| alpn == Some(&it.alpn()))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).context("the CA's certificate")?;
    Ok(Arc::new(roots))
}

/// How a node serves others. Those that join have no certificate yet: whoever
/// asks for another protocol without one is turned away afterwards.
pub(crate) fn server(identity: &Identity) -> Result<Arc<ServerConfig>> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&identity.ca)?, provider())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = Protocol::ALL.map(Protocol::alpn).to_vec();
    // A session that goes on would outlive its certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// How a node asks others.
pub(crate) fn client(identity: &Identity, protocol: Protocol) -> Result<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(&identity.ca)?)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![protocol.alpn()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// How a new node asks the CA's, of which it knows the CA's fingerprint only.
pub(crate) fn joining(fingerprint: Fingerprint) -> Result<Arc<ClientConfig>> {
    let verifier = Arc::new(Pinned {
        fingerprint,
        algorithms: provider().signature_verification_algorithms,
    });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![Protocol::Join.alpn()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The name to ask a node's certificate for.
pub(crate) fn server_name(node: &NodeName) -> Result<ServerName<'static>> {
    Ok(ServerName::try_from(node.domain())?)
}

/// The name to ask the certificate of the CA's node for.
pub(crate) fn ca_server_name() -> Result<ServerName<'static>> {
    Ok(ServerName::try_from(CA_DOMAIN)?)
}

/// Trusts the CA with this fingerprint, which the server has to send along, and
/// nobody else.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = others
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.fingerprint)
            .ok_or(CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        verifier.verify_server_cert(own, others, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What an error of TLS, somewhere among the causes of this one, means between
/// nodes; and what to do about it.
pub(crate) fn explain(error: &(dyn StdError + 'static)) -> Option<(&'static str, &'static str)> {
    const CLOCKS: &str = "check both machines' clocks, and that its blanketd runs";
    const ANEW: &str = "take this node out (blanket node leave) and join again with a new token";
    let (what, remedy) = match find(error)? {
        Error::InvalidCertificate(problem) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => (
                "its certificate is of another cluster",
                "check the address, and where the token is from",
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ("its certificate has expired", CLOCKS)
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                ("its certificate is not valid yet", CLOCKS)
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ("another node answers there", "check the address")
            }
            _ => ("its certificate is refused", ANEW),
        },
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA => (
                "this node's certificate is refused there: it is of another cluster",
                ANEW,
            ),
            AlertDescription::CertificateExpired => (
                "this node's certificate is refused there: it has expired",
                ANEW,
            ),
            AlertDescription::NoApplicationProtocol => (
                "it speaks another protocol",
                "use the same version of blanketd on both",
            ),
            _ => ("this node's certificate is refused there", ANEW),
        },
        Error::InvalidMessage(_) => ("no blanketd answers there", "check the address and port"),
        _ => return None,
    };
    Some((what, remedy))
}

/// The error of TLS among the causes of `error`.
fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    let mut next: Option<&'a (dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<Error>() {
            return Some(found);
        }
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
