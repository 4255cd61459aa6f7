//! What is written.

use std::io::{self, IoSlice, Write};

use aws_lc_rs::aead::Aad;

use super::keys::Keys;
use super::{ALERT, CLOSE_NOTIFY, DATA, Error, FATAL, HANDSHAKE, HEADER, KEY_UPDATE};
use super::{MOST_CONTENT, RECORDS_PER_KEY, TRAILER, VERSION, WARNING};

/// Records that are sealed before they are written: what was sealed is still at
/// hand then.
const AT_ONCE: usize = 8;
/// What is around a record's content.
const AROUND: usize = HEADER + TRAILER;

/// One end of a connection, as far as it writes.
pub struct Sealer {
    keys: Keys,
    /// Records under one key.
    most: u64,
    /// The other end wants new keys.
    owes_update: bool,
    /// Nothing can be written any more.
    ended: bool,
    /// What is around the content of those that are written now.
    around: Vec<u8>,
    /// For bytes that are not its own to seal.
    copy: Vec<u8>,
}

impl Sealer {
    pub(super) fn new(keys: Keys) -> Self {
        Self {
            keys,
            most: RECORDS_PER_KEY,
            owes_update: false,
            ended: false,
            around: Vec::new(),
            copy: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn set_most(&mut self, most: u64) {
        self.most = most;
    }

    /// A record with content of any type, also one that no end sends: for tests and
    /// the fuzzer.
    ///
    /// # Errors
    /// It is too long for any header, or there is no number for it.
    pub fn record(&mut self, kind: u8, content: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = [content, &[0]].concat();
        self.around.clear();
        self.seal(kind, &mut bytes, 0, content.len())?;
        bytes.truncate(content.len());
        let around = self.around.split_at_checked(HEADER);
        let (header, trailer) = around.ok_or(Error::Malformed)?;
        Ok([header, &bytes, trailer].concat())
    }

    /// The other end has said that it wants new keys.
    pub(crate) fn owe_update(&mut self) {
        self.owes_update = true;
    }

    /// Writes `bytes`, of which nothing is left but what they were sealed to:
    /// they are empty.
    ///
    /// # Errors
    /// The connection fails, or has ended: nothing more can be written.
    pub fn send(&mut self, to: &mut impl Write, bytes: &mut Vec<u8>) -> io::Result<()> {
        let sent = self.send_data(to, bytes);
        bytes.clear();
        self.note(sent)
    }

    /// Writes a copy of `bytes`.
    ///
    /// # Errors
    /// As [`Sealer::send`].
    pub fn send_copy(&mut self, to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        let mut copy = std::mem::take(&mut self.copy);
        copy.extend_from_slice(bytes);
        let sent = self.send(to, &mut copy);
        self.copy = copy;
        sent
    }

    /// Says that nothing more comes; or why, if that is an error.
    ///
    /// # Errors
    /// As [`Sealer::send`].
    pub fn close(&mut self, to: &mut impl Write, error: Option<Error>) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        let alert = match error {
            None => Some([WARNING, CLOSE_NOTIFY]),
            Some(error) => error.alert().map(|number| [FATAL, number]),
        };
        let sent = alert.map_or(Ok(()), |alert| self.send_other(to, ALERT, &alert));
        self.ended = true;
        sent
    }

    /// Half a record cannot be followed by another one.
    fn note(&mut self, sent: io::Result<()>) -> io::Result<()> {
        self.ended |= sent.is_err();
        sent
    }

    fn send_data(&mut self, to: &mut impl Write, bytes: &mut Vec<u8>) -> io::Result<()> {
        if self.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = bytes.len();
        // The type of the last one's content is behind it while it is sealed.
        bytes.push(0);
        let mut at = 0;
        while at < len {
            if self.owes_update || self.keys.records() >= self.most {
                self.update(to)?;
            }
            let left = usize::try_from(self.most - self.keys.records()).unwrap_or(usize::MAX);
            let most = AT_ONCE.min(left) * MOST_CONTENT;
            let end = len.min(at + most);
            self.around.clear();
            for start in (at..end).step_by(MOST_CONTENT) {
                self.seal(DATA, bytes, start, end.min(start + MOST_CONTENT))?;
            }
            let content = bytes.get(at..end).unwrap_or_default();
            write_around(to, &self.around, content)?;
            at = end;
        }
        Ok(())
    }

    /// Seals what is at `start..end`. The byte behind it is needed meanwhile.
    fn seal(&mut self, kind: u8, bytes: &mut [u8], start: usize, end: usize) -> io::Result<()> {
        let content = bytes.get_mut(start..=end).ok_or(Error::Overflow)?;
        let body = u16::try_from(content.len() + TRAILER - 1).map_err(|_| Error::Overflow)?;
        let [high, low] = body.to_be_bytes();
        let header = [DATA, VERSION[0], VERSION[1], high, low];
        let Some(last) = content.last_mut() else {
            return Err(Error::Overflow.into());
        };
        let behind = std::mem::replace(last, kind);
        let nonce = self.keys.nonce()?;
        let sealed = self.keys.key();
        let tag = sealed.seal_in_place_separate_tag(nonce, Aad::from(header), content);
        let tag = tag.map_err(|_| Error::Exhausted)?;
        self.around.extend_from_slice(&header);
        if let Some(last) = content.last_mut() {
            self.around.push(std::mem::replace(last, behind));
        }
        self.around.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Has new keys, and says so.
    pub(super) fn update(&mut self, to: &mut impl Write) -> io::Result<()> {
        let [a, b, c, d] = KEY_UPDATE;
        // The other end need not have new ones: it has had less records.
        self.send_other(to, HANDSHAKE, &[a, b, c, d, 0])?;
        self.keys.update()?;
        self.owes_update = false;
        Ok(())
    }

    /// Writes a record that has no data.
    fn send_other(&mut self, to: &mut impl Write, kind: u8, content: &[u8]) -> io::Result<()> {
        let mut bytes = [content, &[0]].concat();
        self.around.clear();
        let sealed = self.seal(kind, &mut bytes, 0, content.len());
        let content = bytes.get(..content.len()).unwrap_or_default();
        let sent = sealed.and_then(|()| write_around(to, &self.around, content));
        self.note(sent)
    }
}

/// Writes records: what is `around` them, and what is in them.
fn write_around(to: &mut impl Write, around: &[u8], content: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(&[]); 2 * AT_ONCE + 1];
    let (first, rest) = around.split_at_checked(HEADER).unwrap_or((around, &[]));
    slices[0] = IoSlice::new(first);
    // A trailer and the next one's header are one piece.
    let pairs = content.chunks(MOST_CONTENT).zip(rest.chunks(AROUND));
    for (places, (content, around)) in slices[1..].chunks_mut(2).zip(pairs) {
        for (place, bytes) in places.iter_mut().zip([content, around]) {
            *place = IoSlice::new(bytes);
        }
    }
    let mut left = &mut slices[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match to.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut left, n),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
