//! Encryption of a snapshot's file.
//!
//! Each file has a key of its own, derived from the user's key and a random
//! salt: parts are numbered, each is encrypted once (AES-256-GCM), with its
//! number as the nonce, so that no nonce is used twice with one key. The head is
//! not encrypted, but authenticated with each part.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::Error;

/// Bytes of an authentication tag.
pub(super) const TAG: usize = 16;
/// What keys are derived for (BLAKE3's contexts).
const FILE_KEY: &str = "blanket 2026 snapshot: key of a file";
const CHECK: &str = "blanket 2026 snapshot: which key it is";

/// A user's key for snapshots.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

/// Why a key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its file cannot be read.
    #[error("cannot read the key {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It has something else.
    #[error(
        "{} is no key: it must have 32 bytes, or 64 hex digits (head -c 32 /dev/urandom makes one)",
        path.display()
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
}

impl Key {
    /// From a file with 32 bytes, or with 64 hex digits.
    ///
    /// # Errors
    /// It cannot be read, or has something else.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        /// More than any key has.
        const MOST: u64 = 80;
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
        read.map_err(|error| KeyError::Io {
            path: path.to_owned(),
            error,
        })?;
        Self::parse(&bytes).ok_or_else(|| KeyError::NoKey {
            path: path.to_owned(),
        })
    }

    /// From 32 bytes, or 64 hex digits and white space behind them.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if let Ok(key) = bytes.try_into() {
            return Some(Self(key));
        }
        let digits = bytes.trim_ascii_end();
        let digit = |at: usize| char::from(digits[at]).to_digit(16);
        let mut key = [0; 32];
        if digits.len() != 2 * key.len() {
            return None;
        }
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = (digit(2 * i)? << 4 | digit(2 * i + 1)?) as u8;
        }
        Some(Self(key))
    }

    /// The file's key.
    fn of_file(&self, salt: &[u8; 32]) -> [u8; 32] {
        blake3::derive_key(FILE_KEY, &[self.0, *salt].concat())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Key")
    }
}

/// What a file's head says of its encryption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Encryption {
    /// How: this version knows one way.
    cipher: String,
    salt: [u8; 32],
    /// Tells a wrong key from a file that was changed.
    check: [u8; 32],
}

const CIPHER: &str = "aes-256-gcm";

impl Encryption {
    /// For a new file.
    pub(super) fn new(key: &Key) -> io::Result<Self> {
        let mut salt = [0; 32];
        let filled = SystemRandom::new().fill(&mut salt);
        filled.map_err(|_| io::Error::other("there are no random numbers"))?;
        Ok(Self {
            cipher: CIPHER.to_owned(),
            check: blake3::derive_key(CHECK, &key.of_file(&salt)),
            salt,
        })
    }

    /// What encrypts and decrypts the file with this head.
    pub(super) fn cipher(&self, key: &Key, head: [u8; 32]) -> Result<Cipher, Error> {
        if self.cipher != CIPHER {
            return Err(Error::Damaged("it is encrypted in a way that is not known"));
        }
        let of_file = key.of_file(&self.salt);
        // The check is no secret: how long this takes tells nothing.
        if blake3::derive_key(CHECK, &of_file) != self.check {
            return Err(Error::WrongKey);
        }
        let key = UnboundKey::new(&AES_256_GCM, &of_file)
            .map_err(|_| Error::Damaged("no cipher can have its key"))?;
        Ok(Cipher {
            key: LessSafeKey::new(key),
            head,
        })
    }
}

/// A part of a file: its nonce.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Chunk(u64),
    Table(u64),
    State,
    Index,
}

impl Part {
    fn nonce(self) -> Nonce {
        let (kind, number) = match self {
            Self::Chunk(number) => (0u32, number),
            Self::Table(number) => (1, number),
            Self::State => (2, 0),
            Self::Index => (3, 0),
        };
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&kind.to_le_bytes());
        nonce[4..].copy_from_slice(&number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Encrypts and decrypts the parts of one file.
#[derive(Debug)]
pub(super) struct Cipher {
    key: LessSafeKey,
    /// The head's hash.
    head: [u8; 32],
}

impl Cipher {
    /// Encrypts `bytes`, and returns the tag. No part is encrypted twice.
    pub(super) fn seal(&self, part: Part, bytes: &mut [u8]) -> io::Result<[u8; TAG]> {
        let sealed = self
            .key
            .seal_in_place_separate_tag(part.nonce(), Aad::from(self.head), bytes);
        let tag = sealed.map_err(|_| io::Error::other("a part is too long to be encrypted"))?;
        Ok(std::array::from_fn(|i| tag.as_ref()[i]))
    }

    /// Decrypts `bytes`, whose tag is behind them and goes; whether they are
    /// what was encrypted.
    pub(super) fn open(&self, part: Part, bytes: &mut Vec<u8>) -> bool {
        let opened = self
            .key
            .open_in_place(part.nonce(), Aad::from(self.head), bytes);
        let Ok(len) = opened.map(|content| content.len()) else {
            return false;
        };
        bytes.truncate(len);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_bytes_or_64_digits() {
        let hex = "00ff".repeat(16);
        let key = Key::parse(hex.as_bytes()).unwrap();
        assert_eq!(key.0[..4], [0, 255, 0, 255]);
        assert_eq!(Key::parse(format!("{hex}\n").as_bytes()), Some(key.clone()));
        assert_eq!(Key::parse(&key.0), Some(key.clone()));
        assert_eq!(format!("{key:?}"), "Key");
        for wrong in [&b""[..], &[7; 31], &[b'0'; 63], &[b'0'; 65], &[b'g'; 64]] {
            assert_eq!(Key::parse(wrong), None);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Key::from_file(file.path()).unwrap_err().to_string();
        assert!(error.contains("head -c 32"), "{error}");
        let error = Key::from_file(Path::new("/gone")).unwrap_err().to_string();
        assert!(error.contains("/gone"), "{error}");
    }

    #[test]
    fn what_is_opened_is_what_was_sealed_with_this_key_head_and_number() {
        let key = Key([3; 32]);
        let encryption = Encryption::new(&key).unwrap();
        assert_ne!(encryption.salt, Encryption::new(&key).unwrap().salt);
        let wrong = encryption.cipher(&Key([4; 32]), [1; 32]);
        assert!(matches!(wrong, Err(Error::WrongKey)));
        let cipher = encryption.cipher(&key, [1; 32]).unwrap();
        let mut sealed = b"a part".to_vec();
        let tag = cipher.seal(Part::Table(7), &mut sealed).unwrap();
        sealed.extend(tag);
        assert!(!sealed.starts_with(b"a part"));
        let open = |cipher: &Cipher, part, mut bytes: Vec<u8>| {
            let whole = cipher.open(part, &mut bytes);
            whole.then_some(bytes)
        };
        let opened = open(&cipher, Part::Table(7), sealed.clone());
        assert_eq!(opened.unwrap(), b"a part");
        let other = encryption.cipher(&key, [2; 32]).unwrap();
        assert_eq!(open(&other, Part::Table(7), sealed.clone()), None);
        assert_eq!(open(&cipher, Part::Table(8), sealed.clone()), None);
        assert_eq!(open(&cipher, Part::Chunk(7), sealed.clone()), None);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(open(&cipher, Part::Table(7), changed), None);
            assert_eq!(open(&cipher, Part::Table(7), sealed[..at].to_vec()), None);
        }
    }
}
