//! What became of the tests.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use quick_junit::{TestCase, TestCaseStatus, XmlString};

/// How a test says that it could not run: a line that begins like this, and
/// the reason behind it.
const SKIPPED: &str = "skipped, because ";

/// The result of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// It held.
    Passed,
    /// It held when it was tried again; what was said the first time, if anything.
    PassedAgain(String),
    /// It did not hold; what was said of it, if anything.
    Failed(String),
    /// It could not run, because of this.
    Skipped(String),
}

/// All results, by name.
#[derive(Debug, Default)]
pub struct Report {
    results: BTreeMap<String, Status>,
}

impl Report {
    /// Adds a result.
    pub fn add(&mut self, name: &str, status: Status) {
        self.results.insert(name.to_owned(), status);
    }

    /// Adds the results of a nextest run from its JUnit file.
    ///
    /// # Errors
    /// `xml` is not JUnit's format.
    pub fn add_junit(&mut self, xml: &str) -> Result<()> {
        let report = quick_junit::Report::deserialize_from_str(xml)
            .context("nextest wrote a report that cannot be read")?;
        for suite in &report.test_suites {
            for case in &suite.test_cases {
                self.add(
                    &format!("{} {}", suite.name.as_str(), case.name.as_str()),
                    status(case),
                );
            }
        }
        Ok(())
    }

    /// Adds the results of documentation tests from the output of
    /// `cargo test --doc`.
    pub fn add_doc_tests(&mut self, output: &str) {
        for (name, result) in output
            .lines()
            .filter_map(|line| line.strip_prefix("test ")?.rsplit_once(" ... "))
        {
            let status = match result {
                "ok" => Status::Passed,
                "ignored" => Status::Skipped("it is an example that is not run".into()),
                _ => Status::Failed(String::new()),
            };
            self.add(&format!("documentation {name}"), status);
        }
    }

    /// How many tests failed.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.count(|status| matches!(status, Status::Failed(_)))
    }

    fn count(&self, want: impl Fn(&Status) -> bool) -> usize {
        self.results.values().filter(|status| want(status)).count()
    }
}

fn status(case: &TestCase) -> Status {
    match &case.status {
        TestCaseStatus::NonSuccess { .. } => {
            Status::Failed(outputs(case).find_map(panic_message).unwrap_or_default())
        }
        TestCaseStatus::Skipped { message, .. } => Status::Skipped(
            message
                .as_ref()
                .map_or("no reason is given", |message| message.as_str())
                .to_owned(),
        ),
        TestCaseStatus::Success { flaky_runs } => match flaky_runs.first() {
            Some(first) => {
                let mut texts = texts([&first.system_out, &first.system_err]);
                Status::PassedAgain(texts.find_map(panic_message).unwrap_or_default())
            }
            None => outputs(case)
                .find_map(skip_reason)
                .map_or(Status::Passed, Status::Skipped),
        },
    }
}

/// What a test printed.
fn outputs(case: &TestCase) -> impl Iterator<Item = &str> {
    texts([&case.system_out, &case.system_err])
}

fn texts<const N: usize>(all: [&Option<XmlString>; N]) -> impl Iterator<Item = &str> {
    all.into_iter().flatten().map(XmlString::as_str)
}

/// Where a test panicked and what it said, from its output: the beginning, and
/// the end of what is long.
fn panic_message(output: &str) -> Option<String> {
    const FIRST: usize = 4;
    const LAST: usize = 40;
    let at = " panicked at ";
    let told = &output[output.find(at)? + at.len()..];
    let ends = ["stack backtrace:", "Stack backtrace:", "note: "];
    let mut lines: Vec<_> = told
        .lines()
        .take_while(|line| !ends.iter().any(|end| line.starts_with(end)))
        .map(str::trim_end)
        .collect();
    if lines.len() > FIRST + LAST {
        lines.splice(FIRST..lines.len() - LAST, ["..."]);
    }
    Some(lines.join("\n    "))
}

