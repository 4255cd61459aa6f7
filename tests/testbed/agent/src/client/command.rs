//! Commands in the machine.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use super::{Client, Error, Request, Result, refused};
use crate::protocol::{CHUNK, Exec, Message, Outcome};

/// Time limit of a command that sets none. Nested machines under emulation are slow.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);

/// Time for the agent's own answer after a command's limit.
const GRACE: Duration = Duration::from_secs(30);

/// Bytes that are kept of each output. The rest is read and thrown away.
const KEPT: usize = 16 * 1024 * 1024;

/// A command to run in the machine.
#[must_use = "nothing happens until it is run"]
pub struct Command<'a> {
    client: &'a Client,
    exec: Exec,
    input: Vec<u8>,
    limit: Duration,
}

impl<'a> Command<'a> {
    pub(super) fn new(client: &'a Client, program: String) -> Self {
        let exec = Exec {
            argv: vec![program],
            ..Exec::default()
        };
        Self {
            client,
            exec,
            input: Vec::new(),
            limit: DEFAULT_LIMIT,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.exec.argv.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.exec
            .argv
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of the command's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.exec.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.exec.cwd = Some(path.into());
        self
    }

    /// Sets the bytes of the standard input; it is empty otherwise.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Sets the time after which the command is killed with its process group: 120 seconds
    /// otherwise.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the command to its end. Its output ends with it: what it leaves in the background
    /// is not waited for.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when its time is up; [`Error::Refused`] when it cannot be started.
    pub fn run(mut self) -> Result<Output> {
        self.exec.timeout_ms = u64::try_from(self.limit.as_millis()).ok();
        let line = self.line();
        let message = Message::Exec(self.exec);
        let (request, messages) = self.client.request(message, Some(self.limit + GRACE))?;
        let mut output = Output::default();
        let outcome = thread::scope(|scope| {
            let feeder = scope.spawn(|| request.feed(self.input.as_slice()));
            let outcome = gather(&request, &messages, &mut output);
            request.forget();
            // What is left of the input has no reader any more.
            drop(feeder.join());
            outcome
        })?;
        match outcome {
            Some(Outcome::Exited(code)) => output.status = Status::Exited(code),
            Some(Outcome::Signaled(signal)) => output.status = Status::Signaled(signal),
            Some(Outcome::TimedOut) | None => {
                return Err(Error::TimedOut {
                    command: line,
                    limit: self.limit,
                    output,
                });
            }
            Some(other) => return Err(refused(line, other)),
        }
        Ok(output)
    }

    /// Runs the command to its end and returns its standard output as text.
    ///
    /// # Errors
    /// As [`Command::run`], and [`Error::Unsuccessful`] when its status is not 0.
    pub fn text(self) -> Result<String> {
        let command = self.line();
        let output = self.run()?;
        if output.status != Status::Exited(0) {
            return Err(Error::Unsuccessful { command, output });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts the command in the background, with both its outputs appended to the file `log`
    /// in the machine. It has no time limit. Returns its process id, which is also its process
    /// group.
    ///
    /// # Errors
    /// [`Error::Refused`] when it cannot be started.
    pub fn spawn(mut self, log: impl Into<String>) -> Result<u32> {
        self.exec.detach = Some(log.into());
        let line = self.line();
        let (request, messages) = self.client.request(Message::Exec(self.exec), Some(GRACE))?;
        match request.next(&messages)? {
            Some(Message::Done(Outcome::Spawned(pid), _)) => Ok(pid),
            Some(Message::Done(other, _)) => Err(refused(line, other)),
            _ => Err(Error::NoAnswer(GRACE)),
        }
    }

    /// Starts the command and joins its standard input and output to the returned stream. It
    /// ends with the stream and has no time limit. Its standard error is thrown away.
    ///
    /// # Errors
    /// [`Error::Closed`] when the connection has ended.
    pub fn stream(self) -> Result<Stream> {
        let (request, messages) = self.client.request(Message::Exec(self.exec), None)?;
        Ok(Stream {
            input: StreamInput(Arc::clone(&request)),
            output: StreamOutput {
                request,
                messages,
                rest: io::Cursor::default(),
            },
        })
    }

    fn line(&self) -> String {
        self.exec.argv.join(" ")
    }
}

/// Reads a command's output to its end. `None` when its time is up.
fn gather(
    request: &Request,
    messages: &Receiver<Message>,
    output: &mut Output,
) -> Result<Option<Outcome>> {
    loop {
        match request.next(messages)? {
            Some(Message::Stdout(bytes)) => output.truncated |= !keep(&mut output.stdout, &bytes),
            Some(Message::Stderr(bytes)) => output.truncated |= !keep(&mut output.stderr, &bytes),
            Some(Message::Done(outcome, _)) => return Ok(Some(outcome)),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

/// Adds what there is room for. False when something was left out.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = KEPT.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(&bytes[..room]);
    room == bytes.len()
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// With this exit status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl Status {
    /// The exit status, unless a signal ended the command.
    pub fn code(self) -> Option<i32> {
        match self {
            Self::Exited(code) => Some(code),
            Self::Signaled(_) => None,
        }
    }

    /// Whether the command exited with status 0.
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::Exited(0)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "status {code}"),
            Self::Signaled(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// What a command left.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// The first 16 MiB of its standard output.
    pub stdout: Vec<u8>,
    /// The first 16 MiB of its standard error.
    pub stderr: Vec<u8>,
    /// There was more output than is kept.
    pub truncated: bool,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output")
            .field("status", &self.status)
            .field("stdout", &String::from_utf8_lossy(&self.stdout))
            .field("stderr", &String::from_utf8_lossy(&self.stderr))
            .field("truncated", &self.truncated)
            .finish()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(&self.stdout))?;
        write!(f, "{}", String::from_utf8_lossy(&self.stderr))
    }
}

/// The standard input and output of a command that runs.
pub struct Stream {
    /// Its input, to write.
    pub input: StreamInput,
    /// Its output, to read.
    pub output: StreamOutput,
}

/// Writes to a command's standard input; dropping it ends the input.
pub struct StreamInput(Arc<Request>);

impl Write for StreamInput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wanted = bytes.len().min(CHUNK);
        if wanted == 0 {
            return Ok(0);
        }
        let Some(room) = self.0.credit.take(wanted, None) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        self.0
            .send(Message::Input(bytes[..room].to_vec()))
            .map_err(io::Error::other)?;
        Ok(room)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StreamInput {
    fn drop(&mut self) {
        // Fails only when the stream has ended, and the input with it.
        let _ = self.0.send(Message::InputEnd);
    }
}

/// Reads a command's standard output.
pub struct StreamOutput {
    request: Arc<Request>,
    messages: Receiver<Message>,
    rest: io::Cursor<Vec<u8>>,
}

impl Read for StreamOutput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.rest.read(buffer)?;
            if len > 0 || buffer.is_empty() {
                return Ok(len);
            }
            match self
                .request
                .next(&self.messages)
                .map_err(io::Error::other)?
            {
                Some(Message::Stdout(bytes)) => self.rest = io::Cursor::new(bytes),
                Some(Message::Done(Outcome::Failed(reason), _)) => {
                    return Err(io::Error::other(reason));
                }
                Some(Message::Done(_, _)) | None => return Ok(0),
                Some(_) => {}
            }
        }
    }
}
