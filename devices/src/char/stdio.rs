//! The monitor's own terminal, or whatever its input and output are.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use event_manager::EventOps;
use vmm_sys_util::epoll::EventSet;

use super::outbox::Outbox;
use super::{BUFFER, Error, STDIN, STDOUT, Watch, wait_writable};

#[derive(Debug)]
pub(super) struct Stdio {
    input: File,
    output: Output,
    out: Outbox,
    /// There will be no more input.
    ended: bool,
    /// Nobody reads the output any more.
    gone: bool,
    input_watch: Watch,
    output_watch: Watch,
    /// Puts the terminal's mode back when it is dropped.
    _raw: Option<RawMode>,
}

impl Stdio {
    pub(super) fn open() -> Result<Self, Error> {
        let input = io::stdin().as_fd().try_clone_to_owned();
        let input = File::from(input.map_err(Error::Stdio)?);
        // A file is always readable and epoll does not take it.
        let ended = input.metadata().map_err(Error::Stdio)?.is_file();
        Ok(Self {
            output: Output::open().map_err(Error::Stdio)?,
            _raw: RawMode::enter(&input).map_err(Error::Stdio)?,
            input,
            out: Outbox::new(BUFFER),
            ended,
            gone: false,
            input_watch: Watch::default(),
            output_watch: Watch::default(),
        })
    }

    pub(super) fn size(&self) -> Option<(u16, u16)> {
        // SAFETY: all zeros are a valid winsize.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: TIOCGWINSZ fills one winsize, which outlives the call.
        let got = unsafe { libc::ioctl(self.output.file.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
        (got == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }

    pub(super) fn unwatched(&mut self) {
        self.input_watch = Watch::default();
        self.output_watch = Watch::default();
    }

    pub(super) fn write(&mut self, data: &[u8]) -> usize {
        if self.gone {
            return data.len();
        }
        let lost = self.out.push(data);
        self.flush();
        lost
    }

    pub(super) fn flush(&mut self) {
        if self.out.flush(&self.output.file).is_err() {
            self.gone = true;
            self.out.clear();
        }
    }

    pub(super) fn drain(&mut self, deadline: Instant) {
        self.flush();
        while !self.out.is_empty() && wait_writable(&self.output.file, deadline) {
            self.flush();
        }
    }

    /// Reads once if input is there: whoever else shares the terminal would
    /// be surprised if it were switched to non-blocking.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> usize {
        if self.ended || buffer.is_empty() || !is_readable(&self.input) {
            return 0;
        }
        match self.input.read(buffer) {
            Ok(0) => {
                self.ended = true;
                0
            }
            Ok(n) => n,
            Err(error) => {
                self.ended =
                    !matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock);
                0
            }
        }
    }

    pub(super) fn end_input(&mut self) {
        self.ended = true;
    }

    pub(super) fn room(&self) -> usize {
        self.out.room()
    }

    pub(super) fn sync(&mut self, ops: &mut EventOps, wanted: bool) {
        let set = (wanted && !self.ended).then_some(EventSet::IN);
        if let Err(error) = self.input_watch.set(ops, &self.input, STDIN, set) {
            tracing::info!(%error, "standard input cannot be waited for and is left alone");
            self.ended = true;
        }
        let set = (!self.out.is_empty()).then_some(EventSet::OUT);
        if let Err(error) = self.output_watch.set(ops, &self.output.file, STDOUT, set) {
            tracing::warn!(%error, "standard output cannot be waited for");
        }
    }
}

fn is_readable(file: &File) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one pollfd and outlives the call.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}

/// Standard output, such that writing to it does not block.
#[derive(Debug)]
struct Output {
    file: File,
    /// The flags that the shared descriptor had, if they were changed.
    flags: Option<libc::c_int>,
}

impl Output {
    fn open() -> io::Result<Self> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        if kind.is_file() || kind.is_block_device() {
            return Ok(Self { file, flags: None });
        }
        // A terminal or pipe can be opened once more, with flags of its own.
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open("/proc/self/fd/1");
        if let Ok(file) = again {
            return Ok(Self { file, flags: None });
        }
        // SAFETY: no memory is involved.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        set_flags(&file, flags | libc::O_NONBLOCK)?;
        Ok(Self {
            file,
            flags: Some(flags),
        })
    }
}

fn set_flags(file: &File, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(flags) = self.flags {
            // The process ends anyway: there is nobody to tell.
            let _ = set_flags(&self.file, flags);
        }
    }
}

/// The terminal's mode before it was made raw.
static ORIGINAL: Mutex<Option<libc::termios>> = Mutex::new(None);

/// A terminal that passes each key on as it is.
#[derive(Debug)]
struct RawMode;

impl RawMode {
    /// Makes standard input raw if it is this process's terminal.
    fn enter(input: &File) -> io::Result<Option<Self>> {
        let fd = input.as_raw_fd();
        // SAFETY: all zeros are a valid termios.
        let mut mode: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `mode` is one termios. A process in the background must not
        // change the mode: it would be stopped.
        let ours = unsafe {
            libc::tcgetattr(fd, &mut mode) == 0 && libc::tcgetpgrp(fd) == libc::getpgrp()
        };
        if !ours {
            return Ok(None);
        }
        {
            let mut original = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner);
            // A second port finds the mode that the first one has set.
            if original.is_none() {
                *original = Some(mode);
                // SAFETY: the function is safe to call when the process ends.
                unsafe { libc::atexit(restore_at_exit) };
            }
        }
        let guard = Self;
        // SAFETY: `mode` is one termios.
        unsafe { libc::cfmakeraw(&mut mode) };
        // The monitor's own messages still end in plain line feeds.
        mode.c_oflag |= libc::OPOST | libc::ONLCR;
        // SAFETY: `mode` is one termios.
        match unsafe { libc::tcsetattr(fd, libc::TCSANOW, &mode) } {
            0 => Ok(Some(guard)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_at_exit();
    }
}

/// Puts the terminal's mode back; at the process's exit too.
extern "C" fn restore_at_exit() {
    // A lock that is held at exit is held by a thread that is just doing this.
    if let Ok(original) = ORIGINAL.try_lock()
        && let Some(mode) = &*original
    {
        // SAFETY: `mode` is one termios.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, mode) };
    }
}
