//! `blanket up` and `blanket down`: a machine becomes a node, and no node again.
//!
//! [`wants()`] lists what Blanket wants of the machine. What is not so is a
//! [`Change`], which is written down in the [`Book`] before it is made. Undoing
//! goes through the book from its end.

mod change;
mod record;
mod system;
mod wants;

pub(crate) use change::{Change, Undone};
pub(crate) use record::{Book, Options};
pub(crate) use system::{System, has_program};
pub(crate) use wants::{DAEMON, Node, SERVICE, Want, usable, wants};

use anyhow::Result;

use change::Target;

/// What `blanket up` is about to do.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What an earlier one did and is not wanted any more.
    pub(crate) stale: Vec<Change>,
    /// What is to be brought about.
    pub(crate) wants: Vec<Want>,
}

impl Plan {
    /// Compares what is wanted with what is.
    pub(crate) fn of(all: Vec<Want>, book: &Book, system: &System) -> Result<Self> {
        let mut stale = book.record.changes.clone();
        stale.retain(|change| {
            let kept = matches!(
                change.target,
                Target::Package { .. } | Target::Uplink { .. } | Target::Store { .. }
            );
            let identity = change.target.identity();
            !kept && all.iter().all(|it| it.target.identity() != identity)
        });
        stale.reverse();
        let mut wants = Vec::new();
        for want in all {
            if !want.target.is_met(system)? {
                wants.push(want);
            }
        }
        Ok(Self { stale, wants })
    }

    /// Whether all is as it should be.
    pub(crate) fn is_empty(&self) -> bool {
        self.stale.is_empty() && self.wants.is_empty()
    }
}

impl Want {
    /// Brings it about and writes it down.
    pub(crate) fn fulfil(&self, book: &mut Book, system: &System) -> Result<()> {
        book.add(self.target.change(system)?)?;
        self.target.apply(system)
    }

    /// Whether a node is one without it.
    pub(crate) fn is_optional(&self) -> bool {
        matches!(self.target, Target::Uplink { .. } | Target::Store { .. })
    }
}

#[cfg(test)]
mod tests;
