//! The frames of the command channel.
//!
//! A frame on the wire is `0x00 COBS(postcard(Frame) ++ crc32) 0x00`. COBS leaves no zero byte
//! inside, so the receiver finds the next frame after any garbage (boot messages, half a frame
//! of a session that was cut off) by looking for a zero. The checksum rejects a frame with
//! something interleaved. Between the zeros, 0x0f and 0x10 are written as 0x10 and the byte xor
//! 0x20: on Linux's hvc consoles 0x0f is the SysRq key.

use serde::{Deserialize, Serialize};

/// Largest piece of a data stream in one frame, in bytes.
pub const CHUNK: usize = 32 * 1024;

/// Largest encoded frame, in bytes, without its two delimiters. Longer ones are skipped.
pub const MAX_FRAME: usize = 128 * 1024;

/// What a console takes for a key.
const SYSRQ: u8 = 0x0f;

/// Announces a byte that is changed by [`CHANGE`].
const ESCAPE: u8 = 0x10;
const CHANGE: u8 = 0x20;

/// One message of one request in one session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Chosen at random by the client for each connection. Frames of another session are
    /// leftovers of an earlier connection and are ignored.
    pub session: u32,
    /// The request, unique within its session. 0 is used by [`Message::Hello`] and
    /// [`Message::Ready`].
    pub request: u32,
    /// What is said.
    pub message: Message,
}

/// What the two sides say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Client: start this session; requests of the session before are cancelled.
    Hello,
    /// Server: the session has started.
    Ready,
    /// Client: run a command.
    Exec(Exec),
    /// Client: write the bytes that follow as [`Message::Input`] to a file.
    Put {
        /// Absolute path of the file. Missing folders are made.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Client: send a file as [`Message::Stdout`].
    Get {
        /// Absolute path of the file.
        path: String,
    },
    /// Client: bytes for the command's standard input, or the file.
    Input(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Client: the input ends here.
    InputEnd,
    /// Server: bytes of standard output, or of the file.
    Stdout(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Server: bytes of standard error.
    Stderr(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Either side: this many bytes were consumed, as many more may be sent.
    Credit(u32),
    /// Client: end the request; a command is killed with its process group.
    Cancel,
    /// Server: the request has ended, after this many bytes of both outputs. Nothing follows.
    Done(Outcome, u64),
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments. The program is looked up in the server's `PATH`.
    pub argv: Vec<String>,
    /// Variables added to the server's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; the server's own when `None`.
    pub cwd: Option<String>,
    /// Milliseconds after which the command is killed with its process group.
    pub timeout_ms: Option<u64>,
    /// Run in the background with both outputs appended to this file. The request ends at once
    /// with [`Outcome::Spawned`].
    pub detach: Option<String>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command exited with this status.
    Exited(i32),
    /// The command was ended by this signal.
    Signaled(i32),
    /// The command was killed because its time was up.
    TimedOut,
    /// The command runs in the background under this process id.
    Spawned(u32),
    /// The file was copied.
    Copied,
    /// The request could not be carried out.
    Failed(String),
}

/// Why a message cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The encoder refused the message.
    #[error("cannot encode the message")]
    Encoding(#[from] postcard::Error),
    /// Arguments and environment of one command share a frame.
    #[error(
        "the message has {0} bytes, a frame carries at most {MAX_FRAME}: pass the data as input"
    )]
    TooLong(usize),
}

/// Encodes a frame with its delimiters.
///
/// # Errors
/// [`EncodeError::TooLong`] when the frame would exceed [`MAX_FRAME`].
pub fn encode(frame: &Frame) -> Result<Vec<u8>, EncodeError> {
    let mut body = postcard::to_stdvec(frame)?;
    body.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    let mut stuffed = vec![0; cobs::max_encoding_length(body.len())];
    let len = cobs::encode(&body, &mut stuffed);
    let mut wire = Vec::with_capacity(len + len / 64 + 2);
    wire.push(0);
    for &byte in &stuffed[..len] {
        if matches!(byte, SYSRQ | ESCAPE) {
            wire.extend([ESCAPE, byte ^ CHANGE]);
        } else {
            wire.push(byte);
        }
    }
    wire.push(0);
    if wire.len() - 2 > MAX_FRAME {
        return Err(EncodeError::TooLong(wire.len() - 2));
    }
    Ok(wire)
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    /// The pending bytes are longer than any frame: skip to the next delimiter.
    skipping: bool,
    /// The last bytes that were no frame.
    garbage: Option<Vec<u8>>,
}

impl Decoder {
    /// Takes the next bytes of the stream and returns the frames that are complete now. Bytes
    /// that are no frame are dropped.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut pieces = bytes.split(|&byte| byte == 0).peekable();
        while let Some(piece) = pieces.next() {
            if self.pending.len() + piece.len() > MAX_FRAME {
                self.skipping = true;
                self.pending.clear();
            }
            if !self.skipping {
                self.pending.extend_from_slice(piece);
            }
            if pieces.peek().is_some() {
                match decode(&self.pending) {
                    Some(frame) => frames.push(frame),
                    None if self.pending.is_empty() => {}
                    None => self.garbage = Some(self.pending.clone()),
                }
                self.pending.clear();
                self.skipping = false;
            }
        }
        frames
    }

    /// The last bytes that were no frame, once: a damaged frame, or what somebody else wrote.
    pub fn garbage(&mut self) -> Option<Vec<u8>> {
        self.garbage.take()
    }
}

