//! The records of a migration's encrypted streams: what is read is what was sent,
//! in its order, up to the first that is not sound.
#![no_main]

use std::io::{self, Read};

use arbitrary::Arbitrary;
use blanket_migration::records::{MOST_CONTENT, Opener, Sealer, Secrets, Suite, Traffic};
use libfuzzer_sys::fuzz_target;

/// TLS's number for a record of data.
const DATA: u8 = 23;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes that the other end sends.
    Data { len: u16, value: u8 },
    /// A record with anything in it.
    Record { kind: u8, content: Vec<u8> },
    /// A long one.
    Long { kind: u8, len: u16 },
    /// What is no record.
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    suite: u8,
    steps: Vec<Step>,
    /// The other end says that it has ended.
    ends: bool,
    /// A byte that is another then.
    change: Option<(u32, u8)>,
    /// How much comes at a time, and how much is read.
    pieces: Vec<u16>,
}

/// Gives as much at a time as it is told.
struct Pieces<'a>(&'a [u8], &'a [u16], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.2 += 1;
        let piece = self.1.get(self.2 % self.1.len().max(1)).copied();
        let most = into
            .len()
            .min(usize::from(piece.unwrap_or(u16::MAX).max(1)));
        self.0.read(&mut into[..most])
    }
}

fn ends(suite: u8) -> (Sealer, Opener) {
    let suite = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305][suite as usize % 3];
    let len = if suite == Suite::Aes256Gcm { 48 } else { 32 };
    let traffic = || Traffic::new(suite, &[5; 48][..len], 1).expect("secrets");
    let secrets = Secrets::new(suite, traffic(), traffic());
    secrets.ends().expect("keys")
}

fuzz_target!(|input: Input| {
    let (mut sealer, mut opener) = ends(input.suite);
    let (mut wire, mut sent, mut sound) = (Vec::new(), Vec::new(), true);
    for step in &input.steps {
        let mut record = |kind: u8, content: &[u8]| {
            wire.extend(sealer.record(kind, content).expect("a record"));
            if kind == DATA && (1..=MOST_CONTENT).contains(&content.len()) && sound {
                sent.extend_from_slice(content);
            } else {
                // It may be sound still, but not for sure.
                sound = false;
            }
        };
        match step {
            Step::Data { len, value } => {
                let mut bytes = vec![*value; usize::from(*len)];
                if sound {
                    sent.extend_from_slice(&bytes);
                }
                sealer.send(&mut wire, &mut bytes).expect("a vector");
            }
            Step::Record { kind, content } => record(*kind, content),
            Step::Long { kind, len } => record(*kind, &vec![1; usize::from(*len) % 20_000]),
            Step::Bytes(bytes) => {
                sound &= bytes.is_empty();
                wire.extend(bytes);
            }
        }
    }
    if input.ends {
        sealer.close(&mut wire, None).expect("a vector");
    }
    let change = input
        .change
        .filter(|(_, bits)| *bits != 0 && !wire.is_empty());
    if let Some((at, bits)) = change {
        let at = at as usize % wire.len();
        wire[at] ^= bits;
    }
    let mut from = Pieces(&wire, &input.pieces, 0);
    let mut came = Vec::new();
    let mut wants = input.pieces.iter().cycle();
    let ended = loop {
        let want = wants.next().map_or(1, |want| usize::from(*want).max(1));
        let had = opener.have(&mut from, want);
        let content = opener.take(want);
        came.extend_from_slice(content);
        match had {
            Ok(()) if content.is_empty() => break true,
            Ok(()) => {}
            Err(_) => {
                came.extend_from_slice(opener.take(usize::MAX));
                break false;
            }
        }
    };
    if sound {
        assert!(sent.starts_with(&came), "{} of {}", came.len(), sent.len());
        if change.is_none() {
            assert!(came == sent && ended == input.ends);
        } else {
            assert!(!ended && (came.len() < sent.len() || input.ends || came == sent));
        }
    } else if change.is_none() {
        assert!(came.starts_with(&sent));
    }
});
