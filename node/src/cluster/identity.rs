//! Who a node is: its key and certificate, in its files; and who a peer is.
//!
//! ```text
//! ca.pem    the cluster's CA certificate
//! ca.key    its key, on one node only
//! node.key  this node's key
//! node.pem  its certificate: the node is a member once it is there
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::ca::{self, Authority};
use super::names::NodeName;
use super::token::Fingerprint;

/// What tells nodes apart for good: the hash of a public key, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct NodeId(String);

impl NodeId {
    /// Of a key's SubjectPublicKeyInfo.
    pub(crate) fn of(key: &[u8]) -> Self {
        let hash = Sha256::digest(key);
        Self(data_encoding::HEXLOWER.encode(hash.get(..16).unwrap_or(&hash)))
    }
}

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// What a certificate says of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: NodeName,
    pub(crate) id: NodeId,
    /// When the certificate ends.
    pub(crate) until: SystemTime,
    /// When it began.
    since: SystemTime,
}

impl Peer {
    /// Reads a certificate, whose signature somebody else has checked.
    pub(crate) fn of(certificate: &CertificateDer) -> Result<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|error| anyhow!("the certificate cannot be read: {error}"))?;
        let name = certificate.subject().iter_common_name().next();
        let name = name
            .and_then(|name| name.as_str().ok()?.parse().ok())
            .ok_or_else(|| anyhow!("the certificate names no node"))?;
        let time = |time: x509_parser::time::ASN1Time| {
            let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
            UNIX_EPOCH + Duration::from_secs(seconds)
        };
        let validity = certificate.validity();
        Ok(Self {
            name,
            id: NodeId::of(certificate.public_key().raw),
            until: time(validity.not_after),
            since: time(validity.not_before),
        })
    }
}

/// Seconds of Unix time.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The folder that the files are in.
#[derive(Clone, Debug)]
pub(crate) struct Files(PathBuf);

impl Files {
    /// Makes the folder, for its owner only.
    pub(crate) fn make(path: PathBuf) -> Result<Self> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        let path = self.path(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes a file for its owner only, whole or not at all, for good.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        let new = self.path(&format!("{name}.new"));
        let write = || {
            let _ = fs::remove_file(&new);
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.0)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Makes a CA here.
    pub(crate) fn make_authority(&self) -> Result<Authority> {
        let (authority, certificate, key) = Authority::new()?;
        self.write("ca.key", &key)?;
        self.write("ca.pem", &certificate)?;
        Ok(authority)
    }

    /// The CA, if it is here.
    pub(crate) fn authority(&self) -> Result<Option<Authority>> {
        let files = self.read("ca.pem")?.zip(self.read("ca.key")?);
        let load = |(certificate, key): (String, String)| Authority::load(&certificate, &key);
        files.as_ref().map(|files| load(files.clone())).transpose()
    }

    /// Who this node is, if it is in a cluster.
    pub(crate) fn identity(&self) -> Result<Option<Identity>> {
        let Some(certificate) = self.read("node.pem")? else {
            return Ok(None);
        };
        let missing = |name| move || anyhow!("{} is missing", self.path(name).display());
        let key = self.read("node.key")?.ok_or_else(missing("node.key"))?;
        let ca = self.read("ca.pem")?.ok_or_else(missing("ca.pem"))?;
        let here = || format!("the files in {}", self.0.display());
        Identity::read(&ca, &certificate, &key)
            .with_context(here)
            .map(Some)
    }

    /// Keeps who this node is from now on.
    pub(crate) fn keep(&self, ca: &str, certificate: &str, key: &str) -> Result<()> {
        self.write("node.key", key)?;
        self.write("ca.pem", ca)?;
        self.write("node.pem", certificate)
    }

    /// The CA certificate's PEM.
    pub(crate) fn ca_pem(&self) -> Result<String> {
        self.read("ca.pem")?
            .ok_or_else(|| anyhow!("{} is missing", self.path("ca.pem").display()))
    }

    /// Another certificate for the same key.
    pub(crate) fn renew(&self, certificate: &str) -> Result<()> {
        self.write("node.pem", certificate)
    }

    /// Forgets who this node is, and the CA.
    pub(crate) fn forget(&self) -> Result<()> {
        for name in ["node.pem", "node.key", "ca.key", "ca.pem"] {
            match fs::remove_file(self.path(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    let path = self.path(name);
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => (),
            }
        }
        Ok(())
    }
}

/// A node's key, its certificate, and its cluster's CA.
pub(crate) struct Identity {
    /// What the certificate says.
    pub(crate) own: Peer,
    pub(crate) ca: CertificateDer<'static>,
    /// The node's and the CA's.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    /// A request for another certificate for this key, in PEM.
    pub(crate) request: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads all from PEM.
    pub(crate) fn read(ca: &str, certificate: &str, key: &str) -> Result<Self> {
        let ca = CertificateDer::from_pem_slice(ca.as_bytes()).context("the CA's certificate")?;
        let own =
            CertificateDer::from_pem_slice(certificate.as_bytes()).context("the certificate")?;
        let pair = KeyPair::from_pem(key).context("the key")?;
        let peer = Peer::of(&own)?;
        anyhow::ensure!(
            NodeId::of(&rcgen::PublicKeyData::subject_public_key_info(&pair)) == peer.id,
            "the certificate is for another key"
        );
        Ok(Self {
            own: peer,
            chain: vec![own, ca.clone()],
            ca,
            key: PrivateKeyDer::from_pem_slice(key.as_bytes()).context("the key")?,
            request: ca::request(&pair)?,
        })
    }

    /// The CA's fingerprint.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.ca)
    }

    /// Whether two thirds of the certificate's time are over at `now`.
    pub(crate) fn wants_renewal(&self, now: SystemTime) -> bool {
        let life = self.own.until.duration_since(self.own.since);
        let left = self.own.until.duration_since(now);
        match (life, left) {
            (Ok(life), Ok(left)) => left < life / 3,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_for_their_owner_only_and_what_is_kept_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::make(dir.path().join("node")).unwrap();
        assert!(files.identity().unwrap().is_none() && files.authority().unwrap().is_none());
        let authority = files.make_authority().unwrap();
        let key = ca::new_key().unwrap();
        let name: NodeName = "a".parse().unwrap();
        let sign = |life| {
            let request = ca::request(&key).unwrap();
            authority.sign(&request, &name, false, life).unwrap()
        };
        let certificate = sign(ca::NODE_LIFE);
        let ca_pem = files.ca_pem().unwrap();
        files
            .keep(&ca_pem, &certificate, &key.serialize_pem())
            .unwrap();
        let identity = files.identity().unwrap().unwrap();
        assert_eq!(identity.own.name, name);
        for name in ["ca.key", "node.key"] {
            let mode = fs::metadata(files.path(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let now = SystemTime::now();
        assert!(!identity.wants_renewal(now));
        assert!(identity.wants_renewal(now + ca::NODE_LIFE * 7 / 10));
        assert!(identity.wants_renewal(now + ca::NODE_LIFE * 2));
        let other = ca::new_key().unwrap().serialize_pem();
        let error = Identity::read(&ca_pem, &certificate, &other).unwrap_err();
        assert!(error.to_string().contains("another key"), "{error}");
        files.forget().unwrap();
        assert!(files.identity().unwrap().is_none());
    }
}
