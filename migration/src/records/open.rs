//! What is read.

use std::io::{self, Read};

use aws_lc_rs::aead::Aad;

use super::keys::Keys;
use super::{ALERT, CLOSE_NOTIFY, DATA, Error, HANDSHAKE, HEADER, KEY_UPDATE};
use super::{MOST_BODY, MOST_CONTENT, TAG, TRAILER, VERSION};

/// Bytes that are received at once.
const ROOM: usize = 1 << 20;
/// No less is received at once than fits in so many.
const LITTLE: usize = 64 << 10;
/// Records in a row that have nothing in them: as rustls has it.
const MOST_IDLE: u32 = 32;

/// One end of a connection, as far as it reads.
///
/// ```text
/// ... read | content, opened | gone | records, as they came | free
///        start            opened   next                    end
/// ```
pub struct Opener {
    keys: Keys,
    room: Vec<u8>,
    start: usize,
    opened: usize,
    next: usize,
    end: usize,
    /// Records in a row without anything in them.
    idle: u32,
    /// Whether new keys of this end are wanted by the other.
    wants_update: bool,
    /// It is over: in peace, or why.
    over: Option<Result<(), Error>>,
}

impl Opener {
    /// Most bytes that can be had in one piece.
    pub const MOST: usize = ROOM - 2 * LITTLE;

    pub(super) fn new(keys: Keys) -> Self {
        Self {
            keys,
            room: Vec::new(),
            start: 0,
            opened: 0,
            next: 0,
            end: 0,
            idle: 0,
            wants_update: false,
            over: None,
        }
    }

    /// Whether the other end has asked for new keys since the last time.
    pub(crate) fn wants_update(&mut self) -> bool {
        std::mem::take(&mut self.wants_update)
    }

    /// Why it is over, if it is so before the other end has said it.
    pub(crate) fn error(&self) -> Option<Error> {
        self.over.and_then(Result::err)
    }

    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        self.over == Some(Ok(()))
    }

    /// What has been opened and not been taken.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        self.room.get(self.start..self.opened).unwrap_or_default()
    }

    /// Takes so many bytes of it, or what there is.
    pub fn take(&mut self, len: usize) -> &[u8] {
        let end = self.opened.min(self.start.saturating_add(len));
        let taken = self.start..end;
        self.start = end;
        self.room.get(taken).unwrap_or_default()
    }

    /// Reads until there are `len` bytes, at most [`Opener::MOST`], or all that
    /// come: then there are less.
    ///
    /// # Errors
    /// The connection is cut, or what comes is not what was sent: all that was
    /// opened is the other end's, and nothing more comes.
    pub fn have(&mut self, from: &mut impl Read, len: usize) -> io::Result<()> {
        while self.opened - self.start < len.min(Self::MOST) {
            match self.over {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
            match self.open() {
                Ok(true) => {}
                Ok(false) => self.receive(from)?,
                Err(error) => self.over = Some(Err(error)),
            }
        }
        Ok(())
    }

    /// Receives some bytes.
    fn receive(&mut self, from: &mut impl Read) -> io::Result<()> {
        self.make_room();
        let free = self.room.get_mut(self.end..).unwrap_or_default();
        match from.read(free) {
            Ok(0) => self.over = Some(Err(Error::Truncated)),
            Ok(n) => self.end += n.min(free.len()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn make_room(&mut self) {
        self.room.resize(ROOM, 0);
        if self.start == self.opened && self.next == self.end {
            (self.start, self.opened, self.next, self.end) = (0, 0, 0, 0);
        }
        if self.room.len() - self.end >= LITTLE {
            return;
        }
        self.room.copy_within(self.start..self.opened, 0);
        let opened = self.opened - self.start;
        self.room.copy_within(self.next..self.end, opened);
        self.end = opened + (self.end - self.next);
        (self.start, self.opened, self.next) = (0, opened, opened);
    }

    /// Opens the next record, if all of it is there.
    fn open(&mut self) -> Result<bool, Error> {
        let came = self.room.get(self.next..self.end).unwrap_or_default();
        let Some(&header) = came.first_chunk::<HEADER>() else {
            return Ok(false);
        };
        let len = body_len(header)?;
        if came.len() < HEADER + len {
            return Ok(false);
        }
        let body = self.next + HEADER;
        let end = body + len;
        let nonce = self.keys.nonce()?;
        // What is opened goes behind what has been: contents have no gaps.
        let room = self.room.get_mut(self.opened..end);
        let room = room.ok_or(Error::Malformed)?;
        let from = body - self.opened..;
        let key = self.keys.key();
        let opened = key.open_within(nonce, Aad::from(header), room, from);
        let opened = opened.map_err(|_| Error::Forged)?;
        if opened.len() > MOST_CONTENT + 1 {
            return Err(Error::Overflow);
        }
        // Zeros behind the type are padding: section 5.4.
        let last = opened.iter().rposition(|byte| *byte != 0);
        let (content, rest) = opened.split_at(last.ok_or(Error::Malformed)?);
        let kind = rest.first().copied().ok_or(Error::Malformed)?;
        match (kind, content) {
            (DATA, []) => self.idle += 1,
            (DATA, _) => {
                self.idle = 0;
                self.opened += content.len();
            }
            (ALERT, [_, CLOSE_NOTIFY]) => self.over = Some(Ok(())),
            (ALERT, [_, number]) => return Err(Error::Alert(*number)),
            (HANDSHAKE, [message @ .., wants @ (0 | 1)]) if message == KEY_UPDATE => {
                self.wants_update |= *wants == 1;
                self.idle += 1;
                self.keys.update()?;
            }
            (kind, _) => return Err(Error::Unexpected(kind)),
        }
        if self.idle > MOST_IDLE {
            return Err(Error::Idle);
        }
        self.next = end;
        Ok(true)
    }
}

/// Bytes of the body behind a header.
fn body_len(header: [u8; HEADER]) -> Result<usize, Error> {
    let [kind, version @ .., high, low] = header;
    if kind != DATA {
        return Err(Error::Unexpected(kind));
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    if version != VERSION || len < TRAILER {
        return Err(Error::Malformed);
    }
    if len > MOST_BODY {
        return Err(Error::Overflow);
    }
    debug_assert!(TAG < len);
    Ok(len)
}
