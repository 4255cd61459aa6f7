//! A shorter way for data streams.
//!
//! Whatever carries bytes between the two monitors may have a connection that
//! leads to the other end. A data stream therefore begins with a question, one
//! byte: [`ASK`]. Who is in between and has one answers with the same byte and
//! its socket, or with another byte, the socket and the [`Secrets`] of what goes
//! over it; and hands the other end of it to the source in the same way. Who has
//! none passes the question on, and the source answers that there is none.
//!
//! The stream on which the question was asked is kept beside the connection: its
//! end tells who was in between that this one is not used any more.
//! Nothing is used of a socket that those of one family have and others have not.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zeroize::Zeroizing;

use crate::records::{Opener, Sealer, Secrets};
use crate::wire::{self, Frames, Header, Kind};

/// "Is there a socket?", and with one: "here it is". No frame begins like this.
pub const ASK: u8 = b'+';
/// "Here it is, with its secrets."
const SEALED: u8 = b'#';
/// "There is none."
const NONE: u8 = b'-';

/// How data streams get to the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Somebody carries what is on the monitors' sockets; or they are at the same
    /// place.
    Relayed,
    /// The monitors have the connections.
    Direct,
    /// They have them, and encrypt what is on them.
    Sealed,
}

/// Hands a socket over to the monitor at the other end of `stream`; with
/// `secrets`, one for what is sealed with them.
///
/// # Errors
/// It is not there any more.
pub fn hand_over(
    mut stream: &UnixStream,
    socket: impl AsFd,
    secrets: Option<&Secrets>,
) -> io::Result<()> {
    let word = [if secrets.is_some() { SEALED } else { ASK }];
    let sent = stream.send_with_fd(&word[..], socket.as_fd().as_raw_fd())?;
    if sent != 1 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    match secrets {
        Some(secrets) => stream.write_all(&*secrets.to_bytes()),
        None => Ok(()),
    }
}

/// The destination's question; the stream to be used.
///
/// # Errors
/// It is cut, or the answer is none.
pub fn ask(mut stream: UnixStream) -> io::Result<Stream> {
    stream.write_all(&[ASK])?;
    match receive(&stream)? {
        (NONE, None) => Ok(stream.into()),
        (word, Some(socket)) => Stream::handed(word, socket, stream),
        _ => Err(nonsense()),
    }
}

/// What the source does with a stream on which something has come: where it
/// begins with the question or its answer, the stream to be used instead.
///
/// # Errors
/// It is cut.
pub fn answer(stream: &mut Stream) -> io::Result<Option<Stream>> {
    if stream.way() != Way::Relayed {
        return Ok(None);
    }
    let mut byte = 0u8;
    // SAFETY: the one byte is ours.
    let n = unsafe {
        libc::recv(
            stream.as_raw_fd(),
            (&raw mut byte).cast(),
            1,
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    if n != 1 || !matches!(byte, ASK | SEALED) {
        return Ok(None);
    }
    let asked = stream.socket.try_clone()?;
    match receive(&asked)? {
        (ASK, None) => {
            stream.write_all(&[NONE])?;
            Ok(Some(asked.into()))
        }
        (word, Some(socket)) => Stream::handed(word, socket, asked).map(Some),
        _ => Err(nonsense()),
    }
}

/// One byte, and the socket that came with it.
fn receive(stream: &UnixStream) -> io::Result<(u8, Option<UnixStream>)> {
    let mut byte = [0];
    let (n, file) = stream.recv_with_fd(&mut byte)?;
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((byte[0], file.map(|file| OwnedFd::from(file).into())))
}

fn nonsense() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "no answer to a question for a socket",
    )
}

/// One data stream.
pub struct Stream {
    socket: UnixStream,
    sealed: Option<Box<(Sealer, Opener)>>,
    /// What the socket came on: that it is used still.
    asked: Option<UnixStream>,
}

impl From<UnixStream> for Stream {
    fn from(socket: UnixStream) -> Self {
        Self {
            socket,
            sealed: None,
            asked: None,
        }
    }
}

