//! A shorter way for data streams.
//!
//! Whatever carries bytes between the two monitors may have a socket that leads
//! to the other end. A data stream therefore begins with a question, one byte:
//! [`ASK`]. Who is in between and has a socket answers with the same byte and
//! the socket, and hands the other end of it to the source in the same way; who
//! has none passes the question on, and the source answers that there is none.
//! Nothing is used of a socket that those of one family have and others have not.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// "Is there a socket?", and with one: "here it is". No frame begins like this.
pub const ASK: u8 = b'+';
/// "There is none."
const NONE: u8 = b'-';

/// Hands a socket over to the monitor at the other end of `stream`.
///
/// # Errors
/// It is not there any more.
pub fn hand_over(stream: &UnixStream, socket: impl AsFd) -> io::Result<()> {
    let sent = stream.send_with_fd(&[ASK][..], socket.as_fd().as_raw_fd())?;
    if sent == 1 {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// The destination's question; the stream to be used.
///
/// # Errors
/// It is cut, or the answer is none.
pub(crate) fn ask(mut stream: UnixStream) -> io::Result<UnixStream> {
    stream.write_all(&[ASK])?;
    match receive(&stream)? {
        (ASK, Some(socket)) => Ok(socket),
        (NONE, None) => Ok(stream),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "no answer to a question for a socket",
        )),
    }
}

/// What the source does with a stream on which something has come: where it
/// begins with the question, the stream to be used instead.
///
/// # Errors
/// It is cut.
pub(crate) fn answer(stream: &mut UnixStream) -> io::Result<Option<UnixStream>> {
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
    if n != 1 || byte != ASK {
        return Ok(None);
    }
    if let (_, Some(socket)) = receive(stream)? {
        return Ok(Some(socket));
    }
    stream.write_all(&[NONE])?;
    stream.try_clone().map(Some)
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    use super::*;

    fn is_the_way(mut here: UnixStream, mut there: UnixStream) {
        here.write_all(b"page").unwrap();
        let mut four = [0; 4];
        there.read_exact(&mut four).unwrap();
        assert_eq!(four, *b"page");
    }

    #[test]
    fn without_anybody_between_them_the_stream_stays() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let asked = std::thread::spawn(move || ask(here).unwrap());
        let found = loop {
            if let Some(found) = answer(&mut there).unwrap() {
                break found;
            }
        };
        is_the_way(asked.join().unwrap(), found);
    }

    #[test]
    fn who_is_between_them_hands_a_connection_to_both() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        let (destination, its) = UnixStream::pair().unwrap();
        let (mut source, ours) = UnixStream::pair().unwrap();
        hand_over(&its, &tcp).unwrap();
        hand_over(&ours, &other).unwrap();
        drop((tcp, other, ours));
        let found = answer(&mut source).unwrap().unwrap();
        is_the_way(ask(destination).unwrap(), found);
        drop(its);
    }

    #[test]
    fn frames_are_left_alone_and_nonsense_is_an_error() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        here.write_all(b"join").unwrap();
        assert!(answer(&mut there).unwrap().is_none());
        let mut four = [0; 4];
        there.read_exact(&mut four).unwrap();
        // An answer without the socket that it promises.
        there.write_all(&[ASK]).unwrap();
        assert!(ask(here).is_err());
        let (here, there) = UnixStream::pair().unwrap();
        drop::<OwnedFd>(there.into());
        assert!(ask(here).is_err());
    }
}
