//! Reading the captures that [`super::Writer`] writes, as they come.

use std::time::Duration;

use thiserror::Error;

use super::Direction;
use super::pcapng::{
    BYTE_ORDER, COMMENT, DROPPED, INTERFACE, PACKET, RECEIVED, SECTION, STATISTICS,
};

/// The longest block: a frame with its comment is shorter.
const LONGEST: usize = 1 << 20;

/// What a capture has in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    /// An interface, by name; they are counted from 0.
    Interface(String),
    /// A frame.
    Frame {
        /// Its interface.
        interface: u32,
        /// Which way it went.
        direction: Direction,
        /// Since 1970.
        time: Duration,
        /// As much of it as was captured.
        bytes: Vec<u8>,
        /// Bytes that it had.
        len: u32,
        /// What is said about it.
        comment: String,
    },
    /// What became of an interface's frames.
    Statistics {
        /// Those that were to be captured.
        received: u64,
        /// Those of them that were not.
        dropped: u64,
    },
    /// Something else.
    Other,
}

/// It is no capture of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("what the switch sends is no capture")]
pub struct Unreadable;

/// Takes bytes as they come, and gives whole blocks.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    at: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

/// The options from `at` on.
fn options(body: &[u8], at: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(at..).unwrap_or_default();
    std::iter::from_fn(move || {
        let ([a, b, c, d], more) = rest.split_first_chunk()?;
        let (code, len) = (
            u16::from_le_bytes([*a, *b]),
            usize::from(u16::from_le_bytes([*c, *d])),
        );
        let value = more.get(..len)?;
        rest = more.get(len.next_multiple_of(4)..).unwrap_or_default();
        (code != 0).then_some((code, value))
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn parse(kind: u32, body: &[u8]) -> Option<Block> {
    let time = |at| {
        let nanos = u64::from(word(body, at)?) << 32 | u64::from(word(body, at + 4)?);
        Some(Duration::from_nanos(nanos))
    };
    Some(match kind {
        SECTION if word(body, 0)? != BYTE_ORDER => return None,
        INTERFACE => {
            let name = options(body, 8).find(|(code, _)| *code == 2);
            Block::Interface(name.map(|(_, name)| text(name)).unwrap_or_default())
        }
        PACKET => {
            let captured = word(body, 12)? as usize;
            let bytes = body.get(20..20 + captured)?.to_vec();
            let (mut direction, mut comment) = (Direction::In, String::new());
            for (code, value) in options(body, 20 + captured.next_multiple_of(4)) {
                match code {
                    COMMENT => comment = text(value),
                    2 if word(value, 0)? & 3 == 2 => direction = Direction::Out,
                    _ => {}
                }
            }
            Block::Frame {
                interface: word(body, 0)?,
                direction,
                time: time(4)?,
                bytes,
                len: word(body, 16)?,
                comment,
            }
        }
        STATISTICS => {
            let of = |wanted| {
                let found = options(body, 12).find(|(code, _)| *code == wanted);
                let number = found.and_then(|(_, value)| value.first_chunk().copied());
                number.map_or(0, u64::from_le_bytes)
            };
            Block::Statistics {
                received: of(RECEIVED),
                dropped: of(DROPPED),
            }
        }
        _ => Block::Other,
    })
}

impl Reader {
    /// Takes more bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next block that is there whole.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn take(&mut self) -> Result<Option<Block>, Unreadable> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (Some(kind), Some(len)) = (word(rest, 0), word(rest, 4)) else {
            return Ok(None);
        };
        let len = len as usize;
        if !(12..=LONGEST).contains(&len) || !len.is_multiple_of(4) {
            return Err(Unreadable);
        }
        let Some(block) = rest.get(..len) else {
            return Ok(None);
        };
        let block = parse(kind, &block[8..len - 4]).ok_or(Unreadable)?;
        self.at += len;
        Ok(Some(block))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Writer;
    use super::*;
    use crate::frame::{Frame, Head, Offload};

    fn capture() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), 0).expect("memory");
        let a = writer.interface("a").expect("memory");
        let frame = Frame {
            head: Head::of(&[2; 61]),
            body: &[],
            offload: Offload::default(),
        };
        let time = Duration::new(1_700_000_000, 5);
        writer
            .frame_with(a, Direction::Out, time, &frame, "dropped: meter")
            .expect("memory");
        writer.statistics(a, time, 9, 8).expect("memory");
        writer.into_inner()
    }

    #[test]
    fn what_is_written_is_read_again_however_it_comes() {
        for step in [1, 7, 4096] {
            let (mut reader, mut blocks) = (Reader::default(), Vec::new());
            for bytes in capture().chunks(step) {
                reader.put(bytes);
                while let Some(block) = reader.take().expect("a capture") {
                    blocks.push(block);
                }
            }
            let frame = Block::Frame {
                interface: 0,
                direction: Direction::Out,
                time: Duration::new(1_700_000_000, 5),
                bytes: vec![2; 61],
                len: 61,
                comment: "dropped: meter".to_owned(),
            };
            let statistics = Block::Statistics {
                received: 9,
                dropped: 8,
            };
            let interface = Block::Interface("a".to_owned());
            assert_eq!(blocks, [Block::Other, interface, frame, statistics]);
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let mut reader = Reader::default();
            reader.put(&bytes);
            while let Ok(Some(_)) = reader.take() {}
            let mut bytes = capture();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let mut reader = Reader::default();
            reader.put(&bytes);
            while let Ok(Some(_)) = reader.take() {}
        }
    }
}
