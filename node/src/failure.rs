//! Errors as the user sees them: one line that says what, one that says what
//! to do about it.

use std::fmt;

use blanket_vmm::api::types::Problem;
use blanket_vmm::client::Error::Refused;

/// An error with its remedy. Travels inside [`anyhow::Error`].
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    remedy: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// An error that says what to do about it.
pub(crate) fn failure(what: impl Into<String>, remedy: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Failure {
        what: what.into(),
        remedy: remedy.into(),
    })
}

/// What an API answers in place of `error`.
pub(crate) fn problem(error: &anyhow::Error) -> Problem {
    let mut problem = Problem {
        error: format!("{error:#}"),
        remedy: None,
    };
    if let Some(failure) = error.downcast_ref::<Failure>() {
        problem.remedy = Some(failure.remedy.clone());
    } else if let Some(Refused { problem: said, .. }) = error.downcast_ref() {
        problem = said.clone();
    }
    problem
}

/// The error that an API has answered with.
pub(crate) fn answered(problem: Problem) -> anyhow::Error {
    match problem.remedy {
        Some(remedy) => failure(problem.error, remedy),
        None => anyhow::Error::msg(problem.error),
    }
}

/// The lines that describe `error`.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    let problem = problem(error);
    let mut text = format!("blanket: {}", problem.error);
    if let Some(remedy) = problem.remedy {
        text.push_str("\n  remedy: ");
        text.push_str(&remedy);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_has_a_line_of_its_own() {
        let text = describe(&failure("no such VM", "blanket ps -a"));
        assert_eq!(text, "blanket: no such VM\n  remedy: blanket ps -a");
    }

    #[test]
    fn causes_stay_on_one_line() {
        let error = anyhow::anyhow!("permission denied").context("cannot write x");
        assert_eq!(
            describe(&error),
            "blanket: cannot write x: permission denied"
        );
    }
}
