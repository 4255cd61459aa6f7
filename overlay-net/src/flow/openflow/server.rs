//! Moving a session's bytes: over TCP, or over any stream that does not block.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::session::{BACKLOG, Roles};
use super::{Datapath, Hub, Session};

/// Controllers at one datapath at most.
const MOST: usize = 16;

/// How long a controller may be silent before it is asked, and then again.
const SILENCE: Duration = Duration::from_secs(15);

/// How long a thread sleeps at most before it looks whether it should end.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// How long after one try to reach a controller the next is.
const AGAIN: Duration = Duration::from_secs(2);

/// A datapath with its controllers.
#[derive(Clone)]
pub struct Endpoint {
    datapath: Arc<Mutex<dyn Datapath>>,
    hub: Hub,
    roles: Roles,
    sessions: Arc<AtomicUsize>,
}

/// A thread that is ended when this is dropped.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Where it listens, or what it connects to.
    pub address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

impl Endpoint {
    /// Controllers of `datapath`, which are told what `hub` tells.
    #[must_use]
    pub fn new(datapath: Arc<Mutex<dyn Datapath>>, hub: Hub) -> Self {
        Self {
            datapath,
            hub,
            roles: Roles::default(),
            sessions: Arc::default(),
        }
    }

    /// Serves one controller over `stream`, which must not block, until it goes
    /// or `stop` is set. TLS has been negotiated before.
    ///
    /// # Errors
    ///
    /// The connection broke, or what came was no OpenFlow.
    pub fn serve<S: Read + Write + AsFd>(
        &self,
        mut stream: S,
        stop: &AtomicBool,
    ) -> io::Result<()> {
        let inbox = self.hub.join()?;
        let mut session = Session::among(&self.roles);
        let mut heard = Instant::now();
        let mut asked = false;
        while !stop.load(Ordering::Relaxed) {
            while let Some(event) = inbox.next() {
                session.on_event(&event);
            }
            send(&mut stream, &mut session)?;
            if session.is_behind() && session.output().len() < BACKLOG {
                self.answer(&mut stream, &mut session, &[])?;
                continue;
            }
            let mut wanted = PollFlags::empty();
            if !session.is_behind() {
                wanted |= PollFlags::IN;
            }
            if !session.output().is_empty() {
                wanted |= PollFlags::OUT;
            }
            {
                let waker = inbox.waker();
                let mut waits = [
                    PollFd::new(&stream, wanted),
                    PollFd::new(&waker, PollFlags::IN),
                ];
                match poll(&mut waits, Some(&LOOK)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            inbox.woken();
            if !session.is_behind() {
                match self.receive(&mut stream, &mut session)? {
                    Some(0) => return Ok(()),
                    Some(_) => (heard, asked) = (Instant::now(), false),
                    None => {}
                }
            }
            match heard.elapsed() {
                silent if silent > 2 * SILENCE => return Err(ErrorKind::TimedOut.into()),
                silent if silent > SILENCE && !asked => {
                    session.echo();
                    asked = true;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes what has come; how much: 0 is the end.
    fn receive<S: Read + Write>(
        &self,
        stream: &mut S,
        session: &mut Session,
    ) -> io::Result<Option<usize>> {
        let mut buffer = [0; 16 << 10];
        let len = match stream.read(&mut buffer) {
            Ok(len) => len,
            Err(error) if would_block(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if len != 0 {
            self.answer(stream, session, &buffer[..len])?;
        }
        Ok(Some(len))
    }

    fn answer<S: Read + Write>(
        &self,
        stream: &mut S,
        session: &mut Session,
        bytes: &[u8],
    ) -> io::Result<()> {
        let result = {
            let datapath = self.datapath.lock();
            let mut datapath = datapath.unwrap_or_else(PoisonError::into_inner);
            session.on_bytes(bytes, &mut *datapath)
        };
        for event in session.take_events() {
            self.hub.send(&event);
        }
        if let Err(fatal) = result {
            // Why, as far as it can still be told.
            let _ = send(stream, session);
            return Err(io::Error::new(ErrorKind::InvalidData, fatal));
        }
        Ok(())
    }

    /// Waits for controllers (and for `ovs-ofctl`) at an address.
    ///
    /// # Errors
    ///
    /// The address cannot be listened at.
    pub fn listen(&self, address: impl ToSocketAddrs) -> io::Result<Running> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (this, stop) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let ends = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("openflow".into())
            .spawn(move || this.accept(&listener, &ends))?;
        Ok(Running {
            stop,
            thread: Some(thread),
            address,
        })
    }

    fn accept(&self, listener: &TcpListener, stop: &Arc<AtomicBool>) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let mut waits = [PollFd::new(listener, PollFlags::IN)];
            // Whatever went wrong, it is tried again.
            let _ = poll(&mut waits, Some(&LOOK));
            threads.retain(|thread| !thread.is_finished());
            let Ok((stream, from)) = listener.accept() else {
                continue;
            };
            if self.sessions.load(Ordering::Relaxed) >= MOST {
                tracing::warn!(%from, "a controller is refused: there are {MOST}");
                continue;
            }
            let (this, ends) = (self.clone(), Arc::clone(stop));
            let spawned = thread::Builder::new()
                .name("openflow-peer".into())
                .spawn(move || this.serve_tcp(stream, &ends));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%from, "no thread for a controller: {error}"),
            }
        }
        for thread in threads {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }

    /// Keeps a connection to a controller.
    ///
    /// # Errors
    ///
    /// There can be no thread for it.
    pub fn connect(&self, address: SocketAddr) -> io::Result<Running> {
        let (this, stop) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let ends = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("openflow".into())
            .spawn(move || {
                while !ends.load(Ordering::Relaxed) {
                    match TcpStream::connect_timeout(&address, AGAIN) {
                        Ok(stream) => this.serve_tcp(stream, &ends),
                        Err(error) => tracing::debug!(%address, "no controller: {error}"),
                    }
                    let until = Instant::now() + AGAIN;
                    while Instant::now() < until && !ends.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            })?;
        Ok(Running {
            stop,
            thread: Some(thread),
            address,
        })
    }

    fn serve_tcp(&self, stream: TcpStream, stop: &AtomicBool) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let peer = stream.peer_addr().ok();
        let result = stream
            .set_nonblocking(true)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| self.serve(stream, stop));
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        match result {
            Ok(()) => tracing::debug!(?peer, "a controller has gone"),
            Err(error) => tracing::info!(?peer, "a controller's session ends: {error}"),
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn send<S: Write>(stream: &mut S, session: &mut Session) -> io::Result<()> {
    while !session.output().is_empty() {
        match stream.write(session.output()) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(len) => session.sent(len),
            Err(error) if would_block(&error) => break,
            Err(error) => return Err(error),
        }
    }
    // A TLS stream may hold bytes back.
    match stream.flush() {
        Err(error) if !would_block(&error) => Err(error),
        _ => Ok(()),
    }
}
