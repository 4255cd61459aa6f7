//! How a stream of bytes between two nodes begins.
//!
//! ```text
//! "blnk" | length: u16, big-endian | JSON of that length
//! ```
//!
//! The node that connects sends one such frame, a [`Hello`]; the other one
//! answers with one, an [`Answer`]. If that is [`Answer::Open`], whatever
//! follows in both directions is the service's own.
//!
//! A stream runs within mutual TLS, or -- on links that are trusted -- over
//! plain TCP. Then a [`Ticket`] that was fetched within TLS takes the place of
//! the certificate: it is good for one stream, for half a minute. The first
//! byte tells the two apart: a TLS record's is 0x16.

use serde::{Deserialize, Serialize};

use super::names::ServiceName;

/// What each frame begins with.
pub const MAGIC: [u8; 4] = *b"blnk";

/// Bytes before the JSON.
pub const HEAD: usize = MAGIC.len() + 2;

/// The longest JSON, in bytes.
pub const MAX_BODY: usize = 2048;

/// Why a frame was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not begin as frames do.
    #[error("what came is no frame of Blanket's")]
    Magic,
    /// It is longer than any frame.
    #[error("a frame of {0} bytes is too long")]
    Long(usize),
    /// Its JSON is not what is expected.
    #[error("a frame cannot be understood")]
    Body,
}

/// The right to open one stream over plain TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket(pub String);

/// What the node wants that connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Hello {
    /// A stream to a service, here. Only within TLS.
    Open(ServiceName),
    /// The same; a service that takes connections itself gets the socket after
    /// the answer, and the secrets of what goes over it. Only within TLS.
    Sealed(ServiceName),
    /// A ticket for a stream to a service over plain TCP. Only within TLS.
    Ticket(ServiceName),
    /// The stream that a ticket is for, here. Only over plain TCP.
    Redeem(Ticket),
    /// The same for a service that takes the connection itself: it gets the socket.
    Direct(Ticket),
}

/// What the other node answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    /// The stream is open.
    Open,
    /// It is open, and the service has the connection: TLS goes on with who has its
    /// secrets there. The node that has connected hands it over, too.
    Sealed,
    /// The ticket that was asked for.
    Ticket(Ticket),
    /// There will be no stream.
    Refused {
        /// Why.
        error: String,
        /// What to do about it.
        remedy: Option<String>,
    },
}

/// A frame with this in it.
///
/// # Errors
/// [`Error::Long`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    let body = serde_json::to_vec(value).map_err(|_| Error::Body)?;
    let len = u16::try_from(body.len()).map_err(|_| Error::Long(body.len()))?;
    if body.len() > MAX_BODY {
        return Err(Error::Long(body.len()));
    }
    Ok([&MAGIC[..], &len.to_be_bytes(), &body].concat())
}

/// How many bytes of JSON follow a frame's head.
///
/// # Errors
/// [`Error::Magic`], [`Error::Long`].
pub fn body_len(head: [u8; HEAD]) -> Result<usize, Error> {
    let [a, b, c, d, high, low] = head;
    if [a, b, c, d] != MAGIC {
        return Err(Error::Magic);
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len > MAX_BODY {
        return Err(Error::Long(len));
    }
    Ok(len)
}

/// Reads a frame's JSON.
///
/// # Errors
/// [`Error::Body`].
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|_| Error::Body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, Error> {
        let (head, body) = bytes.split_at_checked(HEAD).ok_or(Error::Magic)?;
        let len = body_len(head.try_into().map_err(|_| Error::Magic)?)?;
        decode(body.get(..len).ok_or(Error::Body)?)
    }

    #[test]
    fn frames_are_read_back_and_too_long_ones_are_not_made() {
        let service = || "migrate/web".parse().unwrap();
        for hello in [
            Hello::Open(service()),
            Hello::Sealed(service()),
            Hello::Ticket(service()),
            Hello::Redeem(Ticket("x".into())),
        ] {
            let frame = encode(&hello).unwrap();
            assert_ne!(frame[0], 0x16);
            assert_eq!(read::<Hello>(&frame), Ok(hello));
        }
        let refused = Answer::Refused {
            error: "no".into(),
            remedy: None,
        };
        assert_eq!(read::<Answer>(&encode(&refused).unwrap()), Ok(refused));
        let long = Hello::Redeem(Ticket("x".repeat(MAX_BODY)));
        assert!(matches!(encode(&long), Err(Error::Long(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..100), sound: bool) {
            let mut bytes = bytes;
            if sound && bytes.len() >= HEAD {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] = 0;
            }
            if let Ok(hello) = read::<Hello>(&bytes) {
                prop_assert_eq!(read::<Hello>(&encode(&hello).unwrap()).unwrap(), hello);
            }
        }
    }
}
