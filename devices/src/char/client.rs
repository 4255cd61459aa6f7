//! Who is connected to a port's socket.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use event_manager::EventOps;
use vmm_sys_util::epoll::EventSet;

use super::outbox::Outbox;
use super::{BUFFER, CLIENT, Watch, wait_writable};

#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    out: Outbox,
    /// It will send no more.
    ended: bool,
    /// It takes no more; what it has sent can still be read.
    gone: bool,
    pub(super) watch: Watch,
}

impl Client {
    /// Takes over a non-blocking stream.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            out: Outbox::new(BUFFER),
            ended: false,
            gone: false,
            watch: Watch::default(),
        }
    }

    /// Sends or keeps `data`; returns how many bytes were lost over it.
    pub(super) fn write(&mut self, data: &[u8]) -> usize {
        let lost = self.out.push(data);
        self.flush();
        lost
    }

    pub(super) fn flush(&mut self) {
        if self.out.flush(&self.stream).is_err() {
            self.hang_up();
        }
    }

    /// Keeps at it until everything is sent or the deadline has come.
    pub(super) fn drain(&mut self, deadline: Instant) {
        self.flush();
        while !self.out.is_empty() && wait_writable(&self.stream, deadline) {
            self.flush();
        }
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> usize {
        if self.ended || buffer.is_empty() {
            return 0;
        }
        loop {
            match (&self.stream).read(buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => return n,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.ended = true;
                    self.hang_up();
                }
            }
            return 0;
        }
    }

    /// The other side has closed, or broke.
    pub(super) fn hang_up(&mut self) {
        self.gone = true;
        self.out.clear();
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether nothing can come from it or go to it any more.
    pub(super) fn is_done(&self) -> bool {
        self.gone && self.ended
    }

    pub(super) fn room(&self) -> usize {
        self.out.room()
    }

    /// Has epoll look at the stream. Not once the other side is gone: that
    /// would be reported forever, and the device reads the rest unasked.
    pub(super) fn sync(&mut self, ops: &mut EventOps, wanted: bool) {
        let mut set = EventSet::empty();
        if wanted && !self.ended {
            set |= EventSet::IN;
        }
        if !self.out.is_empty() {
            set |= EventSet::OUT;
        }
        let wanted = (!self.gone).then_some(set);
        if let Err(error) = self.watch.set(ops, &self.stream, CLIENT, wanted) {
            tracing::error!(%error, "a console client cannot be watched");
        }
    }

    pub(super) fn unwatch(&mut self, ops: &mut EventOps) {
        // What is not registered is not looked at either.
        let _ = self.watch.set(ops, &self.stream, CLIENT, None);
    }
}
