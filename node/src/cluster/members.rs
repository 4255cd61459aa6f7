//! Who is in the cluster.

use serde::{Deserialize, Serialize};

use super::identity::{NodeId, Peer};
use super::names::{Address, NodeName};

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) name: NodeName,
    pub(crate) id: NodeId,
    pub(crate) address: Address,
}

/// A node that is none any more, though its certificate is still good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Removed {
    pub(crate) name: NodeName,
    pub(crate) id: NodeId,
    /// When its certificate ends, in seconds of Unix time.
    pub(crate) until: u64,
}

/// The cluster's nodes, as the CA's node says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Membership {
    /// Counts changes.
    pub(crate) revision: u64,
    /// The node that has the CA.
    pub(crate) authority: NodeName,
    /// All nodes, by name.
    pub(crate) members: Vec<Member>,
    pub(crate) removed: Vec<Removed>,
}

impl Membership {
    /// A cluster of one.
    pub(crate) fn of(first: Member) -> Self {
        Self {
            revision: 1,
            authority: first.name.clone(),
            members: vec![first],
            removed: Vec::new(),
        }
    }

    pub(crate) fn member(&self, name: &NodeName) -> Option<&Member> {
        self.members.iter().find(|member| member.name == *name)
    }

    /// Adds a node.
    pub(crate) fn add(&mut self, member: Member) {
        self.members.push(member);
        self.members.sort_by(|a, b| a.name.cmp(&b.name));
        self.revision += 1;
    }

    /// Removes a node, whose certificate ends `until` then. `now` is in seconds
    /// of Unix time.
    pub(crate) fn remove(&mut self, name: &NodeName, now: u64, until: u64) -> Option<Member> {
        let at = self.members.iter().position(|it| it.name == *name)?;
        let member = self.members.remove(at);
        // Expired certificates are refused without this.
        self.removed.retain(|removed| removed.until > now);
        self.removed.push(Removed {
            name: member.name.clone(),
            id: member.id.clone(),
            until,
        });
        self.revision += 1;
        Some(member)
    }

    /// Whether the key was removed.
    pub(crate) fn is_removed(&self, id: &NodeId) -> bool {
        self.removed.iter().any(|removed| removed.id == *id)
    }

    /// Whether this is the node that has the CA.
    pub(crate) fn is_authority(&self, peer: &Peer) -> bool {
        let authority = self.member(&self.authority);
        authority.is_some_and(|member| member.id == peer.id && member.name == peer.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str) -> Member {
        Member {
            name: name.parse().unwrap(),
            id: NodeId::of(name.as_bytes()),
            address: "10.0.0.1".parse().unwrap(),
        }
    }

    #[test]
    fn a_removed_key_stays_removed_until_its_certificate_ends_and_its_name_is_free() {
        let mut all = Membership::of(member("a"));
        all.add(member("c"));
        all.add(member("b"));
        let names: Vec<_> = all.members.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let b = member("b");
        assert_eq!(all.remove(&b.name, 10, 100), Some(b.clone()));
        assert!(all.is_removed(&b.id) && all.member(&b.name).is_none());
        assert_eq!(all.remove(&b.name, 10, 100), None);
        let again = Member {
            id: NodeId::of(b"another key"),
            ..b.clone()
        };
        all.add(again.clone());
        assert!(all.is_removed(&b.id) && !all.is_removed(&again.id));
        all.remove(&member("c").name, 101, 200);
        assert!(!all.is_removed(&b.id));
        assert_eq!(all.revision, 6);
    }
}
