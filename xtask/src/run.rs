//! Running other programs within a step.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::Step;

/// What becomes of a program's output while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Printed if the program fails.
    IfItFails,
    /// Printed line by line.
    Streamed,
}

/// What a program left behind.
#[derive(Debug)]
pub struct Outcome {
    /// Whether it exited with status 0.
    pub success: bool,
    /// Its standard output and standard error, in the order written.
    pub text: String,
}

/// Runs a program to its end. It gets no input.
///
/// # Errors
/// The program cannot be started.
pub fn outcome(step: &Step, command: &mut Command, output: Output) -> Result<Outcome> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn().with_context(|| format!("running {name}"))?;
    // The command holds the writing ends, without whose end there is no EOF.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let mut text = String::new();
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes)? != 0 {
        let line = String::from_utf8_lossy(&bytes);
        match output {
            Output::Streamed => step.print(line.trim_end()),
            Output::IfItFails => step.note(&line),
        }
        text.push_str(&line);
        bytes.clear();
    }
    let success = child.wait()?.success();
    if !success && output == Output::IfItFails {
        step.print(text.trim_end());
    }
    Ok(Outcome { success, text })
}

/// Runs a program that must succeed; returns its output.
///
/// # Errors
/// The program cannot be started or does not exit with status 0.
pub fn checked(step: &Step, command: &mut Command, output: Output) -> Result<String> {
    let shown = shown(command);
    let outcome = outcome(step, command, output)?;
    if !outcome.success {
        bail!("{shown} failed");
    }
    Ok(outcome.text)
}

/// The command line as a user would type it.
fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn both_outputs_are_kept_in_the_order_written() {
        let step = Progress::new().step("test");
        let mut command = shell("echo one; echo two >&2; echo three; exit 3");
        let outcome = outcome(&step, &mut command, Output::IfItFails).unwrap();
        assert!(!outcome.success);
        assert_eq!(outcome.text, "one\ntwo\nthree\n");
    }

    #[test]
    fn a_program_that_must_succeed_and_does_not_is_named() {
        let step = Progress::new().step("test");
        let error = checked(&step, &mut shell("exit 1"), Output::IfItFails).unwrap_err();
        assert_eq!(error.to_string(), "sh -c exit 1 failed");
        let text = checked(&step, &mut shell("printf x"), Output::Streamed).unwrap();
        assert_eq!(text, "x");
    }
}
