//! Entries as text, as users of Open vSwitch write them:
//! `priority=100,ip,nw_dst=10.0.0.0/8,actions=output:2`.

mod actions;
mod names;
mod parse;
mod print;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::frame::PortId;

pub use actions::parse_actions;
pub use parse::{parse_filter, parse_flow, parse_match, parse_packet};
pub use print::{actions_text, dump};

/// Finds ports by their names.
pub type Names<'a> = &'a dyn Fn(&str) -> Option<PortId>;

/// No port has a name.
#[must_use]
pub fn no_names(_: &str) -> Option<PortId> {
    None
}

/// An action as text.
#[must_use]
pub fn action(action: &super::actions::Action) -> String {
    action.to_string()
}

/// What is wrong with a text, and where.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("column {column}: {what}")]
pub struct TextError {
    /// In characters, from 1.
    pub column: usize,
    /// What was expected there.
    pub what: String,
}

impl TextError {
    fn new(text: &str, at: usize, what: impl Into<String>) -> Self {
        let before = text.get(..at).unwrap_or(text);
        Self {
            column: before.chars().count() + 1,
            what: what.into(),
        }
    }

    /// The text with a mark under the place: two lines.
    #[must_use]
    pub fn shown(&self, text: &str) -> String {
        format!("{text}\n{:>1$}", "^", self.column)
    }
}
