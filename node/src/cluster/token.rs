//! Join tokens: what a new node is told in one word.
//!
//! ```text
//! "blanket1-" + base64url of:
//!   id           8 bytes   which token
//!   secret      16 bytes   the right to join, once
//!   fingerprint 32 bytes   SHA-256 of the cluster's CA certificate
//!   address      0..261    where the CA's node is reached
//! ```
//!
//! Who has a token that is neither used nor expired can make one node a member.
//! The fingerprint lets the new node be sure whom it talks to, before it sends
//! the secret.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use sha2::{Digest, Sha256};

use super::names::Address;

const PREFIX: &str = "blanket1-";
const ID: usize = 8;
const SECRET: usize = 16;
const FINGERPRINT: usize = 32;
const FIXED: usize = ID + SECRET + FINGERPRINT;

/// The longest token's text, in bytes.
const MAX_TEXT: usize = 512;

/// What is wrong with a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no join token; get one with blanket node token on the CA's node")]
pub struct Error;

/// The SHA-256 of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; FINGERPRINT]);

impl Fingerprint {
    /// Of a certificate's DER.
    #[must_use]
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

/// A join token. Its text is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Which token it is.
    pub id: [u8; ID],
    /// The right to join.
    pub secret: [u8; SECRET],
    /// Of the cluster's CA.
    pub fingerprint: Fingerprint,
    /// Where the CA's node is reached.
    pub address: Address,
}

/// Without the secret, so that it stays out of logs.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("id", &self.id)
            .field("fingerprint", &self.fingerprint)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Token {
    /// What the new node is given.
    #[must_use]
    pub fn text(&self) -> String {
        let parts: [&[u8]; 4] = [
            &self.id,
            &self.secret,
            &self.fingerprint.0,
            self.address.as_str().as_bytes(),
        ];
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&parts.concat()))
    }
}

impl FromStr for Token {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_TEXT {
            return Err(Error);
        }
        let encoded = text.strip_prefix(PREFIX).ok_or(Error)?;
        let bytes = BASE64URL_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| Error)?;
        let (fixed, address) = bytes.split_at_checked(FIXED).ok_or(Error)?;
        let (id, rest) = fixed.split_at(ID);
        let (secret, fingerprint) = rest.split_at(SECRET);
        let address = std::str::from_utf8(address).map_err(|_| Error)?;
        Ok(Self {
            id: id.try_into().map_err(|_| Error)?,
            secret: secret.try_into().map_err(|_| Error)?,
            fingerprint: Fingerprint(fingerprint.try_into().map_err(|_| Error)?),
            address: address.parse().map_err(|_| Error)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token {
            id: [1; ID],
            secret: [2; SECRET],
            fingerprint: Fingerprint::of(b"certificate"),
            address: "10.0.0.1".parse().unwrap(),
        }
    }

    #[test]
    fn a_token_is_one_word_of_a_shell_and_is_read_back() {
        let text = token().text();
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        assert!(text.bytes().all(plain), "{text}");
        assert_eq!(text.parse::<Token>().unwrap(), token());
        assert!(!format!("{:?}", token()).contains("[2, 2"));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_read(text in "(blanket1-)?[A-Za-z0-9_-]{0,200}") {
            if let Ok(token) = text.parse::<Token>() {
                prop_assert_eq!(token.text().parse::<Token>().unwrap(), token);
            }
        }

        #[test]
        fn a_cut_token_is_refused(len in 0usize..90) {
            let text = token().text();
            let cut = text.get(..len.min(text.len() - 18)).unwrap();
            prop_assert!(cut.parse::<Token>().is_err());
        }
    }
}
