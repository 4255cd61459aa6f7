//! `blanket-testbed COMMAND...` boots a provider's machine, runs the command in it, and ends the
//! machine again: for a look around.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use blanket_testbed::{Node, Result};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(program) = args.next() else {
        eprintln!("usage: blanket-testbed COMMAND...");
        return ExitCode::from(2);
    };
    run(program, &args.collect::<Vec<_>>()).unwrap_or_else(|error| {
        eprintln!("blanket-testbed: {error}");
        ExitCode::FAILURE
    })
}

fn run(program: String, args: &[String]) -> Result<ExitCode> {
    let node = Node::builder("node").cpus(2).memory_mib(2048).boot()?;
    eprintln!(
        "the node took commands after {:.1} s",
        node.boot_time().as_secs_f32()
    );
    let output = node
        .command(program)
        .args(args)
        .timeout(Duration::from_secs(600))
        .run()?;
    // Whoever reads the output may have gone.
    let _ = io::stdout().write_all(&output.stdout);
    let _ = io::stderr().write_all(&output.stderr);
    let code = output
        .status
        .code()
        .and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
