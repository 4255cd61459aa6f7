//! The client against the server, over a socket pair.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use blanket_testbed_agent::client::{Client, Error, Status};
use blanket_testbed_agent::server;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const LONG: Duration = Duration::from_secs(60);

fn channel_pair() -> (UnixStream, UnixStream) {
    let (host, machine) = UnixStream::pair().unwrap();
    let writer = machine.try_clone().unwrap();
    std::thread::spawn(move || server::serve(machine, writer));
    let again = host.try_clone().unwrap();
    (host, again)
}

fn client() -> Client {
    Client::connect_socket(channel_pair().0, LONG).unwrap()
}

#[test]
fn status_and_both_outputs_come_back() {
    let client = client();
    let output = client.sh("echo out; echo err >&2; exit 3").run().unwrap();
    assert_eq!(output.status, Status::Exited(3));
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    let output = client.sh("kill -9 $$").run().unwrap();
    assert_eq!(output.status, Status::Signaled(9));
}

#[test]
fn environment_directory_and_input_reach_the_command() {
    let client = client();
    let text = client
        .sh("pwd; echo $COLOUR; cat")
        .env("COLOUR", "blue")
        .cwd("/")
        .stdin("in");
    assert_eq!(text.text().unwrap(), "/\nblue\nin");
}

#[test]
fn megabytes_of_input_come_back_unchanged_through_cat() {
    let bytes: Vec<u8> = (0..3_000_000u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    let output = client().command("cat").stdin(bytes.clone()).run().unwrap();
    assert!(output.stdout == bytes);
    assert!(!output.truncated);
}

#[test]
fn a_command_that_ignores_its_input_holds_nothing_up() {
    let client = client();
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| {
            let input = vec![1; 4 << 20];
            client
                .command("sleep")
                .arg("30")
                .stdin(input)
                .timeout(Duration::from_secs(2))
                .run()
        });
        for _ in 0..20 {
            assert_eq!(client.command("echo").arg("a").text().unwrap(), "a\n");
        }
        assert!(matches!(stuck.join().unwrap(), Err(Error::TimedOut { .. })));
    });
}

#[test]
fn a_command_that_times_out_is_ended_with_its_children() {
    let client = client();
    let marker = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "(sleep 1.5; echo late >> {0}) & echo started; wait",
        marker.path().display()
    );
    let error = client
        .sh(script)
        .timeout(Duration::from_millis(500))
        .run()
        .unwrap_err();
    match error {
        Error::TimedOut { output, .. } => assert_eq!(output.stdout, b"started\n"),
        other => panic!("{other}"),
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(fs::read(marker.path()).unwrap(), b"");
}

#[test]
fn what_a_command_leaves_in_the_background_does_not_hold_it_up() {
    let output = client()
        .sh("sleep 1000 & echo $!")
        .timeout(LONG)
        .run()
        .unwrap();
    let pid = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn many_commands_run_at_once() {
    let client = client();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let client = &client;
            scope.spawn(move || {
                for n in 0..10 {
                    let word = format!("{thread}-{n}");
                    let text = client.command("echo").arg(word.as_str()).text().unwrap();
                    assert_eq!(text.trim(), word);
                }
            });
        }
    });
}

#[test]
fn a_file_makes_the_round_trip_with_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let bytes: Vec<u8> = (0..2_000_001u32).map(|i| (i % 251) as u8).collect();
    fs::write(&from, &bytes).unwrap();
    let client = client();
    let inside = folder.path().join("deep/inside");
    let inside = inside.to_str().unwrap();
    client.put(&from, inside).unwrap();
    client.get(inside, &to).unwrap();
    assert!(fs::read(&to).unwrap() == bytes);
    client
        .write(inside, 0o755, b"#!/bin/sh\necho hi\n")
        .unwrap();
    assert_eq!(client.command(inside).text().unwrap(), "hi\n");
    let names = fs::read_dir(folder.path().join("deep")).unwrap().count();
    assert_eq!(names, 1, "a partial file was left");
}

#[test]
fn failures_name_their_reason() {
    let client = client();
    let error = client.read("/nonexistent").unwrap_err().to_string();
    assert!(
        error.contains("/nonexistent") && error.contains("No such file"),
        "{error}"
    );
    let error = client
        .command("no-such-program")
        .run()
        .unwrap_err()
        .to_string();
    assert!(error.contains("no-such-program"), "{error}");
    let error = client
        .sh("echo why >&2; exit 4")
        .text()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("status 4") && error.contains("why"),
        "{error}"
    );
    let error = client
        .write("/proc/nope", 0o644, &vec![0; 1 << 20])
        .unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

#[test]
fn a_new_session_ends_the_old_ones_commands_and_works_after_garbage() {
    let (stream, mut again) = channel_pair();
    let reader = stream.try_clone().unwrap();
    let first = Client::connect(reader, stream, LONG).unwrap();
    let marker = tempfile::tempdir().unwrap();
    let file = marker.path().join("late");
    let script = format!("sleep 2; touch {}", file.display());
    let _old = first.sh(script).stream().unwrap();
    again.write_all(b"garbage \x00 half a frame").unwrap();
    // The first client's reader takes some answers away: hello is said until one arrives.
    let second = Client::connect(again.try_clone().unwrap(), again, LONG).unwrap();
    drop(second);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!file.exists());
}

#[test]
fn a_stream_carries_a_second_channel() {
    let outer = client();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (inside, _) = listener.accept().unwrap();
        let writer = inside.try_clone().unwrap();
        server::serve(inside, writer)
    });
    let relay = env!("CARGO_BIN_EXE_blanket-agent");
    let stream = outer
        .command(relay)
        .args(["relay", path.to_str().unwrap()])
        .stream()
        .unwrap();
    let inner = Client::connect(stream.output, stream.input, LONG).unwrap();
    assert_eq!(
        inner.command("echo").arg("nested").text().unwrap(),
        "nested\n"
    );
    let bytes = vec![9; 1 << 20];
    assert!(
        inner
            .command("cat")
            .stdin(bytes.clone())
            .run()
            .unwrap()
            .stdout
            == bytes
    );
}

#[test]
fn nobody_there_is_an_error_in_time() {
    let (silent, _other) = UnixStream::pair().unwrap();
    let result = Client::connect_socket(silent, Duration::from_millis(300));
    assert!(matches!(result, Err(Error::NoAnswer(_))));
    let (lone, gone) = UnixStream::pair().unwrap();
    drop(gone);
    assert!(matches!(
        Client::connect_socket(lone, LONG),
        Err(Error::Closed(_))
    ));
}

/// What comes in before the terminal is raw may look like ^C.
#[test]
fn a_terminal_is_served_by_a_session_that_it_does_not_control() {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let mut agent = Command::new("setsid")
        .args([env!("CARGO_BIN_EXE_blanket-agent"), "serve"])
        .arg(std::ffi::OsStr::from_bytes(name.to_bytes()))
        .spawn()
        .unwrap();
    let terminal = File::from(terminal);
    let client = Client::connect(terminal.try_clone().unwrap(), terminal, LONG).unwrap();
    assert_eq!(client.sh("echo here").text().unwrap(), "here\n");
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.id())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
    let (session, terminal) = (fields[4], fields[5]);
    assert_eq!(session, agent.id().to_string(), "{stat}");
    assert_eq!(terminal, "0", "{stat}");
    agent.kill().unwrap();
    agent.wait().unwrap();
}
