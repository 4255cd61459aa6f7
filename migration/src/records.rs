//! TLS 1.3 records (RFC 8446, section 5), for the ends of a connection whose
//! handshake somebody else has done.
//!
//! `blanketd` settles who is at the other end, and hands the connection over
//! with its [`Secrets`]. What goes over it from then on is TLS still: the other
//! end may as well be any other implementation's. Of TLS there is what a
//! connection needs after its handshake: application data, the end
//! (`close_notify`), other alerts, and new keys (`KeyUpdate`). All else is
//! refused, as is everything that does not come whole, unchanged and in its order.
//!
//! Bytes are sealed where they are and sent from there, and opened where they
//! were received: what is around them in records is kept elsewhere.

mod keys;
mod open;
mod seal;
#[cfg(test)]
mod tests;

use std::io;

pub use keys::{Secrets, Suite, Traffic};
pub use open::Opener;
pub use seal::Sealer;

/// Most bytes of content in a record: section 5.1.
pub const MOST_CONTENT: usize = 1 << 14;
/// Most bytes of a record's body: section 5.2.
const MOST_BODY: usize = MOST_CONTENT + 256;
/// Bytes of a record's header.
const HEADER: usize = 5;
/// Bytes of what proves that a record is unchanged.
const TAG: usize = 16;
/// Bytes behind the content: its type, and the above.
const TRAILER: usize = 1 + TAG;
/// What every protected record says of its version: that of TLS 1.2.
const VERSION: [u8; 2] = [3, 3];
/// Records under one key; then come new ones. AES-GCM is safe for some more
/// (2^24.5, section 5.5), and rustls has the same number. 256 GiB.
const RECORDS_PER_KEY: u64 = 1 << 24;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

/// A fatal alert, and the one that ends a direction in peace: section 6.
const FATAL: u8 = 2;
const WARNING: u8 = 1;
const CLOSE_NOTIFY: u8 = 0;

/// A message `KeyUpdate` but for its last byte: section 4.6.3.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// Why nothing more can be read of a connection, or written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It ended without the word that it does.
    #[error("the encrypted connection was cut")]
    Truncated,
    /// What came is not what the other end has sent, or not in its order.
    #[error("an encrypted record is damaged")]
    Forged,
    /// A record is longer than any.
    #[error("an encrypted record is too long")]
    Overflow,
    /// It has no room for its type, or has none.
    #[error("an encrypted record is no record")]
    Malformed,
    /// It has something that does not belong there: its type.
    #[error("an encrypted record has what does not belong there (type {0})")]
    Unexpected(u8),
    /// Records come, but nothing is in them.
    #[error("encrypted records have nothing in them")]
    Idle,
    /// The other end has given up: the alert's number.
    #[error("the other end ended the encrypted connection (alert {0})")]
    Alert(u8),
    /// The secrets are none.
    #[error("the keys of an encrypted connection cannot be used")]
    Secrets,
    /// There are no numbers for more records.
    #[error("an encrypted connection has had too many records")]
    Exhausted,
}

impl Error {
    /// The alert that tells the other end: section 6.2.
    fn alert(self) -> Option<u8> {
        match self {
            Self::Unexpected(_) | Self::Idle | Self::Malformed => Some(10),
            Self::Forged => Some(20),
            Self::Overflow => Some(22),
            Self::Secrets | Self::Exhausted => Some(80),
            Self::Truncated | Self::Alert(_) => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::Truncated => io::ErrorKind::UnexpectedEof,
            Error::Alert(_) => io::ErrorKind::ConnectionReset,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