impl Stream {
    /// What came on `asked`.
    fn handed(word: u8, socket: UnixStream, mut asked: UnixStream) -> io::Result<Self> {
        let sealed = match word {
            ASK => None,
            SEALED => {
                let mut secrets = Zeroizing::new([0; Secrets::LEN]);
                asked.read_exact(&mut *secrets)?;
                Some(Box::new(Secrets::from_bytes(&secrets)?.ends()?))
            }
            _ => return Err(nonsense()),
        };
        Ok(Self {
            socket,
            sealed,
            asked: Some(asked),
        })
    }

    /// How it gets to the other end.
    #[must_use]
    pub fn way(&self) -> Way {
        match (&self.sealed, &self.asked) {
            (Some(_), _) => Way::Sealed,
            (None, Some(_)) => Way::Direct,
            (None, None) => Way::Relayed,
        }
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The socket of one that is no more than that.
    pub(crate) fn into_socket(self) -> Option<UnixStream> {
        let relayed = self.way() == Way::Relayed;
        relayed.then(|| self.socket.try_clone().ok()).flatten()
    }

    /// Sends `frames`, which are gone then.
    ///
    /// # Errors
    /// The connection fails.
    pub(crate) fn send(&mut self, frames: &mut Frames) -> io::Result<()> {
        let sent = match self.sealer() {
            Some((sealer, mut socket)) => sealer.send(&mut socket, frames.bytes_mut()),
            None => self.socket.write_all(frames.bytes()),
        };
        frames.clear();
        sent
    }

    /// Receives the next frame: its payload, which may be in `room`.
    ///
    /// # Errors
    /// As [`wire::receive`].
    pub(crate) fn receive<'a>(
        &'a mut self,
        room: &'a mut Vec<u8>,
    ) -> Result<(Kind, &'a [u8]), wire::Error> {
        let Some(ends) = &mut self.sealed else {
            let kind = wire::receive(&mut self.socket, room)?;
            return Ok((kind, room));
        };
        let (opener, mut socket) = (&mut ends.1, &self.socket);
        opener.have(&mut socket, wire::HEADER)?;
        let header = opener.content().first_chunk().ok_or(wire::Error::Cut)?;
        let header = Header::of(header)?;
        let whole = wire::HEADER + header.len;
        if whole > Opener::MOST {
            let kind = wire::receive(&mut Opening(opener, socket), room)?;
            return Ok((kind, room));
        }
        opener.have(&mut socket, whole)?;
        let frame = opener.take(whole);
        let payload = frame.get(wire::HEADER..whole).ok_or(wire::Error::Cut)?;
        Ok((header.check(payload)?, payload))
    }

    /// What seals, and the socket for what is sealed.
    fn sealer(&mut self) -> Option<(&mut Sealer, &UnixStream)> {
        let (sealer, opener) = &mut **self.sealed.as_mut()?;
        if opener.wants_update() {
            sealer.owe_update();
        }
        Some((sealer, &self.socket))
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.sealed {
            Some(ends) => Opening(&mut ends.1, &self.socket).read(into),
            None => self.socket.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.sealer() {
            Some((sealer, mut socket)) => {
                sealer.send_copy(&mut socket, bytes)?;
                Ok(bytes.len())
            }
            None => self.socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(ends) = &mut self.sealed {
            let (sealer, opener) = &mut **ends;
            // Whoever is gone need not be told.
            let _ = sealer.close(&mut AtOnce(&self.socket), opener.error());
        }
    }
}

/// What is opened of what comes on a socket.
struct Opening<'a>(&'a mut Opener, &'a UnixStream);

impl Read for Opening<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Self(opener, socket) = self;
        opener.have(socket, into.len().min(1))?;
        let taken = opener.take(into.len());
        if let Some(place) = into.get_mut(..taken.len()) {
            place.copy_from_slice(taken);
        }
        Ok(taken.len())
    }
}

/// Writes what can be written at once.
struct AtOnce<'a>(&'a UnixStream);

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (fd, start) = (self.0.as_raw_fd(), bytes.as_ptr());
        // SAFETY: the bytes are there, and as many.
        let n = unsafe { libc::send(fd, start.cast(), bytes.len(), flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
