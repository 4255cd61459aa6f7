//! Names of VMs.

use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// A name: a letter or digit, then up to 62 letters, digits, `_`, `.`, `-`.
/// It is safe as a file name and as a word of a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub(crate) struct VmName(String);

impl VmName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let first = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if first && rest && text.len() <= 63 {
            return Ok(Self(text.to_owned()));
        }
        Err(
            "a name starts with a letter or digit and goes on with up to 62 letters, \
             digits, '_', '.' or '-'"
                .to_owned(),
        )
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_accepted_name_is_one_plain_file_name(text in ".{0,80}") {
            if let Ok(name) = text.parse::<VmName>() {
                let parts: Vec<_> = Path::new(name.as_str()).components().collect();
                prop_assert_eq!(parts.len(), 1);
                prop_assert!(matches!(parts[0], Component::Normal(_)));
                prop_assert!(!name.as_str().starts_with(['-', '.']));
            }
        }

        #[test]
        fn names_of_the_grammar_are_accepted(text in "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}") {
            prop_assert_eq!(text.parse::<VmName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn paths_blanks_and_overlong_names_are_refused() {
        let long = "a".repeat(64);
        for bad in ["", ".", "..", "a/b", "-a", "a b", "a\n", "é", &long] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
    }
}
