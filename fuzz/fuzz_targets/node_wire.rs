//! What a node reads that others have sent: join tokens, and the frames with
//! which streams begin, of any bytes or sound ones with changes.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use arbitrary::Arbitrary;
use blanket_node::cluster::hello::{self, Answer, Hello, Ticket};
use blanket_node::cluster::names::{Address, NodeName, ServiceName};
use blanket_node::cluster::parcel::{self, Answer as Heard, Go, Parcel, State, Verdict};
use blanket_node::cluster::token::{Fingerprint, Token};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input {
    /// Any bytes as a frame.
    Frame(Vec<u8>),
    /// Any JSON in a frame.
    Body(String),
    /// A sound frame with changes.
    Hello(u8, String, Vec<(u16, u8)>),
    /// Any text as a token.
    Text(String),
    /// A sound token with changes.
    Token([u8; 8], [u8; 16], [u8; 32], String, Vec<(u16, u8)>),
    /// Any text as a name.
    Name(String),
}

fn changed(mut bytes: Vec<u8>, changes: &[(u16, u8)]) -> Vec<u8> {
    let len = bytes.len();
    for (at, byte) in changes {
        bytes[usize::from(*at) % len] = *byte;
    }
    bytes
}

/// As `blanketd` reads a frame from a connection.
fn read(bytes: &[u8]) -> Option<&[u8]> {
    let (head, rest) = bytes.split_first_chunk::<{ hello::HEAD }>()?;
    let len = hello::body_len(*head).ok()?;
    assert!(len <= hello::MAX_BODY);
    rest.get(..len)
}

fn frame(bytes: &[u8]) -> Option<Hello> {
    let body = read(bytes)?;
    let _ = hello::decode::<Answer>(body);
    let hello = hello::decode::<Hello>(body).ok()?;
    let again = hello::encode(&hello).unwrap();
    let again = hello::decode(read(&again).unwrap());
    assert_eq!(again.as_ref(), Ok(&hello));
    Some(hello)
}

/// What the ends of a migration say to each other.
fn said(bytes: &[u8]) {
    if let Ok(parcel) = parcel::hear::<Parcel>(&mut &*bytes) {
        let mut again = Vec::new();
        parcel::say(&mut again, &parcel).unwrap();
        assert_eq!(
            parcel::hear::<Parcel>(&mut again.as_slice()).unwrap(),
            parcel
        );
    }
    let _ = parcel::hear::<Go>(&mut &*bytes);
    let _ = parcel::hear::<Heard>(&mut &*bytes);
    let _ = parcel::hear::<Verdict>(&mut &*bytes);
    let _ = parcel::hear::<State>(&mut &*bytes);
}

fn token(text: &str) -> Option<Token> {
    let token: Token = text.parse().ok()?;
    assert_eq!(token.text().parse(), Ok(token.clone()));
    Some(token)
}

fn text<T: FromStr + Display + Debug + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert!(value.to_string().parse::<T>().ok() == Some(value));
    }
}

fn sound_hello(kind: u8, text: String) -> Option<Hello> {
    Some(match kind % 3 {
        0 => Hello::Open(text.parse().ok()?),
        1 => Hello::Ticket(text.parse().ok()?),
        _ => Hello::Redeem(Ticket(text)),
    })
}

fuzz_target!(|input: Input| {
    match input {
        Input::Frame(bytes) => {
            drop(frame(&bytes));
            said(&bytes);
        }
        Input::Body(body) => {
            let len = (body.len() as u32).to_le_bytes();
            said(&[&len, body.as_bytes()].concat());
            let len = (body.len() as u16).to_be_bytes();
            frame(&[&hello::MAGIC[..], &len, body.as_bytes()].concat());
        }
        Input::Hello(kind, text, changes) => {
            let Some(hello) = sound_hello(kind, text) else {
                return;
            };
            let Ok(bytes) = hello::encode(&hello) else {
                return;
            };
            assert_ne!(bytes[0], 0x16);
            let read = frame(&changed(bytes, &changes));
            assert!(read == Some(hello) || !changes.is_empty());
        }
        Input::Text(text) => drop(token(&text)),
        Input::Token(id, secret, fingerprint, address, changes) => {
            let Ok(address) = address.parse() else { return };
            let sound = Token {
                id,
                secret,
                fingerprint: Fingerprint(fingerprint),
                address,
            };
            let text = changed(sound.text().into_bytes(), &changes);
            let read = std::str::from_utf8(&text).ok().and_then(token);
            assert!(read == Some(sound) || !changes.is_empty());
        }
        Input::Name(name) => {
            text::<NodeName>(&name);
            text::<ServiceName>(&name);
            text::<Address>(&name);
        }
    }
});