fn decode(wire: &[u8]) -> Option<Frame> {
    let mut stuffed = Vec::with_capacity(wire.len());
    let mut bytes = wire.iter();
    while let Some(&byte) = bytes.next() {
        stuffed.push(match byte {
            ESCAPE => bytes.next()? ^ CHANGE,
            other => other,
        });
    }
    let mut body = vec![0; stuffed.len()];
    let len = cobs::decode(&stuffed, &mut body).ok()?;
    let (body, sum) = body.get(..len)?.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
        return None;
    }
    postcard::from_bytes(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..600);
        prop_oneof![
            Just(Message::Hello),
            Just(Message::Cancel),
            any::<u32>().prop_map(Message::Credit),
            bytes.clone().prop_map(Message::Input),
            bytes.prop_map(Message::Stdout),
            (".*", any::<u32>()).prop_map(|(path, mode)| Message::Put { path, mode }),
            (proptest::collection::vec(".*", 0..5), any::<Option<u64>>()).prop_map(
                |(argv, timeout_ms)| Message::Exec(Exec {
                    argv,
                    timeout_ms,
                    ..Exec::default()
                })
            ),
            (".*", any::<u64>())
                .prop_map(|(text, sent)| Message::Done(Outcome::Failed(text), sent)),
        ]
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        (any::<u32>(), any::<u32>(), any_message()).prop_map(|(session, request, message)| Frame {
            session,
            request,
            message,
        })
    }

    proptest! {
        #[test]
        fn frames_survive_any_split_of_the_stream(
            frames in proptest::collection::vec(any_frame(), 0..8),
            piece in 1usize..400,
        ) {
            let wire: Vec<u8> = frames.iter().flat_map(|f| encode(f).unwrap()).collect();
            prop_assert!(!wire.contains(&SYSRQ));
            let mut decoder = Decoder::default();
            let got: Vec<Frame> = wire.chunks(piece).flat_map(|c| decoder.push(c)).collect();
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn a_frame_after_garbage_is_found(
            garbage in proptest::collection::vec(any::<u8>(), 0..3000),
            frame in any_frame(),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(&garbage);
            let got = decoder.push(&encode(&frame).unwrap());
            prop_assert_eq!(got.last(), Some(&frame));
        }

        #[test]
        fn a_damaged_frame_is_dropped_and_the_next_one_is_not(
            first in any_frame(), second in any_frame(),
            at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let mut wire = encode(&first).unwrap();
            let at = 1 + at.index(wire.len() - 2);
            wire[at] ^= 1 << bit;
            wire.extend(encode(&second).unwrap());
            let mut decoder = Decoder::default();
            let got = decoder.push(&wire);
            prop_assert_eq!(got, vec![second]);
            prop_assert!(decoder.garbage().is_some());
        }
    }

    #[test]
    fn an_endless_piece_without_delimiter_does_not_grow_the_decoder() {
        let mut decoder = Decoder::default();
        for _ in 0..1000 {
            decoder.push(&[1; 4096]);
            assert!(decoder.pending.len() <= MAX_FRAME);
        }
        let frame = Frame {
            session: 1,
            request: 2,
            message: Message::Ready,
        };
        assert_eq!(decoder.push(&encode(&frame).unwrap()), vec![frame]);
    }

    #[test]
    fn a_chunk_fits_in_a_frame_and_an_oversized_message_is_refused() {
        let frame = |len| Frame {
            session: 1,
            request: 1,
            message: Message::Input(vec![7; len]),
        };
        assert!(encode(&frame(CHUNK)).is_ok());
        assert!(matches!(
            encode(&frame(MAX_FRAME)),
            Err(EncodeError::TooLong(_))
        ));
    }
}
