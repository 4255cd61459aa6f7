//! Pipelines of new processes.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitCode, ExitStatus, Stdio};
use std::thread;

use serde_json::json;

use crate::Report;
use crate::process;

/// The subcommand that is one process of a pipeline.
pub(crate) const STAGE: &str = "stage";

/// Processes of ours in a pipeline.
const STAGES: u64 = 3;

/// Counts of what went wrong.
#[derive(Default)]
struct Wrong {
    processes: u64,
    failed: u64,
    killed: u64,
    data: u64,
    first: Option<String>,
}

impl Wrong {
    fn note(&mut self, what: impl FnOnce() -> String) {
        if self.first.is_none() {
            self.first = Some(what());
        }
    }

    fn ended(&mut self, round: u32, index: usize, status: ExitStatus) {
        self.processes += 1;
        if status.success() {
            return;
        }
        if status.signal().is_some() {
            self.killed += 1;
        } else {
            self.failed += 1;
        }
        self.note(|| format!("round {round}, process {index}: {status}"));
    }
}

/// Runs `rounds` pipelines in each of `workers` processes.
pub(crate) fn run(workers: u32, rounds: u32) -> io::Result<Report> {
    let busybox = Command::new("busybox")
        .arg("true")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut results = Vec::new();
    for worker in 0..workers {
        let (result, mut to) = io::pipe()?;
        let pid = process::fork(move || {
            let json = match work(worker, rounds, busybox) {
                Ok(wrong) => json!({
                    "processes": wrong.processes, "failed": wrong.failed,
                    "killed": wrong.killed, "data": wrong.data, "first": wrong.first,
                }),
                Err(error) => json!({ "processes": 0, "failed": 1, "killed": 0, "data": 0,
                    "first": error.to_string() }),
            };
            // A report that is cut short is not read, and counts as wrong.
            i32::from(to.write_all(json.to_string().as_bytes()).is_err())
        })?;
        results.push((pid, result));
    }
    let mut total = Wrong::default();
    for (pid, mut result) in results {
        let mut text = String::new();
        result.read_to_string(&mut text)?;
        if process::wait(pid)? != process::End::Exited(0) {
            total.killed += 1;
        }
        let part: serde_json::Value = serde_json::from_str(&text).map_err(io::Error::other)?;
        let count = |name: &str| part[name].as_u64().unwrap_or(1);
        total.processes += count("processes");
        total.failed += count("failed");
        total.killed += count("killed");
        total.data += count("data");
        total.first = total.first.or(part["first"].as_str().map(str::to_owned));
    }
    Ok(Report {
        good: total.failed + total.killed + total.data == 0,
        json: json!({
            "rounds": workers * rounds, "processes": total.processes, "failed": total.failed,
            "killed": total.killed, "wrong_data": total.data, "first": total.first,
            "compressed": busybox,
        }),
    })
}

fn work(worker: u32, rounds: u32, busybox: bool) -> io::Result<Wrong> {
    let mut wrong = Wrong::default();
    let mut state = u64::from(worker) + 1;
    for round in 0..rounds {
        // Compressible, as text is.
        let len = 20_000 + (process::random(&mut state) % 60_000) as usize;
        let data: Vec<u8> = (0..len)
            .map(|_| (process::random(&mut state) % 23) as u8 + b'a')
            .collect();
        pipeline(round, &data, busybox, &mut wrong)?;
    }
    Ok(wrong)
}

/// Our stages change the data by keys that cancel out in the end; between them it is compressed
/// and uncompressed.
fn pipeline(round: u32, data: &[u8], busybox: bool, wrong: &mut Wrong) -> io::Result<()> {
    let program = std::env::current_exe()?;
    let mut commands = Vec::new();
    let mut keys: Vec<u64> = (1..STAGES)
        .map(|key| key * 0x9e37 + u64::from(round))
        .collect();
    keys.push(keys.iter().fold(0, |all, key| all ^ key));
    for (index, key) in keys.iter().enumerate() {
        let mut command = Command::new(&program);
        command.args([STAGE, &key.to_string()]);
        commands.push(command);
        if busybox && index == 0 {
            for tool in ["gzip", "gunzip"] {
                let mut command = Command::new("busybox");
                command.args([tool, "-c"]);
                commands.push(command);
            }
        }
    }
    if round % 2 == 1 {
        for command in &mut commands {
            // SAFETY: does nothing between fork and exec; with it, it is fork instead of vfork.
            unsafe { command.pre_exec(|| Ok(())) };
        }
    }
    let (mut children, mut output) = start(&mut commands)?;
    let mut input = children.first_mut().and_then(|child| child.stdin.take());
    let arrived = thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(mut input) = input.take() {
                // A process that died does not take it: its status tells.
                drop(input.write_all(data));
            }
        });
        let mut arrived = Vec::new();
        output.read_to_end(&mut arrived).map(|_| arrived)
    })?;
    for (index, child) in children.iter_mut().enumerate() {
        wrong.ended(round, index, child.wait()?);
    }
    if arrived != data {
        wrong.data += 1;
        let at = arrived.iter().zip(data).take_while(|(a, b)| a == b).count();
        let (got, of) = (arrived.len(), data.len());
        wrong.note(|| format!("round {round}: {got} bytes of {of}, wrong from {at} on"));
    }
    Ok(())
}

/// Starts the commands, each reading from the one before.
fn start(commands: &mut [Command]) -> io::Result<(Vec<Child>, ChildStdout)> {
    let mut children: Vec<Child> = Vec::new();
    for command in commands {
        let before = children.last_mut().and_then(|child| child.stdout.take());
        let before = before.map_or_else(Stdio::piped, Stdio::from);
        children.push(command.stdin(before).stdout(Stdio::piped()).spawn()?);
    }
    let last = children.last_mut().and_then(|child| child.stdout.take());
    Ok((children, last.ok_or(io::ErrorKind::InvalidInput)?))
}

/// Copies standard input to standard output, changed by `key`.
pub(crate) fn stage(key: u64) -> ExitCode {
    let copy = || -> io::Result<()> {
        let mut data = Vec::new();
        io::stdin().lock().read_to_end(&mut data)?;
        for chunk in data.chunks_mut(8) {
            for (byte, key) in chunk.iter_mut().zip(key.to_le_bytes()) {
                *byte ^= key;
            }
        }
        io::stdout().lock().write_all(&data)
    };
    match copy() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
