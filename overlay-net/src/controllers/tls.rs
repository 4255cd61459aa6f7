//! TLS to controllers: both sides show certificates of one authority.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Files of this switch, read again for each connection: they may be renewed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The private key (PEM).
    pub key: PathBuf,
    /// Its certificate (PEM), with those between it and the authority's.
    pub certificate: PathBuf,
    /// The certificates (PEM) of the authority that controllers have theirs
    /// from.
    pub ca: PathBuf,
    /// What a controller that is connected to is called in its certificate;
    /// none: what its target says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be used.
    #[error("{}: {why}; {remedy}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// What is in the files does not fit.
    #[error("the key {} and the certificate {}: {why}; give a key and its certificate (PEM)", key.display(), certificate.display())]
    Pair {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
        /// Why not.
        why: String,
    },
    /// A name that nobody can have.
    #[error("`{0}` is no name of a server: give --tls-name the one in its certificate")]
    Name(String),
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| Error::File {
        path: path.to_owned(),
        why: error.to_string(),
        remedy: "name a file that the switch can read",
    })
}

fn wrong(path: &Path, remedy: &'static str) -> impl FnOnce(&dyn Display) -> Error {
    move |why| Error::File {
        path: path.to_owned(),
        why: why.to_string(),
        remedy,
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

impl Tls {
    fn roots(&self) -> Result<Arc<RootCertStore>, Error> {
        const REMEDY: &str = "give the authority's certificate (PEM)";
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&read(&self.ca)?) {
            let certificate = certificate.map_err(|why| wrong(&self.ca, REMEDY)(&why))?;
            let added = roots.add(certificate);
            added.map_err(|why| wrong(&self.ca, REMEDY)(&why))?;
        }
        if roots.is_empty() {
            return Err(wrong(&self.ca, REMEDY)(&"there is no certificate in it"));
        }
        Ok(Arc::new(roots))
    }

    fn own(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(&read(&self.certificate)?).collect();
        let chain =
            chain.map_err(|why| wrong(&self.certificate, "give a certificate (PEM)")(&why))?;
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?);
        let key =
            key.map_err(|why| wrong(&self.key, "give a private key (PEM, not encrypted)")(&why))?;
        Ok((chain, key))
    }

    fn pair(&self, why: &dyn Display) -> Error {
        Error::Pair {
            key: self.key.clone(),
            certificate: self.certificate.clone(),
            why: why.to_string(),
        }
    }

    /// What connects to a controller.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn connector(&self) -> Result<TlsConnector, Error> {
        let (chain, key) = self.own()?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|why| self.pair(&why))?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(chain, key)
            .map_err(|why| self.pair(&why))?;
        Ok(Arc::new(config).into())
    }

    /// What takes controllers' connections, who must have a certificate.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn acceptor(&self) -> Result<TlsAcceptor, Error> {
        let (chain, key) = self.own()?;
        let clients = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider());
        let clients = clients
            .build()
            .map_err(|why| wrong(&self.ca, "give the authority's certificate (PEM)")(&why))?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|why| self.pair(&why))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(|why| self.pair(&why))?;
        Ok(Arc::new(config).into())
    }

    /// What the controller at `host` is called.
    ///
    /// # Errors
    ///
    /// Nobody can be called so.
    pub fn name(&self, host: &str) -> Result<ServerName<'static>, Error> {
        let name = self.name.as_deref().unwrap_or(host);
        let wrong = |_| Error::Name(name.to_owned());
        ServerName::try_from(name.to_owned()).map_err(wrong)
    }
}
