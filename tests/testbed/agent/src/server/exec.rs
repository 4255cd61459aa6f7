//! Running commands.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Job, Reply};
use crate::protocol::{Exec, Message, Outcome};

/// How long more output is awaited once the command itself has ended.
const LINGER: Duration = Duration::from_millis(100);

pub(super) fn run(exec: &Exec, reply: &Reply, job: &Arc<Job>, input: Receiver<Vec<u8>>) -> Outcome {
    let mut command = match prepare(exec) {
        Ok(command) => command,
        Err(error) => return Outcome::Failed(error),
    };
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::Failed(format!("cannot run {}: {error}", exec.argv[0])),
    };
    if exec.detach.is_some() {
        let pid = child.id();
        // Somebody has to wait for it, or it stays a zombie.
        thread::spawn(move || child.wait());
        return Outcome::Spawned(pid);
    }
    attend(child, exec, reply, job, input)
}

fn prepare(exec: &Exec) -> Result<Command, String> {
    let [program, args @ ..] = exec.argv.as_slice() else {
        return Err("no program given".to_owned());
    };
    let mut command = Command::new(program);
    command
        .args(args)
        .envs(exec.env.iter().map(|(k, v)| (k, v)))
        .process_group(0);
    if let Some(cwd) = &exec.cwd {
        command.current_dir(cwd);
    }
    if let Some(log) = &exec.detach {
        let open = || File::options().create(true).append(true).open(log);
        let log_error = |error| format!("cannot write {log}: {error}");
        command.stdin(Stdio::null());
        command
            .stdout(open().map_err(log_error)?)
            .stderr(open().map_err(log_error)?);
    } else {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    }
    Ok(command)
}

fn attend(
    mut child: Child,
    exec: &Exec,
    reply: &Reply,
    job: &Arc<Job>,
    input: Receiver<Vec<u8>>,
) -> Outcome {
    let deadline = exec
        .timeout_ms
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    {
        let mut state = job.state();
        state.group = group;
        if state.cancelled {
            job.kill(&state);
        }
    }
    if let Some(stdin) = child.stdin.take() {
        let reply = reply.clone();
        thread::spawn(move || feed(stdin, &input, &reply));
    }
    let exited = Arc::new(AtomicBool::new(false));
    let stdout = child
        .stdout
        .take()
        .map(|pipe| collect(pipe, reply, job, Message::Stdout, &exited));
    let stderr = child
        .stderr
        .take()
        .map(|pipe| collect(pipe, reply, job, Message::Stderr, &exited));

    let in_time = wait_until(group, deadline);
    if !matches!(in_time, Ok(true)) {
        job.kill(&job.state());
    }
    // From here on the process id may be reused.
    let status = {
        let mut state = job.state();
        let status = child.wait();
        state.group = None;
        status
    };
    exited.store(true, Ordering::Relaxed);
    for reader in [stdout, stderr].into_iter().flatten() {
        // A reader has no reason to panic; its output would end early.
        let _ = reader.join();
    }
    match (in_time, status) {
        (Ok(true), Ok(status)) => outcome(status),
        (Ok(false), Ok(_)) => Outcome::TimedOut,
        (Err(error), _) | (_, Err(error)) => {
            Outcome::Failed(format!("cannot wait for {}: {error}", exec.argv[0]))
        }
    }
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(code),
        (None, Some(signal)) => Outcome::Signaled(signal),
        (None, None) => Outcome::Failed(format!("ended with {status}")),
    }
}

fn feed(mut stdin: ChildStdin, input: &Receiver<Vec<u8>>, reply: &Reply) {
    for bytes in input {
        // A command that closes its input early is no error; the rest is thrown away.
        let _ = stdin.write_all(&bytes);
        reply.send(Message::Credit(bytes.len() as u32));
    }
}

fn collect(
    pipe: impl AsFd + Read + Send + 'static,
    reply: &Reply,
    job: &Arc<Job>,
    wrap: fn(Vec<u8>) -> Message,
    exited: &Arc<AtomicBool>,
) -> JoinHandle<()> {
    let (reply, job, exited) = (reply.clone(), Arc::clone(job), Arc::clone(exited));
    thread::spawn(move || {
        // A pipe's read error is its end.
        let _ = reply.stream(Output { pipe, exited }, &job, wrap);
    })
}

/// A command's output, which ends when the command has ended and nothing more comes: what the
/// command left in the background may hold the pipe open for ever.
struct Output<P> {
    pipe: P,
    exited: Arc<AtomicBool>,
}

impl<P: AsFd + Read> Read for Output<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let exited = self.exited.load(Ordering::Relaxed);
            let mut fds = [PollFd::new(&self.pipe, PollFlags::IN)];
            let timeout = Timespec::try_from(LINGER).ok();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) if exited => return Ok(0),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return self.pipe.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Waits until the process has ended, without reaping it. False when `deadline` passed first.
fn wait_until(pid: Option<Pid>, deadline: Option<Instant>) -> io::Result<bool> {
    let pid = pid.ok_or_else(|| io::Error::other("not a process id"))?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}