/// The reason that a test's output gives for not having run.
fn skip_reason(output: &str) -> Option<String> {
    output
        .lines()
        .find_map(|line| line.trim().strip_prefix(SKIPPED))
        .map(|reason| reason.trim().to_owned())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, status) in &self.results {
            if let Status::Skipped(reason) = status {
                writeln!(f, "skipped: {name}, because {reason}")?;
            }
        }
        for (name, status) in &self.results {
            if let Status::PassedAgain(why) = status {
                writeln!(f, "passed when tried again: {name}: {why}")?;
            }
        }
        for (name, status) in &self.results {
            match status {
                Status::Failed(why) if why.is_empty() => writeln!(f, "failed: {name}")?,
                Status::Failed(why) => writeln!(f, "failed: {name}: {why}")?,
                _ => {}
            }
        }
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.count(|status| matches!(status, Status::Passed | Status::PassedAgain(_))),
            self.failures(),
            self.count(|status| matches!(status, Status::Skipped(_))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUNIT: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="4" failures="1" errors="0">
  <testsuite name="devices" tests="4" disabled="0" errors="0" failures="1">
    <testcase name="late" classname="devices" time="0.004">
      <flakyFailure timestamp="2026-01-01T00:00:00.000+00:00" time="1.0" type="test failure with exit code 101">
        <system-err>thread 'late' (7) panicked at src/lib.rs:3:4:
no answer
note: run with a backtrace
</system-err>
      </flakyFailure>
    </testcase>
    <testcase name="queue::holds" classname="devices" time="0.004">
      <system-out>running 1 test
the guest was not skipped, because it is quick
</system-out>
    </testcase>
    <testcase name="needs_kvm" classname="devices" time="0.004">
      <system-out>running 1 test</system-out>
      <system-err>  skipped, because /dev/kvm is missing &amp; nothing helps
</system-err>
    </testcase>
    <testcase name="breaks" classname="devices" time="0.004">
      <failure type="test failure">skipped, because it is broken</failure>
      <system-err>skipped, because it is broken
thread 'breaks' (7) panicked at src/lib.rs:1:2:
two is not three
stack backtrace:
</system-err>
    </testcase>
  </testsuite>
</testsuites>"#;

    fn report() -> Report {
        let mut report = Report::default();
        report.add_junit(JUNIT).unwrap();
        report
    }

    #[test]
    fn a_test_that_says_so_counts_as_skipped_and_a_failed_one_never_does() {
        let report = report();
        assert_eq!(report.results["devices queue::holds"], Status::Passed);
        assert_eq!(
            report.results["devices needs_kvm"],
            Status::Skipped("/dev/kvm is missing & nothing helps".into())
        );
        assert_eq!(
            report.results["devices late"],
            Status::PassedAgain("src/lib.rs:3:4:\n    no answer".into())
        );
        let why = "src/lib.rs:1:2:\n    two is not three";
        assert_eq!(report.results["devices breaks"], Status::Failed(why.into()));
        assert_eq!(report.failures(), 1);
    }

    #[test]
    fn the_summary_is_one_line_behind_the_reasons() {
        let mut report = report();
        report.add("format", Status::Passed);
        assert_eq!(
            report.to_string(),
            "skipped: devices needs_kvm, because /dev/kvm is missing & nothing helps\n\
             passed when tried again: devices late: src/lib.rs:3:4:\n    no answer\n\
             failed: devices breaks: src/lib.rs:1:2:\n    two is not three\n\
             3 passed, 1 failed, 1 skipped"
        );
    }

    #[test]
    fn documentation_tests_are_read_from_the_output_of_cargo() {
        let mut report = Report::default();
        report.add_doc_tests(
            "running 3 tests\n\
             test src/a.rs - a (line 3) ... ok\n\
             test src/b.rs - b (line 4) ... ignored\n\
             test src/c.rs - c (line 5) ... FAILED\n\
             \n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out",
        );
        assert!(
            report
                .to_string()
                .ends_with("\n1 passed, 1 failed, 1 skipped")
        );
    }

    #[test]
    fn something_that_is_not_junit_is_an_error() {
        assert!(Report::default().add_junit("<html>").is_err());
    }

    #[test]
    fn an_empty_report_has_no_failures() {
        assert_eq!(
            Report::default().to_string(),
            "0 passed, 0 failed, 0 skipped"
        );
        assert_eq!(Report::default().failures(), 0);
    }
}
