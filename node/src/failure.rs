//! Errors as the user sees them: one line that says what, one that says what
//! to do about it.

use std::fmt;

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

/// The lines that describe `error`.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    use blanket_vmm::client::Error::Refused;
    let mut text = format!("blanket: {error:#}");
    let remedy = if let Some(failure) = error.downcast_ref::<Failure>() {
        Some(failure.remedy.as_str())
    } else if let Some(Refused { problem, .. }) = error.downcast_ref() {
        text = format!("blanket: {}", problem.error);
        problem.remedy.as_deref()
    } else {
        None
    };
    if let Some(remedy) = remedy {
        text.push_str("\n  remedy: ");
        text.push_str(remedy);
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
