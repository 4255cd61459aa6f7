//! What is being done, step by step, with times: a spinner on a terminal,
//! plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the spinner moves.
const TICK: Duration = Duration::from_millis(120);

/// Starts steps.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
}

/// One step, until it is [`done`](Step::done), [`failed`](Step::failed) or
/// [`skipped`](Step::skipped).
#[derive(Debug)]
pub struct Step {
    name: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

impl Progress {
    /// Prints to standard output, with a spinner if that is a terminal.
    #[must_use]
    pub fn new() -> Self {
        Self {
            terminal: std::io::stdout().is_terminal(),
        }
    }

    /// Starts a step.
    #[must_use]
    pub fn step(&self, name: &str) -> Step {
        let spinner = self.terminal.then(|| {
            let spinner = ProgressBar::new_spinner().with_prefix(name.to_owned());
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} ({elapsed}) {wide_msg:.dim}")
            {
                spinner.set_style(style);
            }
            spinner.enable_steady_tick(TICK);
            spinner
        });
        if spinner.is_none() {
            println!("  ... {name}");
        }
        Step {
            name: name.to_owned(),
            started: Instant::now(),
            spinner,
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Step {
    /// Shows what the step is at, where that can be overwritten later.
    pub fn note(&self, text: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(text.trim().to_owned());
        }
    }

    /// Prints a line that stays.
    pub fn print(&self, line: &str) {
        match &self.spinner {
            Some(spinner) => spinner.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    /// Time since the step began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends the step well; `detail` says what came of it, or is empty.
    pub fn done(self, detail: &str) {
        self.end("ok", detail);
    }

    /// Ends the step badly.
    pub fn failed(self, detail: &str) {
        self.end("FAIL", detail);
    }

    /// Ends the step without having done it.
    pub fn skipped(self, reason: &str) {
        self.end("skip", reason);
    }

    fn end(self, state: &str, detail: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        println!("{}", line(state, &self.name, seconds, detail));
    }
}

/// The line that a step leaves behind.
fn line(state: &str, name: &str, seconds: f64, detail: &str) -> String {
    let head = format!("{state:>5} {name} ({seconds:.1} s)");
    if detail.is_empty() {
        head
    } else {
        format!("{head}: {detail}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_leaves_its_state_name_time_and_detail() {
        assert_eq!(line("ok", "format", 1.26, ""), "   ok format (1.3 s)");
        assert_eq!(
            line("FAIL", "lints", 0.0, "2 errors"),
            " FAIL lints (0.0 s): 2 errors"
        );
    }
}
