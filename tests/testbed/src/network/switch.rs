//! The learning switch between the nodes of a network, with a shaper for each pair of ports.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Shared;
use super::shaper::Shaper;

/// Longest frame with its header. Nodes send none longer, as they have no offloads here.
const MAX_FRAME: usize = 70_000;

/// Bytes that may wait for a node that does not read. Further frames are dropped, as a network
/// card does.
const BACKLOG: usize = 1024 * 1024;

type Mac = [u8; 6];

/// Where a node's network card is plugged in, or a service that only this node sees.
struct Port {
    node: String,
    /// The service's address, once it has sent something. `None` for network cards.
    service: Option<Mac>,
    socket: Socket,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

enum Socket {
    /// QEMU has not connected yet.
    Awaited(UnixListener),
    Connected(UnixStream),
    Gone,
}

/// The switch. It runs on a thread of its own.
pub(super) struct Switch {
    shared: Arc<Shared>,
    start: Instant,
    ports: Vec<Port>,
    learned: HashMap<Mac, usize>,
    shapers: BTreeMap<(usize, usize), Shaper>,
}

impl Switch {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            start: Instant::now(),
            ports: Vec::new(),
            learned: HashMap::new(),
            shapers: BTreeMap::new(),
        }
    }

    /// Works until the other end of `bell` is dropped. A byte from it says that there is a new
    /// port.
    pub(super) fn run(mut self, mut bell: &UnixStream) -> io::Result<()> {
        bell.set_nonblocking(true)?;
        let mut rings = [0; 64];
        loop {
            let ready = self.wait(bell)?;
            if ready[0] {
                match bell.read(&mut rings) {
                    Ok(0) => return Ok(()),
                    Ok(_) => self.plug_in()?,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            for port in (0..self.ports.len()).filter(|port| ready.get(port + 1) == Some(&true)) {
                self.receive(port);
            }
            self.deliver();
        }
    }

    /// Waits until a socket is ready or a frame is due. The first answer is the bell's, the
    /// others are those of the ports.
    fn wait(&self, bell: &UnixStream) -> io::Result<Vec<bool>> {
        let due = self.shapers.values().filter_map(Shaper::next_due).min();
        let timeout = due.map(|due| due.saturating_sub(self.start.elapsed()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::new(bell, PollFlags::IN)];
        fds.extend(self.ports.iter().map(|port| port.poll_fd(bell.as_fd())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    fn plug_in(&mut self) -> io::Result<()> {
        for plug in self.shared.lock().plugged.drain(..) {
            plug.listener.set_nonblocking(true)?;
            self.ports.push(Port {
                node: plug.node,
                service: plug.service.then(Mac::default),
                socket: Socket::Awaited(plug.listener),
                incoming: Vec::new(),
                outgoing: Vec::new(),
            });
        }
        Ok(())
    }

    fn receive(&mut self, port: usize) {
        let now = self.start.elapsed();
        for frame in self.ports[port].receive() {
            self.forward(now, port, &frame);
        }
    }

    /// Puts a frame on the links to where it goes.
    fn forward(&mut self, now: Duration, from: usize, frame: &[u8]) {
        let Some((header, _)) = frame.split_at_checked(14) else {
            return;
        };
        let (mut target, mut source) = (Mac::default(), Mac::default());
        target.copy_from_slice(&header[..6]);
        source.copy_from_slice(&header[6..12]);
        // Services of different nodes may have the same address.
        match &mut self.ports[from].service {
            Some(address) => *address = source,
            None => drop(self.learned.insert(source, from)),
        }
        let to_all = target[0] & 1 != 0;
        let to = self.destination(from, target).filter(|_| !to_all);
        for other in (0..self.ports.len()).filter(|&other| other != from) {
            if to.is_none_or(|to| to == other) && self.visible(from, other) {
                let Some(frame) = self.translated(from, other, frame) else {
                    continue;
                };
                let link = self
                    .shared
                    .link(&self.ports[from].node, &self.ports[other].node);
                let seed = self.shared.seed ^ ((from as u64) << 32) ^ ((other as u64) << 1);
                let shaper = self
                    .shapers
                    .entry((from, other))
                    .or_insert_with(|| Shaper::new(seed));
                shaper.push(now, &frame, &link);
            }
        }
    }

    /// A frame as it comes out of the gateways on its way, if it does.
    fn translated<'f>(&self, from: usize, to: usize, frame: &'f [u8]) -> Option<Cow<'f, [u8]>> {
        let mut frame = Cow::Borrowed(frame);
        let (from, to) = (&self.ports[from], &self.ports[to]);
        // Services are on the node's side.
        if from.service.is_none() && to.service.is_none() {
            if let Some(gateway) = self.shared.translation(&from.node) {
                gateway.out(frame.to_mut());
            }
            if let Some(gateway) = self.shared.translation(&to.node)
                && !gateway.into(frame.to_mut())
            {
                return None;
            }
        }
        Some(frame)
    }

    /// The port with this address as `from` knows it.
    fn destination(&self, from: usize, target: Mac) -> Option<usize> {
        let own = |port: &Port| port.service == Some(target) && port.node == self.ports[from].node;
        let service = self.ports.iter().position(own);
        service.or_else(|| self.learned.get(&target).copied())
    }

    /// Whether two ports belong to one segment.
    fn visible(&self, from: usize, to: usize) -> bool {
        let (from, to) = (&self.ports[from], &self.ports[to]);
        let service = from.service.is_some() || to.service.is_some();
        !service || from.node == to.node
    }

    /// Hands on what has arrived, and what nodes did not take before.
    fn deliver(&mut self) {
        let now = self.start.elapsed();
        for (&(from, to), shaper) in &mut self.shapers {
            while let Some(frame) = shaper.pop(now) {
                if !self.ports[to].queue(&frame) {
                    shaper.counters.passed -= 1;
                    shaper.counters.dropped += 1;
                }
            }
            // Also what was dropped when it came.
            if shaper.counters != shaper.told {
                shaper.told = shaper.counters;
                let ends = (self.ports[from].node.clone(), self.ports[to].node.clone());
                self.shared.lock().counters.insert(ends, shaper.counters);
            }
        }
        for port in &mut self.ports {
            port.flush();
        }
    }
}

impl Port {
    fn poll_fd<'a>(&'a self, nothing: BorrowedFd<'a>) -> PollFd<'a> {
        match &self.socket {
            Socket::Awaited(listener) => PollFd::new(listener, PollFlags::IN),
            Socket::Connected(stream) if self.outgoing.is_empty() => {
                PollFd::new(stream, PollFlags::IN)
            }
            Socket::Connected(stream) => PollFd::new(stream, PollFlags::IN | PollFlags::OUT),
            Socket::Gone => PollFd::from_borrowed_fd(nothing, PollFlags::empty()),
        }
    }

    /// The frames that have come in. Each is preceded by its length (QEMU's stream protocol).
    fn receive(&mut self) -> Vec<Vec<u8>> {
        if let Socket::Awaited(listener) = &self.socket {
            if let Ok((stream, _)) = listener.accept() {
                let usable = stream.set_nonblocking(true).is_ok();
                self.socket = if usable {
                    Socket::Connected(stream)
                } else {
                    Socket::Gone
                };
            }
            return Vec::new();
        }
        if let Socket::Connected(stream) = &mut self.socket {
            let mut buffer = [0; 64 * 1024];
            match stream.read(&mut buffer) {
                Ok(len) if len > 0 => self.incoming.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => self.socket = Socket::Gone,
            }
        }
        let mut frames = Vec::new();
        let mut rest = self.incoming.as_slice();
        while let Some((len, after)) = rest.split_first_chunk::<4>() {
            let len = u32::from_be_bytes(*len) as usize;
            if len > MAX_FRAME {
                self.socket = Socket::Gone;
                break;
            }
            let Some((frame, after)) = after.split_at_checked(len) else {
                break;
            };
            frames.push(frame.to_vec());
            rest = after;
        }
        let used = self.incoming.len() - rest.len();
        self.incoming.drain(..used);
        frames
    }

    /// Queues a frame for the node. False when it is dropped.
    fn queue(&mut self, frame: &[u8]) -> bool {
        let room = self.outgoing.len() + frame.len() <= BACKLOG;
        let connected = matches!(self.socket, Socket::Connected(_));
        if room && connected {
            self.outgoing
                .extend_from_slice(&(frame.len() as u32).to_be_bytes());
            self.outgoing.extend_from_slice(frame);
        }
        room && connected
    }

    fn flush(&mut self) {
        let Socket::Connected(stream) = &mut self.socket else {
            return;
        };
        let mut sent = 0;
        let mut gone = false;
        while sent < self.outgoing.len() && !gone {
            match stream.write(&self.outgoing[sent..]) {
                Ok(len) if len > 0 => sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                _ => gone = true,
            }
        }
        self.outgoing.drain(..sent);
        if gone {
            self.socket = Socket::Gone;
            self.outgoing.clear();
        }
    }
}
