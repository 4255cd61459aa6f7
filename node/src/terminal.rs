//! A terminal in raw mode, and the loop that joins it to a socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Ctrl-]: leaves the console.
const ESCAPE: u8 = 0x1d;

/// Standard input in raw mode; as it was before when dropped.
#[derive(Debug)]
pub(crate) struct RawMode(Termios);

impl RawMode {
    /// Enters raw mode. `None` if standard input is not a terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// Why a console session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The user typed the escape.
    Detached,
    /// The VM closed the socket.
    Closed,
    /// The input ended and the guest was silent for long enough.
    Silent,
    /// A signal asked this process to end.
    Signal,
}

/// How a console session goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    /// Ctrl-] in the input leaves. For terminals: other input is binary.
    pub(crate) escape: bool,
    /// Leave when the input has ended and the guest was silent for so long.
    pub(crate) idle: Option<Duration>,
}

impl Session {
    /// Moves bytes between the socket and standard input and output until one
    /// side ends.
    pub(crate) fn run(self, socket: &UnixStream) -> io::Result<End> {
        let (signalled, handler) = UnixStream::pair()?;
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, handler.try_clone()?)?;
        }
        let stdin = io::stdin();
        self.pump(socket, stdin.as_fd(), &mut io::stdout(), signalled.as_fd())
    }

    fn pump(
        self,
        mut socket: &UnixStream,
        input: BorrowedFd<'_>,
        output: &mut impl Write,
        signalled: BorrowedFd<'_>,
    ) -> io::Result<End> {
        let mut buffer = [0; 4096];
        let mut input_ended = false;
        let mut last = Instant::now();
        loop {
            let timeout = self.idle.filter(|_| input_ended);
            let left = timeout.map(|idle| idle.saturating_sub(last.elapsed()));
            // After the input's end its place is taken by the signal's.
            let input_fd = if input_ended { signalled } else { input };
            let mut fds = [
                PollFd::new(&signalled, PollFlags::IN),
                PollFd::new(&socket, PollFlags::IN),
                PollFd::new(&input_fd, PollFlags::IN),
            ];
            let left = left.map(Timespec::try_from).transpose();
            match poll(&mut fds, left.map_err(io::Error::other)?.as_ref()) {
                Ok(0) => return Ok(End::Silent),
                Ok(_) => (),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [signal_ready, socket_ready, input_ready] = fds.map(|fd| !fd.revents().is_empty());
            if signal_ready {
                return Ok(End::Signal);
            }
            if socket_ready {
                let n = match socket.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                    result => result?,
                };
                if n == 0 {
                    return Ok(End::Closed);
                }
                output.write_all(&buffer[..n])?;
                output.flush()?;
                last = Instant::now();
            }
            if input_ready && !input_ended {
                let n = rustix::io::read(input, &mut buffer)?;
                let escape = self.escape.then(|| escape_at(&buffer[..n])).flatten();
                match socket.write_all(&buffer[..escape.unwrap_or(n)]) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        return Ok(End::Closed);
                    }
                    result => result?,
                }
                if escape.is_some() {
                    socket.shutdown(Shutdown::Both)?;
                    return Ok(End::Detached);
                }
                input_ended = n == 0;
                last = Instant::now();
            }
        }
    }
}

fn escape_at(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte == ESCAPE)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Runs a session whose input is `typed`, with `guest` at the other end
    /// of the socket. Returns how it ended and what was shown.
    fn session(
        session: Session,
        typed: &[u8],
        guest: impl FnOnce(UnixStream) + Send + 'static,
    ) -> (End, Vec<u8>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (input, mut keyboard) = UnixStream::pair().unwrap();
        let (signalled, _handler) = UnixStream::pair().unwrap();
        keyboard.write_all(typed).unwrap();
        drop(keyboard);
        let guest = thread::spawn(move || guest(theirs));
        let mut shown = Vec::new();
        let end = session.pump(&ours, input.as_fd(), &mut shown, signalled.as_fd());
        drop(ours);
        guest.join().unwrap();
        (end.unwrap(), shown)
    }

    const TERMINAL: Session = Session {
        escape: true,
        idle: None,
    };

    #[test]
    fn the_escape_detaches_after_what_was_typed_before_it() {
        let (end, _) = session(TERMINAL, b"ls\x1dgone", |mut guest| {
            let mut got = Vec::new();
            guest.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"ls");
        });
        assert_eq!(end, End::Detached);
    }

    #[test]
    fn piped_input_passes_whole_and_the_session_stays_until_the_guest_ends() {
        let piped = Session {
            escape: false,
            idle: None,
        };
        let (end, shown) = session(piped, b"a\x1db", |mut guest| {
            let mut got = [0; 3];
            guest.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"a\x1db");
            thread::sleep(Duration::from_millis(30));
            guest.write_all(b"answer").unwrap();
        });
        assert_eq!((end, shown.as_slice()), (End::Closed, &b"answer"[..]));
    }

    #[test]
    fn silence_after_the_input_ends_the_session_if_asked() {
        let piped = Session {
            escape: false,
            idle: Some(Duration::from_millis(50)),
        };
        let (end, shown) = session(piped, b"x", |mut guest| {
            guest.write_all(b"y").unwrap();
            // Stays open until the session has left.
            guest.read_to_end(&mut Vec::new()).unwrap();
        });
        assert_eq!((end, shown.as_slice()), (End::Silent, &b"y"[..]));
    }

    #[test]
    fn a_signal_ends_the_session() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (input, _keyboard) = UnixStream::pair().unwrap();
        let (signalled, mut handler) = UnixStream::pair().unwrap();
        handler.write_all(b"!").unwrap();
        let end = TERMINAL.pump(&ours, input.as_fd(), &mut Vec::new(), signalled.as_fd());
        assert_eq!(end.unwrap(), End::Signal);
    }
}
