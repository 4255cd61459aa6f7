//! The end of the channel that asks.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::flow::Credit;
use crate::protocol::{CHUNK, Decoder, EncodeError, Frame, Message, Outcome, encode};

mod command;
mod copy;

pub use command::{Command, Output, Status, Stream, StreamInput, StreamOutput};

/// How often [`Client::connect`] says hello until it is answered.
const HELLO_EVERY: Duration = Duration::from_millis(50);

/// The longest wait for something that has no limit of its own.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What goes wrong on the channel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No agent answered in time.
    #[error("no agent answered within {0:?}: look at the machine's console output")]
    NoAnswer(Duration),
    /// The stream under the channel ended.
    #[error("the connection to the machine's agent ended: {0}")]
    Closed(String),
    /// The agent could not carry out the request.
    #[error("{what}: {reason}")]
    Refused {
        /// The request.
        what: String,
        /// The agent's words.
        reason: String,
    },
    /// The command was ended because its time was up.
    #[error(
        "`{command}` did not end within {limit:?} and was killed; its output so far:\n{output}"
    )]
    TimedOut {
        /// The command line.
        command: String,
        /// Its limit.
        limit: Duration,
        /// What it had written.
        output: Output,
    },
    /// The command ended, but not with status 0.
    #[error("`{command}` ended with {}:\n{output}", output.status)]
    Unsuccessful {
        /// The command line.
        command: String,
        /// Status and what it had written.
        output: Output,
    },
    /// Somebody else wrote to the channel, or it loses bytes.
    #[error("{received} of {sent} bytes of output arrived: what came instead is on standard error")]
    Lost {
        /// Bytes that arrived.
        received: u64,
        /// Bytes that the agent sent.
        sent: u64,
    },
    /// The request is too long.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A local file or the stream failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Result of this module's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A connection to the agent of one machine. Any number of threads may use it at once; clones
/// share the connection.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    session: u32,
    writer: Mutex<Box<dyn Write + Send>>,
    next: AtomicU32,
    requests: Mutex<Requests>,
}

struct Requests {
    open: HashMap<u32, Open>,
    /// Why the stream ended, once it has.
    closed: Option<String>,
}

/// Where the messages of one request go.
struct Open {
    inbox: Sender<Message>,
    credit: Arc<Credit>,
}

impl Client {
    /// Starts a session over a stream whose other end an agent serves, or will serve soon.
    ///
    /// # Errors
    /// [`Error::NoAnswer`] when no agent answers within `timeout`, [`Error::Closed`] when the
    /// stream ends.
    pub fn connect(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        timeout: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let inner = Arc::new(Inner {
            // The hasher's keys are random; no session has number 0.
            session: (RandomState::new().hash_one(0) as u32).max(1),
            writer: Mutex::new(Box::new(writer)),
            next: AtomicU32::new(1),
            requests: Mutex::new(Requests {
                open: HashMap::new(),
                closed: None,
            }),
        });
        let (inbox, ready) = channel();
        let credit = Arc::default();
        lock(&inner.requests).open.insert(0, Open { inbox, credit });
        let of_reader = Arc::downgrade(&inner);
        let session = inner.session;
        thread::spawn(move || {
            let reason = receive(reader, session, |frame| match of_reader.upgrade() {
                Some(inner) => {
                    inner.dispatch(frame);
                    true
                }
                None => false,
            });
            if let Some(inner) = of_reader.upgrade() {
                inner.close(reason);
            }
        });
        loop {
            inner.send(0, Message::Hello)?;
            let left = deadline.saturating_duration_since(Instant::now());
            match ready.recv_timeout(HELLO_EVERY.min(left)) {
                Ok(Message::Ready) => break,
                // An echo of a terminal that is not raw yet.
                Ok(_) => thread::sleep(HELLO_EVERY),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    return Err(Error::NoAnswer(timeout));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(inner.closed()),
            }
        }
        lock(&inner.requests).open.remove(&0);
        Ok(Self(inner))
    }

    /// Starts a session over a connected socket, like [`Client::connect`]. The connection ends
    /// with the last clone of the client.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_socket(socket: UnixStream, timeout: Duration) -> Result<Self> {
        let reader = socket.try_clone().map_err(|source| Error::Io {
            what: "cannot use the socket twice".to_owned(),
            source,
        })?;
        Self::connect(reader, Hangup(socket), timeout)
    }

    /// A command to run in the machine. Its program is looked up in the machine's `PATH`.
    pub fn command(&self, program: impl Into<String>) -> Command<'_> {
        Command::new(self, program.into())
    }

    /// A command line for the machine's shell.
    pub fn sh(&self, script: impl Into<String>) -> Command<'_> {
        self.command("/bin/sh").arg("-ec").arg(script)
    }

    /// Writes `bytes` to the file `path` in the machine, with permission bits `mode`. The file
    /// appears under its name when it is complete.
    ///
    /// # Errors
    /// [`Error::Refused`] when the file cannot be written.
    pub fn write(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        copy::put(self, path, mode, bytes)
    }

    /// Copies a local file to `path` in the machine, with its permission bits.
    ///
    /// # Errors
    /// [`Error::Io`] when the local file cannot be read, [`Error::Refused`] when the other
    /// cannot be written.
    pub fn put(&self, local: &Path, path: &str) -> Result<()> {
        copy::put_file(self, local, path)
    }

    /// Reads the file `path` of the machine.
    ///
    /// # Errors
    /// [`Error::Refused`] when it cannot be read.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        copy::get(self, path, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies the file `path` of the machine to a local file.
    ///
    /// # Errors
    /// [`Error::Refused`] when it cannot be read, [`Error::Io`] when the local file cannot be
    /// written.
    pub fn get(&self, path: &str, local: &Path) -> Result<()> {
        copy::get_file(self, path, local)
    }

    /// Sends the first message of a request. `limit` bounds the whole request.
    fn request(
        &self,
        message: Message,
        limit: Option<Duration>,
    ) -> Result<(Arc<Request>, Receiver<Message>)> {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed).max(1);
        let (inbox, messages) = channel();
        let credit = Arc::<Credit>::default();
        {
            let mut requests = lock(&self.0.requests);
            if requests.closed.is_none() {
                requests.open.insert(
                    id,
                    Open {
                        inbox,
                        credit: Arc::clone(&credit),
                    },
                );
            }
        }
        let deadline = Instant::now() + limit.unwrap_or(FOREVER);
        let request = Arc::new(Request {
            id,
            inner: Arc::clone(&self.0),
            credit,
            deadline,
            received: AtomicU64::new(0),
        });
        request.send(message)?;
        Ok((request, messages))
    }
}

