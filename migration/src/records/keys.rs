//! What records are sealed and opened with.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Algorithm, CHACHA20_POLY1305, LessSafeKey};
use aws_lc_rs::aead::{NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use zeroize::Zeroizing;

use super::{Error, Opener, Sealer};

/// Longest secret, in bytes: of SHA-384.
const MOST_SECRET: usize = 48;
/// Longest key, in bytes.
const MOST_KEY: usize = 32;

/// How a connection's records are protected: RFC 8446, appendix B.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// `TLS_AES_128_GCM_SHA256`
    Aes128Gcm,
    /// `TLS_AES_256_GCM_SHA384`
    Aes256Gcm,
    /// `TLS_CHACHA20_POLY1305_SHA256`
    ChaCha20Poly1305,
}

impl Suite {
    const ALL: [(Self, u16); 3] = [
        (Self::Aes128Gcm, 0x1301),
        (Self::Aes256Gcm, 0x1302),
        (Self::ChaCha20Poly1305, 0x1303),
    ];

    /// The one with this number, if it is known.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find_map(|(suite, own)| (*own == number).then_some(*suite))
    }

    fn number(self) -> u16 {
        let mut all = Self::ALL.iter();
        all.find_map(|(suite, own)| (*suite == self).then_some(*own))
            .unwrap_or_default()
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }

    fn hash(self) -> aws_lc_rs::hkdf::Algorithm {
        match self {
            Self::Aes128Gcm | Self::ChaCha20Poly1305 => HKDF_SHA256,
            Self::Aes256Gcm => HKDF_SHA384,
        }
    }

    /// Bytes of its secrets.
    fn secret_len(self) -> usize {
        self.hash().len()
    }
}

/// The secret of one direction.
pub struct Traffic {
    secret: Zeroizing<[u8; MOST_SECRET]>,
    /// Of the next record.
    sequence: u64,
}

impl Traffic {
    /// `secret` is that of application data (`client_application_traffic_secret_N`
    /// or the server's), `sequence` the number of the next record under it.
    ///
    /// # Errors
    /// It is not as long as those of `suite`.
    pub fn new(suite: Suite, secret: &[u8], sequence: u64) -> Result<Self, Error> {
        let mut held = Zeroizing::new([0; MOST_SECRET]);
        match held.get_mut(..secret.len()) {
            Some(place) if secret.len() == suite.secret_len() => place.copy_from_slice(secret),
            _ => return Err(Error::Secrets),
        }
        Ok(Self {
            secret: held,
            sequence,
        })
    }
}

/// What somebody needs who takes a connection over after its handshake.
pub struct Secrets {
    suite: Suite,
    /// Of what is written.
    write: Traffic,
    /// Of what is read.
    read: Traffic,
}

impl Secrets {
    /// Bytes of them all.
    pub const LEN: usize = 2 + 2 * (MOST_SECRET + 8);

    /// Of a connection with `suite`.
    #[must_use]
    pub fn new(suite: Suite, write: Traffic, read: Traffic) -> Self {
        Self { suite, write, read }
    }

    /// For who has to have them. Never for a disk, or a log.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; Self::LEN]> {
        let mut bytes = Zeroizing::new([0; Self::LEN]);
        let (number, traffics) = bytes.split_at_mut(2);
        number.copy_from_slice(&self.suite.number().to_be_bytes());
        let traffics = traffics.chunks_mut(MOST_SECRET + 8);
        for (place, traffic) in traffics.zip([&self.write, &self.read]) {
            let (secret, sequence) = place.split_at_mut(MOST_SECRET);
            secret.copy_from_slice(&*traffic.secret);
            sequence.copy_from_slice(&traffic.sequence.to_be_bytes());
        }
        bytes
    }

    /// Reads them.
    ///
    /// # Errors
    /// They are for a suite that is not known here.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Result<Self, Error> {
        let (number, traffics) = bytes.split_at(2);
        let number = number
            .iter()
            .fold(0, |all, byte| all << 8 | u16::from(*byte));
        let suite = Suite::of(number).ok_or(Error::Secrets)?;
        let mut traffics = traffics.chunks(MOST_SECRET + 8).map(|place| {
            let (secret, sequence) = place.split_at(MOST_SECRET);
            let sequence = sequence.iter();
            let sequence = sequence.fold(0, |all, byte| all << 8 | u64::from(*byte));
            let secret = secret.get(..suite.secret_len()).ok_or(Error::Secrets)?;
            Traffic::new(suite, secret, sequence)
        });
        let mut next = || traffics.next().unwrap_or(Err(Error::Secrets));
        Ok(Self {
            suite,
            write: next()?,
            read: next()?,
        })
    }

    /// What writes, and what reads, with them.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn ends(self) -> Result<(Sealer, Opener), Error> {
        let Self { suite, write, read } = self;
        let (write, read) = (Keys::of(suite, write)?, Keys::of(suite, read)?);
        Ok((Sealer::new(write), Opener::new(read)))
    }
}

