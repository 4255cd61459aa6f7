//! Who may read and write a node.

use serde::{Deserialize, Serialize};

use super::Errno;
use crate::xen::GUEST;

/// Entries of a node that the guest may set.
const MAX_ENTRIES: usize = 5;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Who {
    /// The monitor: domain 0, which may do anything.
    Toolstack,
    /// The guest: domain [`GUEST`].
    Guest,
}

/// What somebody wants to do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// See its value, its children and its permissions.
    Read,
    /// Change its value and its children.
    Write,
    /// Change its permissions.
    Own,
}

/// One entry: what a domain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    domain: u16,
    read: bool,
    write: bool,
}

impl Entry {
    fn parse(text: &str) -> Result<Self, Errno> {
        let mut letters = text.chars();
        let (read, write) = match letters.next() {
            Some('n') => (false, false),
            Some('r') => (true, false),
            Some('w') => (false, true),
            Some('b') => (true, true),
            _ => return Err(Errno::Invalid),
        };
        let domain = letters.as_str();
        if !domain.bytes().all(|c| c.is_ascii_digit()) {
            return Err(Errno::Invalid);
        }
        Ok(Self {
            domain: domain.parse().map_err(|_| Errno::Invalid)?,
            read,
            write,
        })
    }

    fn letter(self) -> char {
        match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        }
    }
}

/// The permissions of a node: its owner, who may do anything, what everybody
/// else may, and exceptions from that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// The owner, with what everybody else may.
    owner: Entry,
    exceptions: Vec<Entry>,
}

impl Permissions {
    /// Reads entries like `n0` and `r1`, the owner's first.
    ///
    /// # Errors
    /// [`Errno::Invalid`] without a well-formed entry, [`Errno::NoSpace`] with
    /// too many.
    pub fn parse<'a>(entries: impl IntoIterator<Item = &'a str>) -> Result<Self, Errno> {
        let mut entries = entries.into_iter().map(Entry::parse);
        let owner = entries.next().ok_or(Errno::Invalid)??;
        let exceptions = entries
            .by_ref()
            .take(MAX_ENTRIES)
            .collect::<Result<Vec<_>, _>>()?;
        if exceptions.len() == MAX_ENTRIES {
            return Err(Errno::NoSpace);
        }
        Ok(Self { owner, exceptions })
    }

    /// The monitor's node, which the guest may read.
    #[must_use]
    pub fn guest_reads() -> Self {
        Self {
            owner: Entry {
                domain: 0,
                read: false,
                write: false,
            },
            exceptions: vec![Entry {
                domain: GUEST,
                read: true,
                write: false,
            }],
        }
    }

    /// The monitor's own node.
    #[must_use]
    pub fn private() -> Self {
        Self {
            exceptions: Vec::new(),
            ..Self::guest_reads()
        }
    }

    /// The guest's own node.
    #[must_use]
    pub fn guest_owns() -> Self {
        Self::private().owned_by(GUEST)
    }

    /// The same with another owner.
    #[must_use]
    pub fn owned_by(mut self, domain: u16) -> Self {
        self.owner.domain = domain;
        self
    }

    /// The owner's domain.
    #[must_use]
    pub fn owner(&self) -> u16 {
        self.owner.domain
    }

    /// Whether `who` may do that.
    #[must_use]
    pub fn allow(&self, who: Who, access: Access) -> bool {
        if who == Who::Toolstack || self.owner.domain == GUEST {
            return true;
        }
        let exception = self.exceptions.iter().find(|entry| entry.domain == GUEST);
        let entry = exception.unwrap_or(&self.owner);
        match access {
            Access::Read => entry.read,
            Access::Write => entry.write,
            Access::Own => false,
        }
    }

    /// The entries as they are on the wire, the owner's first.
    #[must_use]
    pub fn entries(&self) -> Vec<String> {
        std::iter::once(&self.owner)
            .chain(&self.exceptions)
            .map(|entry| format!("{}{}", entry.letter(), entry.domain))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permissions(text: &str) -> Permissions {
        Permissions::parse(text.split(' ')).unwrap()
    }

    #[test]
    fn the_guests_entry_counts_before_everybodys_and_owners_may_all() {
        for (text, read, write, own) in [
            ("n0", false, false, false),
            ("r0", true, false, false),
            ("b0 n1", false, false, false),
            ("n0 r2 b1", true, true, false),
            ("w0", false, true, false),
            ("n1", true, true, true),
        ] {
            let entries = permissions(text);
            assert_eq!(entries.allow(Who::Guest, Access::Read), read, "{text}");
            assert_eq!(entries.allow(Who::Guest, Access::Write), write, "{text}");
            assert_eq!(entries.allow(Who::Guest, Access::Own), own, "{text}");
            assert!(entries.allow(Who::Toolstack, Access::Own));
            assert_eq!(entries.entries().join(" "), text);
        }
    }

    #[test]
    fn malformed_entries_and_too_many_are_refused() {
        for bad in ["", "x0", "n", "n-1", "n+1", "n65536", "r1x"] {
            assert_eq!(Permissions::parse([bad]), Err(Errno::Invalid), "{bad}");
        }
        assert_eq!(Permissions::parse([]), Err(Errno::Invalid));
        assert!(Permissions::parse(["n0"; MAX_ENTRIES]).is_ok());
        assert_eq!(
            Permissions::parse(["n0"; MAX_ENTRIES + 1]),
            Err(Errno::NoSpace)
        );
    }
}