impl Inner {
    fn send(&self, request: u32, message: Message) -> Result<()> {
        let wire = encode(&Frame {
            session: self.session,
            request,
            message,
        })?;
        let mut writer = lock(&self.writer);
        writer
            .write_all(&wire)
            .and_then(|()| writer.flush())
            .map_err(|error| Error::Closed(error.to_string()))
    }

    fn dispatch(&self, frame: Frame) {
        let requests = lock(&self.requests);
        let Some(open) = requests.open.get(&frame.request) else {
            return;
        };
        match frame.message {
            Message::Credit(bytes) => open.credit.add(bytes as usize),
            message => {
                if matches!(message, Message::Done(..)) {
                    // Whoever still sends input stops.
                    open.credit.close();
                }
                // The receiver is gone when the request was given up.
                let _ = open.inbox.send(message);
            }
        }
    }

    fn close(&self, reason: String) {
        let mut requests = lock(&self.requests);
        requests.closed = Some(reason);
        for (_, open) in requests.open.drain() {
            open.credit.close();
        }
    }

    fn closed(&self) -> Error {
        let reason = lock(&self.requests).closed.clone();
        Error::Closed(reason.unwrap_or_else(|| "closed".to_owned()))
    }
}

/// Reads frames of `session` until the stream ends or `take` says that nobody listens any more.
/// Returns why it ended.
fn receive(mut reader: impl Read, session: u32, mut take: impl FnMut(Frame) -> bool) -> String {
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return "the other side closed it".to_owned(),
            Ok(len) => {
                for frame in decoder.push(&buffer[..len]) {
                    if frame.session == session && !take(frame) {
                        return "closed".to_owned();
                    }
                }
                if let Some(garbage) = decoder.garbage() {
                    let shown = &garbage[..garbage.len().min(CHUNK)];
                    eprintln!("agent: this is no frame: {}", shown.escape_ascii());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.to_string(),
        }
    }
}

/// One request under way. Dropping it cancels it if it has not ended.
struct Request {
    id: u32,
    inner: Arc<Inner>,
    credit: Arc<Credit>,
    deadline: Instant,
    /// Bytes of both outputs so far.
    received: AtomicU64,
}

impl Request {
    fn send(&self, message: Message) -> Result<()> {
        self.inner.send(self.id, message)
    }

    /// Sends all of `from` as the request's input, as fast as the other side consumes it.
    /// Stops early when the request ends.
    fn feed(&self, mut from: impl Read) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        while let Some(room) = self.credit.take(CHUNK, Some(self.deadline)) {
            let source = |source| Error::Io {
                what: "cannot read the input".to_owned(),
                source,
            };
            let len = from.read(&mut buffer[..room]).map_err(source)?;
            self.credit.add(room - len);
            if len == 0 {
                return self.send(Message::InputEnd);
            }
            self.send(Message::Input(buffer[..len].to_vec()))?;
        }
        Ok(())
    }

    /// The next message; `None` when the request's time is up.
    fn next(&self, messages: &Receiver<Message>) -> Result<Option<Message>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match messages.recv_timeout(left) {
            Ok(message) => {
                if let Message::Stdout(bytes) | Message::Stderr(bytes) = &message {
                    self.send(Message::Credit(bytes.len() as u32))?;
                    self.received
                        .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                if let Message::Done(_, sent) = message {
                    self.forget();
                    let received = self.received.load(Ordering::Relaxed);
                    if received != sent {
                        return Err(Error::Lost { received, sent });
                    }
                }
                Ok(Some(message))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.inner.closed()),
        }
    }

    /// Ends the request on this side. True when it had not ended.
    fn forget(&self) -> bool {
        self.credit.close();
        lock(&self.inner.requests).open.remove(&self.id).is_some()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.forget() {
            // Fails only when the stream has ended, and the request with it.
            let _ = self.send(Message::Cancel);
        }
    }
}

/// Joins an outcome that a request of its kind should not have to an error.
fn refused(what: String, outcome: Outcome) -> Error {
    let reason = match outcome {
        Outcome::Failed(reason) => reason,
        other => format!("{other:?}"),
    };
    Error::Refused { what, reason }
}

/// Ends a socket's connection when the client is dropped, although its reader still holds it.
struct Hangup(UnixStream);

impl Write for Hangup {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        // Fails when the other side was faster.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