/// The keys of one direction.
pub(super) struct Keys {
    suite: Suite,
    traffic: Traffic,
    key: LessSafeKey,
    iv: Zeroizing<[u8; NONCE_LEN]>,
}

impl Keys {
    fn of(suite: Suite, traffic: Traffic) -> Result<Self, Error> {
        let secret = traffic.secret.get(..suite.secret_len());
        let prk = Prk::new_less_safe(suite.hash(), secret.ok_or(Error::Secrets)?);
        let mut key = Zeroizing::new([0; MOST_KEY]);
        let key = key
            .get_mut(..suite.algorithm().key_len())
            .ok_or(Error::Secrets)?;
        expand(&prk, b"key", key)?;
        let mut iv = Zeroizing::new([0; NONCE_LEN]);
        expand(&prk, b"iv", &mut *iv)?;
        let key = UnboundKey::new(suite.algorithm(), key).map_err(|_| Error::Secrets)?;
        Ok(Self {
            suite,
            traffic,
            key: LessSafeKey::new(key),
            iv,
        })
    }

    pub(super) fn key(&self) -> &LessSafeKey {
        &self.key
    }

    /// Records under this key so far.
    pub(super) fn records(&self) -> u64 {
        self.traffic.sequence
    }

    /// The next record's nonce, which there is once: section 5.3.
    pub(super) fn nonce(&mut self) -> Result<Nonce, Error> {
        let sequence = self.traffic.sequence;
        self.traffic.sequence = sequence.checked_add(1).ok_or(Error::Exhausted)?;
        let mut nonce = *self.iv;
        let number = nonce.iter_mut().rev().zip(sequence.to_le_bytes());
        number.for_each(|(byte, other)| *byte ^= other);
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Has the next keys: section 7.2.
    pub(super) fn update(&mut self) -> Result<(), Error> {
        let len = self.suite.secret_len();
        let secret = self.traffic.secret.get(..len).ok_or(Error::Secrets)?;
        let prk = Prk::new_less_safe(self.suite.hash(), secret);
        let mut next = Zeroizing::new([0; MOST_SECRET]);
        let next = next.get_mut(..len).ok_or(Error::Secrets)?;
        expand(&prk, b"traffic upd", next)?;
        let next = Traffic::new(self.suite, next, 0)?;
        *self = Self::of(self.suite, next)?;
        Ok(())
    }
}

/// So many bytes.
struct Len(usize);

impl KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// `HKDF-Expand-Label` without a context: section 7.1.
fn expand(prk: &Prk, label: &[u8], into: &mut [u8]) -> Result<(), Error> {
    const PREFIX: &[u8] = b"tls13 ";
    let len = u16::try_from(into.len()).map_err(|_| Error::Secrets)?;
    let label_len = u8::try_from(PREFIX.len() + label.len()).map_err(|_| Error::Secrets)?;
    let info = [&len.to_be_bytes()[..], &[label_len], PREFIX, label, &[0]];
    let expanded = prk.expand(&info, Len(into.len()));
    expanded
        .and_then(|okm| okm.fill(into))
        .map_err(|_| Error::Secrets)
}
