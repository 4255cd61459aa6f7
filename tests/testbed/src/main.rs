//! `blanket-testbed [--provider NAME] COMMAND...` boots a provider's machine, runs the command in
//! it, and ends the machine again: for a look around.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use blanket_testbed::{Disk, GuestImages, Node, Provider, Result};

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let provider = match args.first().map(String::as_str) {
        Some("--provider") if args.len() > 2 => {
            let name = args.drain(..2).next_back().unwrap_or_default();
            let found = Provider::ALL.into_iter().find(|one| one.name() == name);
            if found.is_none() {
                let names = Provider::ALL.map(Provider::name).join(" ");
                eprintln!("blanket-testbed: there is no provider {name}, but: {names}");
                return ExitCode::from(2);
            }
            found
        }
        _ => None,
    };
    if args.is_empty() {
        eprintln!("usage: blanket-testbed [--provider NAME] COMMAND...");
        return ExitCode::from(2);
    }
    let program = args.remove(0);
    run(provider, program, &args).unwrap_or_else(|error| {
        eprintln!("blanket-testbed: {error}");
        ExitCode::FAILURE
    })
}

fn run(provider: Option<Provider>, program: String, args: &[String]) -> Result<ExitCode> {
    let mut builder = Node::builder("node").memory_mib(2048);
    if let Some(provider) = provider {
        let images = GuestImages::get()?;
        let disk = Disk::scratch(&images.disk);
        builder = builder
            .provider(provider)
            .disk(disk)
            .payload(&images.payload()?);
    }
    let node = builder.boot()?;
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
