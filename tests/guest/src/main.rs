//! `guest-check` runs in a guest (or natively, to compare) and prints one JSON object.
//!
//! - `registers WORKERS ROUNDS`: registers of every kind keep their values across page faults,
//!   copies on write, system calls and switches between processes.
//! - `hold SECONDS`: they keep them while the machine is stopped and goes on elsewhere.
//! - `pipeline WORKERS ROUNDS`: data that passes through pipelines of new processes arrives
//!   unchanged, and every process ends well.
//! - `probe`: whatever a process tries on addresses and instructions that are not its own ends
//!   in a signal.
//! - `debug`: breakpoints and watchpoints of the processor stop a process where they should, and
//!   so do single steps.
//! - `returns`: a signal's handler that returns to segments and addresses that are none ends its
//!   process and nothing else.
//! - `bases`: bases of FS and GS that a process sets without a system call are no other's.
//! - `clock SECONDS`: processes and the kernel agree on the time, which never goes back.
//! - `datagrams PORT`: numbered datagrams arrive once and in order, up to a silence.
//! - `bench`: what system calls, faults, processes and pipes cost.
//!
//! The exit status is 0 if all is as it should be.

mod bases;
mod bench;
mod clock;
mod datagrams;
mod debug;
mod memory;
mod pipeline;
mod probe;
mod process;
mod registers;
mod returns;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result =
        match args.as_slice() {
            ["registers", workers, rounds] => numbers(workers, rounds)
                .and_then(|(workers, rounds)| registers::run(workers, rounds)),
            ["hold", seconds] => seconds
                .parse()
                .map_err(std::io::Error::other)
                .map(registers::hold),
            [registers::CHILD, seed] => return registers::child(seed.parse().unwrap_or(1)),
            ["pipeline", workers, rounds] => numbers(workers, rounds)
                .and_then(|(workers, rounds)| pipeline::run(workers, rounds)),
            [pipeline::STAGE, key] => return pipeline::stage(key.parse().unwrap_or(1)),
            ["probe"] => probe::run(),
            ["debug"] => debug::run(),
            ["returns"] => returns::run(),
            ["bases"] => bases::run(),
            ["clock", seconds] => seconds
                .parse()
                .map_err(std::io::Error::other)
                .and_then(clock::run),
            ["datagrams", port] => port
                .parse()
                .map_err(std::io::Error::other)
                .and_then(datagrams::run),
            ["bench"] => bench::run(),
            [bench::NOTHING] => return ExitCode::SUCCESS,
            _ => {
                eprintln!(
                    "usage: guest-check registers|pipeline WORKERS ROUNDS | hold SECONDS | \
                     probe | debug | returns | bases | clock SECONDS | \
                     datagrams PORT | bench"
                );
                return ExitCode::from(2);
            }
        };
    match result {
        Ok(report) => {
            println!("{}", report.json);
            if report.good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("guest-check: {error}");
            ExitCode::FAILURE
        }
    }
}

fn numbers(workers: &str, rounds: &str) -> std::io::Result<(u32, u32)> {
    let number = |text: &str| text.parse().map_err(std::io::Error::other);
    Ok((number(workers)?, number(rounds)?))
}

/// What a check found.
struct Report {
    /// Whether all is as it should be.
    good: bool,
    json: serde_json::Value,
}
