//! The end of the channel inside the machine.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::flow::Credit;
use crate::protocol::{CHUNK, Decoder, Frame, Message, Outcome, encode};

mod exec;

/// Frames that may wait for the stream.
const OUTBOX: usize = 16;

/// Pause before a stream that has nobody at its other end is read again.
const IDLE: Duration = Duration::from_millis(20);

/// One request being carried out.
#[derive(Default)]
struct Job {
    /// What may still be sent to the client.
    credit: Credit,
    state: Mutex<JobState>,
}

#[derive(Default)]
struct JobState {
    /// Where the request's input goes; dropped at its end.
    input: Option<Sender<Vec<u8>>>,
    /// The command's process group, while the command has not been waited for.
    group: Option<Pid>,
    cancelled: bool,
}

impl Job {
    fn state(&self) -> MutexGuard<'_, JobState> {
        lock(&self.state)
    }

    fn cancel(&self) {
        self.credit.close();
        let mut state = self.state();
        state.cancelled = true;
        state.input = None;
        self.kill(&state);
    }

    /// Kills the command with its whole process group. The state's lock is held: the group is
    /// there only until the command is waited for, so its number cannot have been reused.
    fn kill(&self, state: &JobState) {
        if let Some(group) = state.group {
            // It may have ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// What the threads of all requests share.
struct Shared {
    session: AtomicU32,
    jobs: Mutex<HashMap<u32, Arc<Job>>>,
    outbox: SyncSender<(u32, Vec<u8>)>,
}

/// Sends the messages of one request.
#[derive(Clone)]
struct Reply {
    shared: Arc<Shared>,
    session: u32,
    request: u32,
    /// Bytes of both outputs so far.
    sent: Arc<AtomicU64>,
}

impl Reply {
    fn send(&self, message: Message) {
        if let Message::Stdout(bytes) | Message::Stderr(bytes) = &message {
            self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        let frame = Frame {
            session: self.session,
            request: self.request,
            message,
        };
        if let Ok(wire) = encode(&frame) {
            // Fails only when the server is gone.
            let _ = self.shared.outbox.send((self.session, wire));
        }
    }

    /// Sends the outcome and forgets the request.
    fn done(&self, outcome: Outcome) {
        lock(&self.shared.jobs).remove(&self.request);
        let sent = self.sent.load(Ordering::Relaxed);
        self.send(Message::Done(outcome, sent));
    }

    /// Copies `from` to the client until its end or until the request is cancelled.
    fn stream(
        &self,
        mut from: impl Read,
        job: &Job,
        wrap: fn(Vec<u8>) -> Message,
    ) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let Some(room) = job.credit.take(CHUNK, None) else {
                return Ok(());
            };
            let len = from.read(&mut buffer[..room])?;
            job.credit.add(room - len);
            if len == 0 {
                return Ok(());
            }
            self.send(wrap(buffer[..len].to_vec()));
        }
    }
}

/// Serves requests that arrive on `reader` and answers on `writer`, until reading or writing
/// fails.
///
/// A read of zero bytes means that nobody is connected now; it is tried again.
///
/// # Errors
/// The error of the failed read.
pub fn serve(mut reader: impl Read, writer: impl Write + Send + 'static) -> io::Result<()> {
    let (outbox, sent) = sync_channel(OUTBOX);
    let shared = Arc::new(Shared {
        session: AtomicU32::new(0),
        jobs: Mutex::default(),
        outbox,
    });
    let of_writer = Arc::clone(&shared);
    thread::spawn(move || write_frames(writer, &sent, &of_writer.session));

    let mut decoder = Decoder::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => thread::sleep(IDLE),
            Ok(len) => {
                for frame in decoder.push(&buffer[..len]) {
                    handle(&shared, frame);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                cancel_all(&shared);
                return Err(error);
            }
        }
    }
}

fn write_frames(mut writer: impl Write, sent: &Receiver<(u32, Vec<u8>)>, session: &AtomicU32) {
    while let Ok((of, wire)) = sent.recv() {
        if of == session.load(Ordering::Relaxed)
            && writer
                .write_all(&wire)
                .and_then(|()| writer.flush())
                .is_err()
        {
            return;
        }
    }
}

fn cancel_all(shared: &Shared) {
    // Taken out first: a job's own thread removes itself under the same lock.
    let jobs: Vec<_> = lock(&shared.jobs).drain().collect();
    for (_, job) in jobs {
        job.cancel();
    }
}

fn handle(shared: &Arc<Shared>, frame: Frame) {
    let Frame {
        session,
        request,
        message,
    } = frame;
    let current = shared.session.load(Ordering::Relaxed);
    let reply = Reply {
        shared: Arc::clone(shared),
        session,
        request,
        sent: Arc::default(),
    };
    if message == Message::Hello {
        if session != current {
            cancel_all(shared);
            shared.session.store(session, Ordering::Relaxed);
        }
        reply.send(Message::Ready);
        return;
    }
    if session != current {
        return;
    }
    match message {
        Message::Exec(exec) => begin(reply, move |reply, job, input| {
            exec::run(&exec, reply, job, input)
        }),
        Message::Put { path, mode } => begin(reply, move |reply, job, input| {
            copied(put(Path::new(&path), mode, reply, job, &input))
        }),
        Message::Get { path } => begin(reply, move |reply, job, _| {
            copied(File::open(&path).and_then(|file| reply.stream(file, job, Message::Stdout)))
        }),
        other => {
            let job = lock(&shared.jobs).get(&request).cloned();
            if let Some(job) = job {
                update(&job, other);
            }
        }
    }
}

fn update(job: &Job, message: Message) {
    match message {
        Message::Input(bytes) => {
            if let Some(input) = &job.state().input {
                // The receiver is gone when the command closed its input.
                let _ = input.send(bytes);
            }
        }
        Message::InputEnd => job.state().input = None,
        Message::Credit(bytes) => job.credit.add(bytes as usize),
        Message::Cancel => job.cancel(),
        // Only the server sends the rest.
        _ => {}
    }
}

/// Runs one request on a thread of its own.
fn begin(
    reply: Reply,
    work: impl FnOnce(&Reply, &Arc<Job>, Receiver<Vec<u8>>) -> Outcome + Send + 'static,
) {
    let (input, received) = channel();
    let job = Arc::new(Job::default());
    job.state().input = Some(input);
    lock(&reply.shared.jobs).insert(reply.request, Arc::clone(&job));
    thread::spawn(move || {
        let outcome = work(&reply, &job, received);
        reply.done(outcome);
    });
}

fn copied(result: io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Copied,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// Writes the request's input to `path`. The file appears under its name when it is complete.
fn put(
    path: &Path,
    mode: u32,
    reply: &Reply,
    job: &Job,
    input: &Receiver<Vec<u8>>,
) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", reply.request));
    let result = write_input(Path::new(&partial), mode, reply, input).and_then(|()| {
        if job.state().cancelled {
            return Err(io::Error::other("cancelled"));
        }
        fs::rename(&partial, path)
    });
    if result.is_err() {
        // It may not have been made.
        let _ = fs::remove_file(&partial);
    }
    result
}

fn write_input(path: &Path, mode: u32, reply: &Reply, input: &Receiver<Vec<u8>>) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    for bytes in input {
        file.write_all(&bytes)?;
        reply.send(Message::Credit(bytes.len() as u32));
    }
    file.flush()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
