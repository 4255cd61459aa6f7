//! The CA, and the certificates that it signs.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use super::names::NodeName;
use crate::failure::failure;

/// The name in the certificate of the node that has the CA, beside its own.
pub(crate) const CA_DOMAIN: &str = "ca.blanket.internal";

/// How long a node's certificate is good for. It is renewed after two thirds.
pub(crate) const NODE_LIFE: Duration = Duration::from_secs(30 * 86_400);

/// How long the CA's is.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How far nodes' clocks may differ.
const SKEW: Duration = Duration::from_secs(3600);

/// The CA's key and certificate.
pub(crate) struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    /// A new one; with the PEM of its certificate and of its key.
    pub(crate) fn new() -> Result<(Self, String, String)> {
        let mut params = parameters("Blanket cluster", CA_LIFE);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = new_key()?;
        let key_pem = key.serialize_pem();
        let made = CertifiedIssuer::self_signed(params, key).context("cannot make the CA")?;
        let certificate = made.pem();
        Ok((Self::load(&certificate, &key_pem)?, certificate, key_pem))
    }

    /// The one with this certificate and key.
    pub(crate) fn load(certificate: &str, key: &str) -> Result<Self> {
        let key = KeyPair::from_pem(key).context("the CA's key")?;
        let issuer = Issuer::from_ca_cert_pem(certificate, key).context("the CA's certificate")?;
        Ok(Self(issuer))
    }

    /// The certificate for the key of `request`, which is in PEM. Whatever else
    /// it asks for is not looked at.
    pub(crate) fn sign(
        &self,
        request: &str,
        name: &NodeName,
        has_ca: bool,
        life: Duration,
    ) -> Result<String> {
        let request = CertificateSigningRequestParams::from_pem(request).map_err(|error| {
            failure(
                format!("the certificate signing request is refused: {error}"),
                "join with the same version of blanket",
            )
        })?;
        let mut names = vec![name.domain()];
        if has_ca {
            names.push(CA_DOMAIN.to_owned());
        }
        let mut params = parameters(name.as_str(), life);
        params.subject_alt_names = CertificateParams::new(names)?.subject_alt_names;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params
            .signed_by(&request.public_key, &self.0)
            .context("cannot sign the certificate")?;
        Ok(certificate.pem())
    }
}

fn parameters(name: &str, life: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (now - SKEW).into();
    params.not_after = (now + life).into();
    params
}

/// A new key: ECDSA on P-256.
pub(crate) fn new_key() -> Result<KeyPair> {
    KeyPair::generate().context("cannot make a key")
}

/// Asks for a certificate for `key`, in PEM.
pub(crate) fn request(key: &KeyPair) -> Result<String> {
    let request = CertificateParams::default()
        .serialize_request(key)
        .context("cannot ask for a certificate")?;
    Ok(request.pem()?)
}
