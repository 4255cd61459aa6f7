//! A stand-in for `blanket-vmm`: the API and the consoles, without a VM.
//!
//! The tests' script starts this test program again, with the monitor's
//! arguments in `STAND_IN_ARGS`, and `STAND_IN_BEHAVIOUR` one of: nothing;
//! `fail` (ends with an error), `end` (the guest powers off at once),
//! `deaf-guest` (ignores the power button), `deaf-monitor` (answers questions
//! only).

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::exit;
use std::thread;

use blanket_vmm::api::types::{Action, Machine, MemoryMetrics, Metrics, Problem, VmInfo, VmState};
use blanket_vmm::config::{CharConfig, CpuChoice, VmConfig};
use serde::Serialize;

/// Value of `--NAME VALUE`.
fn argument<'a>(args: &'a [&str], name: &str) -> &'a str {
    let at = args.iter().position(|arg| *arg == name).unwrap();
    args[at + 1]
}

/// Passes at once when run as a test; is the monitor when started as one.
#[test]
fn stand_in() {
    let Ok(args) = std::env::var("STAND_IN_ARGS") else {
        return;
    };
    let args: Vec<&str> = args.split(' ').collect();
    let behaviour = std::env::var("STAND_IN_BEHAVIOUR").unwrap();
    eprintln!("stand-in monitor");
    match behaviour.as_str() {
        "fail" => {
            eprintln!("blanket-vmm: the kernel is truncated");
            exit(1);
        }
        "end" => exit(0),
        _ => (),
    }
    let config = VmConfig::from_file(Path::new(argument(&args, "--config"))).unwrap();
    for port in [&config.serial, &config.console].into_iter().flatten() {
        serve_port(port.clone());
    }
    let mut vm = VmInfo {
        id: argument(&args, "--id").into(),
        version: "0".into(),
        state: if args.contains(&"--no-boot") {
            VmState::Created
        } else {
            VmState::Running
        },
        pid: std::process::id(),
        machine: Machine::Hvm,
        cpu: CpuChoice::Host,
        cpu_reason: None,
        uptime_ms: 1,
        boot: vec![],
        devices: vec![],
        serial_socket: None,
        console_socket: None,
        target: None,
        config,
    };
    let api = UnixListener::bind(argument(&args, "--api-socket")).unwrap();
    for stream in api.incoming() {
        let mut stream = stream.unwrap();
        let request = read_request(&stream);
        answer(&mut stream, &mut vm, &request, &behaviour);
    }
}

/// The first line of a request; its head is read to the end.
fn read_request(stream: &UnixStream) -> String {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    first
}

fn answer(stream: &mut UnixStream, vm: &mut VmInfo, request: &str, behaviour: &str) {
    let action = Action::ALL
        .into_iter()
        .find(|action| request.starts_with(&format!("POST {} ", action.path())));
    let refuse = |stream: &mut UnixStream, error: &str, remedy: &str| {
        let problem = Problem {
            error: error.into(),
            remedy: Some(remedy.into()),
        };
        send(stream, "409 Conflict", &problem);
    };
    match action {
        None if request.starts_with("GET /metrics ") => {
            let metrics = Metrics {
                memory: MemoryMetrics {
                    resident: 7 << 20,
                    ..MemoryMetrics::default()
                },
                ..Metrics::default()
            };
            send(stream, "200 OK", &metrics);
        }
        None => send(stream, "200 OK", vm),
        Some(_) if behaviour == "deaf-monitor" => refuse(stream, "no", "none"),
        Some(Action::Pause) if vm.state == VmState::Paused => {
            refuse(stream, "it is paused", "resume it");
        }
        Some(action) => {
            match action {
                Action::Pause => vm.state = VmState::Paused,
                Action::Boot | Action::Resume => vm.state = VmState::Running,
                _ => (),
            }
            send(stream, "200 OK", vm);
            let listens = behaviour != "deaf-guest" && vm.state == VmState::Running;
            if action == Action::Poweroff || (action == Action::Shutdown && listens) {
                exit(0);
            }
        }
    }
}

fn send<T: Serialize>(stream: &mut UnixStream, status: &str, body: &T) {
    let body = serde_json::to_string(body).unwrap();
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: ");
    // The client may be gone: that is its own affair.
    let _ = write!(stream, "{head}{}\r\n\r\n{body}", body.len());
}

/// A guest that repeats what it hears, and a log of what it says.
fn serve_port(port: CharConfig) {
    let Some(socket) = port.socket else { return };
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = [0; 256];
            while let Ok(n @ 1..) = stream.read(&mut bytes) {
                let said = [b"guest heard: ", &bytes[..n]].concat();
                stream.write_all(&said).unwrap();
                fs::write(port.log.as_ref().unwrap(), &said).unwrap();
            }
        }
    });
}
