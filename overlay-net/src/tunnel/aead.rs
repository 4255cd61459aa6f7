//! Sealing and opening, with the cipher that is the faster one here.

use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

use super::wire::TAG;

/// How datagrams are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cipher {
    /// AES-256-GCM.
    #[serde(rename = "aes-256-gcm")]
    Aes,
    /// ChaCha20-Poly1305.
    #[serde(rename = "chacha20-poly1305")]
    ChaCha,
}

impl Cipher {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes-256-gcm",
            Self::ChaCha => "chacha20-poly1305",
        }
    }

    /// Its number in a response.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Aes => 1,
            Self::ChaCha => 2,
        }
    }

    pub(super) fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Aes),
            2 => Some(Self::ChaCha),
            _ => None,
        }
    }
}

/// What sealing costs with each cipher, in the same unit, not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// AES-256-GCM.
    pub aes: u16,
    /// ChaCha20-Poly1305.
    pub chacha: u16,
}

impl Costs {
    /// Measures: some milliseconds. Nanoseconds for a chunk of 1424 bytes.
    #[must_use]
    pub fn measure() -> Self {
        let cost = |cipher| {
            let key = Key::new(cipher, &[7; 32]);
            let mut chunk = [0; 1424];
            let mut round = |count: u64| {
                let start = Instant::now();
                for counter in 0..count {
                    key.seal(counter, &mut chunk);
                }
                start.elapsed() / count as u32
            };
            round(50);
            // The least is what it costs without what else runs here.
            let best = (0..8).map(|_| round(100)).min().unwrap_or(Duration::MAX);
            u16::try_from(best.as_nanos()).unwrap_or(u16::MAX).max(1)
        };
        Self {
            aes: cost(Cipher::Aes),
            chacha: cost(Cipher::ChaCha),
        }
    }

    /// The cipher that costs two nodes the least, compared with what the other
    /// one costs each: clocks differ.
    #[must_use]
    pub fn cheaper(self, other: Self) -> Cipher {
        let product = |one: u16, two: u16| u32::from(one.max(1)) * u32::from(two.max(1));
        if product(self.aes, other.aes) <= product(self.chacha, other.chacha) {
            Cipher::Aes
        } else {
            Cipher::ChaCha
        }
    }
}

/// A key for one direction of a session.
pub(super) struct Key {
    /// None: `aws-lc-rs` did not take the key, which it only does if its length is
    /// wrong. Nothing can be sealed or opened then.
    key: Option<LessSafeKey>,
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Key {
    pub(super) fn new(cipher: Cipher, key: &[u8; 32]) -> Self {
        let algorithm = match cipher {
            Cipher::Aes => &AES_256_GCM,
            Cipher::ChaCha => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, key);
        Self {
            key: key.ok().map(LessSafeKey::new),
        }
    }

    /// Seals in place; the tag. All zeros, and the bytes too, if it cannot:
    /// no plain text ever leaves.
    pub(super) fn seal(&self, counter: u64, bytes: &mut [u8]) -> [u8; TAG] {
        let sealed = self.key.as_ref().and_then(|key| {
            key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), bytes)
                .ok()
        });
        let mut tag = [0; TAG];
        match sealed {
            Some(sealed) => tag.copy_from_slice(sealed.as_ref()),
            None => bytes.fill(0),
        }
        tag
    }

    /// Opens what is followed by its tag, in place.
    pub(super) fn open<'a>(&self, counter: u64, bytes: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let key = self.key.as_ref()?;
        key.open_in_place(nonce(counter), Aad::empty(), bytes).ok()
    }
}
