//! Unit tests, documentation tests, whole-system tests.

use std::process::Command;

use anyhow::{Context, Result};

use super::Session;
use super::report::Status;
use crate::build;
use crate::run::{Output, outcome};

/// The package of the whole-system tests.
const SYSTEM_TESTS: &str = "blanket-system-tests";
/// Where tests find the programs for nodes.
const PROGRAMS_VARIABLE: &str = "BLANKET_BIN_DIR";
/// Where tests find the guest payloads.
const PAYLOADS_VARIABLE: &str = "BLANKET_FIRMWARE_DIR";
/// Where nextest leaves its report, below the root: its own folder, wherever
/// the build directory is.
const JUNIT: &str = "target/nextest/default/junit.xml";

impl Session<'_> {
    /// Runs all tests that the options ask for.
    pub(super) fn suites(&mut self) -> Result<()> {
        self.build_payloads();
        let others = ["--workspace", "--exclude", SYSTEM_TESTS];
        if self.matching(&others)? {
            self.nextest("unit tests", &others)?;
        }
        if self.options.filter.is_none() {
            self.doc_tests()?;
        }
        if self.options.unit || !self.matching(&["--package", SYSTEM_TESTS])? {
            return Ok(());
        }
        if self.build_programs() {
            self.nextest("whole-system tests", &["--package", SYSTEM_TESTS])?;
        } else {
            self.skip("whole-system tests", "the programs do not build");
        }
        Ok(())
    }

    /// `cargo nextest`, with what tests find in their environment.
    fn cargo_nextest(&self, subcommand: &str, packages: &[&str]) -> Command {
        let mut command = self.workspace.cargo();
        command
            .env(PAYLOADS_VARIABLE, self.workspace.payloads())
            .env(PROGRAMS_VARIABLE, self.workspace.programs(build::TESTING))
            // What failed says where; traces would bury it.
            .env("RUST_BACKTRACE", "0")
            .args(["nextest", subcommand])
            .args(packages);
        if let Some(filter) = &self.options.filter {
            command.arg("-E").arg(expression(filter));
        }
        if self.options.all {
            command.args(["--run-ignored", "all"]);
        }
        command
    }

    /// Whether any test is to be run. Those marked as ignored are reported as
    /// skipped.
    fn matching(&mut self, packages: &[&str]) -> Result<bool> {
        let mut command = self.cargo_nextest("list", packages);
        let output = command
            .args(["--message-format", "json", "--cargo-quiet"])
            .output()
            .context("running cargo nextest list")?;
        if !output.status.success() {
            // It does not build: the run will say so.
            return Ok(true);
        }
        let list = serde_json::from_slice(&output.stdout)?;
        let tests = listed(&list);
        for test in tests
            .iter()
            .filter(|test| test.ignored && !self.options.all)
        {
            let reason = "it takes long (`cargo xtask test --all` runs it)";
            self.report.add(&test.name, Status::Skipped(reason.into()));
        }
        Ok(tests.iter().any(|test| self.options.all || !test.ignored))
    }

    fn nextest(&mut self, name: &str, packages: &[&str]) -> Result<()> {
        let step = self.progress.step(name);
        let junit = self.workspace.root().join(JUNIT);
        // An old report must not be taken for this run's.
        match std::fs::remove_file(&junit) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(format!("removing {}", junit.display()));
            }
            _ => {}
        }
        let mut command = self.cargo_nextest("run", packages);
        command.args(["--cargo-quiet", "--no-tests", "pass"]).args([
            "--status-level",
            "pass",
            "--final-status-level",
            "none",
        ]);
        let outcome = outcome(&step, &mut command, Output::Streamed)?;
        let before = self.report.failures();
        let read = std::fs::read_to_string(&junit)
            .with_context(|| format!("reading {}", junit.display()))
            .and_then(|xml| self.report.add_junit(&xml));
        if outcome.success && read.is_ok() {
            step.done("");
            return Ok(());
        }
        // A run that failed without a failed test did not get that far.
        if read.is_err() || before == self.report.failures() {
            self.report.add(name, Status::Failed(String::new()));
        }
        step.failed(
            &read
                .err()
                .map_or(String::new(), |error| format!("{error:#}")),
        );
        Ok(())
    }

    fn doc_tests(&mut self) -> Result<()> {
        const NAME: &str = "documentation tests";
        let step = self.progress.step(NAME);
        let mut command = self.workspace.cargo();
        command.args(["test", "--doc", "--workspace", "--no-fail-fast", "--quiet"]);
        // `--quiet` is cargo's; the harness prints a line for each test.
        command.args(["--", "--format=pretty"]);
        let outcome = outcome(&step, &mut command, Output::IfItFails)?;
        let before = self.report.failures();
        self.report.add_doc_tests(&outcome.text);
        if outcome.success {
            step.done("");
        } else {
            if before == self.report.failures() {
                self.report.add(NAME, Status::Failed(String::new()));
            }
            step.failed("");
        }
        Ok(())
    }
}

/// What nextest calls the tests that a filter asks for: by their names, or by that of the suite
/// that they are in.
fn expression(filter: &str) -> String {
    let escaped: String = filter
        .chars()
        .flat_map(|c| {
            matches!(c, '\\' | '(' | ')' | ',')
                .then_some('\\')
                .into_iter()
                .chain([c])
        })
        .collect();
    format!("test(~{escaped}) | binary(~{escaped})")
}

/// A test that nextest knows and that the filter, if any, lets through.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    ignored: bool,
}

/// The tests in the output of `cargo nextest list --message-format json`.
fn listed(list: &serde_json::Value) -> Vec<Listed> {
    let entries = |value: &serde_json::Value| value.as_object().cloned().unwrap_or_default();
    let mut tests = Vec::new();
    for (suite, contents) in entries(&list["rust-suites"]) {
        for (name, test) in entries(&contents["testcases"]) {
            let ignored = test["ignored"] == true;
            let filter = &test["filter-match"];
            // nextest counts an ignored test as one that a filter rejects.
            if filter["status"] == "matches" || (ignored && filter["reason"] == "ignored") {
                let name = format!("{suite} {name}");
                tests.push(Listed { name, ignored });
            }
        }
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_part_of_a_test_or_of_its_suite() {
        assert_eq!(expression("disks"), "test(~disks) | binary(~disks)");
        assert_eq!(expression("a(b)"), r"test(~a\(b\)) | binary(~a\(b\))");
    }

    #[test]
    fn the_list_has_what_the_filter_lets_through_and_what_is_ignored() {
        let list = serde_json::json!({"rust-suites": {"memory": {"testcases": {
            "a": {"ignored": false, "filter-match": {"status": "matches"}},
            "b": {"ignored": true, "filter-match": {"status": "mismatch", "reason": "ignored"}},
            "c": {"ignored": false, "filter-match": {"status": "mismatch", "reason": "string"}},
        }}}});
        let test = |name: &str, ignored| Listed {
            name: name.into(),
            ignored,
        };
        assert_eq!(
            listed(&list),
            [test("memory a", false), test("memory b", true)]
        );
        assert!(listed(&serde_json::Value::Null).is_empty());
    }
}
