//! The socket that a port listens on.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::{Error, Watch};

/// What a second client is told.
const BUSY: &[u8] = b"busy: another client is attached to this console\r\n";

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    path: PathBuf,
    pub(super) watch: Watch,
}

impl Listener {
    /// Listens at `path`, with mode 0600 from the first moment on. What a dead
    /// process has left there is replaced.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let socket = match listen(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                listen(path).map_err(fail)?
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                return Err(Error::PathTooLong(path.to_owned()));
            }
            result => result.map_err(fail)?,
        };
        socket.set_nonblocking(true).map_err(fail)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            watch: Watch::default(),
        })
    }

    /// The next client that waits, as a non-blocking stream.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        match self.socket.accept() {
            Ok((stream, _)) => stream.set_nonblocking(true).is_ok().then_some(stream),
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::warn!(%error, socket = ?self.path, "a client was lost");
                }
                None
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Out of reach in a jail: the next one to listen there removes it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Tells a client that it is one too many.
pub(super) fn refuse(mut stream: &UnixStream) {
    // A new socket has room for this; a client that is gone needs no word.
    let _ = stream.write(BUSY);
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let bytes = OsStr::as_bytes(path.as_os_str());
    // SAFETY: all zeros are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        fd => Ok(fd),
    };
    // SAFETY: no memory is involved; the descriptor is new and ours.
    let socket = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        OwnedFd::from_raw_fd(check(libc::socket(libc::AF_UNIX, kind, 0))?)
    };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_un of `len` bytes. (The file takes over
    // the mode that the socket has when it is bound: nobody gets in between.)
    unsafe {
        check(libc::fchmod(socket.as_raw_fd(), 0o600))?;
        check(libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            len,
        ))?;
        check(libc::listen(socket.as_raw_fd(), 8))?;
    }
    Ok(socket.into())
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let fail = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    if !std::fs::symlink_metadata(path)
        .map_err(fail)?
        .file_type()
        .is_socket()
    {
        return Err(Error::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::InUse(path.to_owned())),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(fail)
        }
        Err(error) => Err(fail(error)),
    }
}
