//! Running the host's programs.

use std::process::{Command, Output, Stdio};

use crate::error::{Context, Error, Result};

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// [`Error::Program`] with all that it said when its status is not 0.
pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context(|| format!("cannot run {}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(failure(command, &output))
}

/// The error for a program that did not succeed.
pub(crate) fn failure(command: &Command, output: &Output) -> Error {
    let line: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|arg| arg.to_string_lossy())
        .collect();
    let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    Error::Program {
        command: line.join(" "),
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&said).into_owned(),
    }
}
